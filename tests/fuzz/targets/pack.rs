//! Packs and objects that somebody wrote into the archive: a pack's table, the cache of the index, an object's seek
//! table, and the frames behind them.
//!
//! What must hold: no panic; a read gives exactly as many bytes as were asked for.

#![no_main]

use arbitrary::Arbitrary;
use fleecebox::archive::{Digest, ObjectInfo};
use fleecebox::contract::Encoding;
use fleecebox_fuzz::scratch::{BACKUP, Scratch};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use std::sync::LazyLock;

#[derive(Debug, Arbitrary)]
enum Case {
    Pack {
        data: Vec<u8>,
        entries: Vec<Entry>,
        count: Option<u32>,
    },
    Cache {
        packs: Vec<(u8, u64, Vec<Entry>, Option<u32>)>,
        rest: Vec<u8>,
    },
    Object {
        data: Vec<u8>,
        frames: Vec<(u32, u32)>,
        descriptor: u8,
        count: Option<u32>,
        length: Option<u32>,
        written: Vec<(u32, u32)>,
        reads: Vec<(u64, u16)>,
    },
    /// A file of any bytes in each place.
    Bytes(Vec<u8>),
}

#[derive(Debug, Arbitrary)]
struct Entry {
    /// Of the one chunk that is looked for, or of another.
    known: bool,
    offset: u32,
    stored: u32,
    decoded: u32,
    encoding: u8,
}

/// What is put: the index is asked whether it knows it.
const CHUNK: &[u8] = b"some bytes of a disk";
const PACK: &str = "packs/07070707070707070707070707070707.pack";

static SCRATCH: LazyLock<(Scratch, [u8; 32])> = LazyLock::new(|| {
    let scratch = Scratch::new();
    scratch.make_backup();
    let key = std::fs::read(scratch.path("key")).expect("a namespace has a key");
    (scratch, key.try_into().expect("a key has 32 bytes"))
});

fuzz_target!(|case: Case| {
    let (scratch, key) = &*SCRATCH;
    match case {
        Case::Pack {
            data,
            entries,
            count,
        } => {
            let mut pack = data;
            let table: Vec<u8> = entries.iter().flat_map(|entry| entry.render(key)).collect();
            pack.extend(&table);
            pack.extend(count.unwrap_or(entries.len() as u32).to_le_bytes());
            pack.extend(blake3::hash(&table).as_bytes());
            pack.extend(b"FLBXPK01");
            put(scratch, &pack, &[]);
        }
        Case::Cache { packs, rest } => {
            let mut cache = b"FLBXIX01".to_vec();
            for (name, length, entries, count) in packs {
                cache.extend([name; 16]);
                cache.extend(length.to_le_bytes());
                cache.extend(count.unwrap_or(entries.len() as u32).to_le_bytes());
                cache.extend(entries.iter().flat_map(|entry| entry.render(key)));
            }
            cache.extend(rest);
            let digest = blake3::keyed_hash(key, &cache);
            cache.extend(digest.as_bytes());
            put(scratch, b"a pack", &cache);
        }
        Case::Object {
            data,
            frames,
            descriptor,
            count,
            length,
            written,
            reads,
        } => {
            let mut file = data;
            let checksums = descriptor & 0x80 != 0;
            let entry = if checksums { 12 } else { 8 };
            file.extend(0x184d_2a5e_u32.to_le_bytes());
            let announced = frames.len() as u32 * entry + 9;
            file.extend(length.unwrap_or(announced).to_le_bytes());
            for (stored, decoded) in &frames {
                file.extend(stored.to_le_bytes());
                file.extend(decoded.to_le_bytes());
                if checksums {
                    file.extend([0; 4]);
                }
            }
            file.extend(count.unwrap_or(frames.len() as u32).to_le_bytes());
            file.push(descriptor);
            file.extend(0x8f92_eab1_u32.to_le_bytes());
            read(scratch, &file, &written, &reads);
        }
        Case::Bytes(bytes) => {
            put(scratch, &bytes, &bytes);
            read(scratch, &bytes, &[(0, 100)], &[(0, 10)]);
        }
    }
});

/// Opens the index and asks it for the chunk; a frame that it gives is read.
fn put(scratch: &Scratch, pack: &[u8], cache: &[u8]) {
    scratch.write(PACK, pack);
    scratch.write("packs/index-cache", cache);
    let id = "20261123T003001Z-0123456789abcdef"
        .parse()
        .expect("it is an id");
    let writer = scratch
        .namespace
        .begin(id)
        .expect("there is no such backup");
    let frame = writer
        .put(CHUNK, &[Digest::of(CHUNK)], Encoding::Zstd)
        .expect("a chunk can be put whatever the packs look like");
    if let Ok(bytes) = scratch.namespace.read_frame(&frame) {
        assert_eq!(bytes.len(), frame.decoded() as usize);
    }
    writer
        .abandon()
        .expect("an uncommitted backup can be removed");
}

fn read(scratch: &Scratch, file: &[u8], written: &[(u32, u32)], reads: &[(u64, u16)]) {
    scratch.write(&format!("backups/{BACKUP}/objects/x"), file);
    let root = json!({ "shape": { "size": 0, "block_size": 4096 }, "page": null });
    let mut manifest = scratch.manifest(serde_json::from_value(root).expect("it is a root"));
    let info: ObjectInfo = serde_json::from_value(json!({
        "name": "x", "encoding": "zstd", "size": 1 << 20, "stored": file.len(),
        "digest": "00".repeat(32),
        "written": written
            .iter()
            .map(|&(start, length)| (start, length.max(1)))
            .collect::<Vec<_>>(),
    }))
    .expect("it is an object's record");
    let name = info.name.clone();
    manifest.objects.push(info);
    let objects = scratch.namespace.objects(&manifest);
    for &(offset, length) in reads {
        if let Ok(bytes) = objects.read(&name, offset, length.into()) {
            assert_eq!(bytes.len(), usize::from(length));
        }
    }
    let _ = objects.verify(&name);
}

impl Entry {
    fn render(&self, key: &[u8; 32]) -> Vec<u8> {
        let mut id = [9; 16];
        if self.known {
            // As the product addresses a chunk: its length and the digests of its blocks, keyed.
            let mut hasher = blake3::Hasher::new_keyed(key);
            hasher.update(&(CHUNK.len() as u32).to_le_bytes());
            hasher.update(blake3::hash(CHUNK).as_bytes());
            hasher.finalize_xof().fill(&mut id);
        }
        let mut bytes = id.to_vec();
        for number in [self.offset, self.stored, self.decoded] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.push(self.encoding);
        bytes
    }
}
