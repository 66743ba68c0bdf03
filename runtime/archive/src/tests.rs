//! The archive as a whole, in a real directory.

use super::manifest::tests::record;
use super::*;
use cap_std::ambient_authority;
use fleecebox_contract::{BitmapMode, Encoding};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

mod reading_back;

const BLOCK: u32 = 4096;

/// An archive with one namespace, in a directory that goes when it is dropped.
struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fixture = Self { dir };
        let archive = Archive::create(fixture.root()).unwrap();
        archive
            .create_namespace(&"tenant".parse().unwrap())
            .unwrap();
        fixture
    }

    fn root(&self) -> Dir {
        Dir::open_ambient_dir(self.dir.path(), ambient_authority()).unwrap()
    }

    /// Opened anew, as another process would.
    fn namespace(&self) -> Namespace {
        let archive = Archive::open(self.root()).unwrap();
        archive.namespace(&"tenant".parse().unwrap()).unwrap()
    }

    fn begin(&self) -> BackupWriter {
        self.namespace().begin(fresh_id()).unwrap()
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join("namespaces/tenant").join(below)
    }

    /// Every path below the archive.
    fn tree(&self) -> BTreeSet<PathBuf> {
        fn walk(dir: &Path, found: &mut BTreeSet<PathBuf>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found);
                }
                found.insert(path);
            }
        }
        let mut found = BTreeSet::new();
        walk(self.dir.path(), &mut found);
        found
    }

    fn packs(&self) -> Vec<PathBuf> {
        let packs = std::fs::read_dir(self.path("packs")).unwrap();
        let paths = packs.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.extension().is_some_and(|e| e == "pack"))
            .collect()
    }
}

fn fresh_id() -> BackupId {
    BackupId::random(time::OffsetDateTime::now_utc()).unwrap()
}

/// Bytes that differ by seed; every other block compresses.
fn data(seed: u64, blocks: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in 0..blocks as u64 {
        let mut part = vec![0; BLOCK as usize];
        let input = [seed.to_le_bytes(), block.to_le_bytes()].concat();
        let length = if block % 2 == 0 { part.len() } else { 64 };
        let mut noise = blake3::Hasher::new().update(&input).finalize_xof();
        noise.fill(&mut part[..length]);
        bytes.extend(part);
    }
    bytes
}

fn digests(data: &[u8]) -> Vec<Digest> {
    data.chunks(BLOCK as usize).map(Digest::of).collect()
}

fn put(writer: &BackupWriter, data: &[u8]) -> Frame {
    writer.put(data, &digests(data), Encoding::Zstd).unwrap()
}

fn volume(root: TableRoot) -> VolumeRecord {
    VolumeRecord {
        name: "drive-scsi0".into(),
        disk: DiskRecord {
            format: "raw".into(),
            identity: "a".into(),
            layers: Vec::new(),
            mark: None,
        },
        mode: BitmapMode::New,
        base: None,
        fallback: None,
        bitmap: Some("fb".into()),
        root,
        receipt: vec![0, 255],
        dirty_bytes: 1,
        zero_bytes: 2,
        placed_bytes: 3,
        claimed_bytes: u64::MAX,
        proof: Proof::Proven,
    }
}

fn flip(path: &Path, offset: u64) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

fn truncate(path: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length - 1).unwrap();
}

#[test]
fn an_archive_is_made_in_an_empty_directory_only() {
    let dir = tempfile::tempdir().unwrap();
    let root = || Dir::open_ambient_dir(dir.path(), ambient_authority()).unwrap();
    assert!(matches!(Archive::open(root()), Err(Error::NotAnArchive)));
    let made = Archive::create(root()).unwrap();
    assert_eq!(Archive::open(root()).unwrap().id(), made.id());
    assert!(matches!(Archive::create(root()), Err(Error::NotEmpty)));
    let name = "a".parse().unwrap();
    assert!(matches!(made.namespace(&name), Err(Error::NotFound { .. })));
    made.create_namespace(&name).unwrap();
    made.create_namespace(&name).unwrap();
    assert_eq!(made.namespaces().unwrap(), [name]);
}

#[test]
fn a_committed_backup_gives_back_what_was_put() {
    let fixture = Fixture::new();
    let bytes = data(1, 21);
    // The last block is short.
    let bytes = &bytes[..bytes.len() - 100];
    let writer = fixture.begin();
    let table = writer.block_table(bytes.len() as u64, BLOCK, None).unwrap();
    let mut block = 0;
    for chunk in bytes.chunks(8 * BLOCK as usize) {
        let frame = put(&writer, chunk);
        for (n, digest) in (0..).zip(digests(chunk)) {
            let entry = Entry::Placed {
                digest,
                frame: frame.clone(),
                skip: n * BLOCK,
            };
            table.set(block, entry).unwrap();
            block += 1;
        }
    }
    let root = table.finish().unwrap();
    let component = writer.keep_component(b"component").unwrap();
    let id = writer.id();
    let committed = writer.commit(record(vec![volume(root)])).unwrap();

    let namespace = fixture.namespace();
    assert_eq!(namespace.backups().unwrap(), [id]);
    let manifest = namespace.manifest(id).unwrap();
    assert_eq!(manifest, committed);
    assert_eq!(namespace.component(component).unwrap(), b"component");
    let table = namespace.table(manifest.record.volumes[0].root);
    let mut restored = vec![0; bytes.len()];
    for run in table.entries(0..table.root().blocks()).unwrap() {
        let run = run.unwrap();
        let RunContent::Placed {
            frame,
            skip,
            digests,
        } = run.content
        else {
            panic!("{run:?} is not placed");
        };
        let decoded = namespace.read_frame(&frame).unwrap();
        let mut at = skip as usize;
        for (block, digest) in run.blocks.zip(digests) {
            let length = table.root().block_length(block) as usize;
            assert_eq!(Digest::of(&decoded[at..at + length]), digest);
            let start = block as usize * BLOCK as usize;
            restored[start..start + length].copy_from_slice(&decoded[at..at + length]);
            at += length;
        }
    }
    assert!(restored == bytes);
}

#[test]
fn a_chunk_is_stored_once_per_namespace_with_or_without_the_cache() {
    let fixture = Fixture::new();
    let chunks: Vec<_> = (0..20).map(|seed| data(seed, 4)).collect();
    let mut places = Vec::new();
    for chunk in &chunks {
        let writer = fixture.begin();
        let frame = put(&writer, chunk);
        assert_eq!(frame, put(&writer, chunk));
        assert_eq!(writer.stats().known_chunks, 1);
        places.push(frame);
        writer.commit(record(vec![])).unwrap();
    }
    assert_eq!(fixture.packs().len(), 20);
    let cache = fixture.path("packs/index-cache");
    let all_known = || {
        let writer = fixture.begin();
        for (chunk, place) in chunks.iter().zip(&places) {
            assert_eq!(put(&writer, chunk), *place);
        }
        let stats = writer.stats();
        assert_eq!((stats.chunks, stats.known_chunks), (20, 20));
        writer.commit(record(vec![])).unwrap();
    };
    all_known();
    assert!(cache.exists(), "17 packs without a cache make one");
    all_known();
    flip(&cache, 40);
    all_known();
    std::fs::remove_file(&cache).unwrap();
    all_known();
    assert_eq!(fixture.packs().len(), 20);
}

#[test]
fn a_pack_that_lost_its_table_is_not_referred_to_again() {
    let fixture = Fixture::new();
    let chunk = data(1, 4);
    let writer = fixture.begin();
    let first = put(&writer, &chunk);
    writer.commit(record(vec![])).unwrap();
    truncate(&fixture.packs()[0]);
    let writer = fixture.begin();
    assert_ne!(put(&writer, &chunk), first);
}

#[test]
fn an_uncommitted_backup_leaves_the_tree_as_it_was() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    put(&writer, &data(0, 4));
    writer.keep_component(b"old").unwrap();
    writer.commit(record(vec![])).unwrap();
    let before = fixture.tree();

    let half = || {
        let writer = fixture.begin();
        put(&writer, &data(1, 4));
        writer.keep_component(b"new").unwrap();
        let name = "o".parse().unwrap();
        let mut object = writer.create(&name, Encoding::Identity).unwrap();
        object.write(b"x").unwrap();
        object.finish().unwrap();
        let table = writer.block_table(1 << 30, BLOCK, None).unwrap();
        table.set_zero(3..4).unwrap();
        table.finish().unwrap();
        assert_ne!(fixture.tree(), before);
        writer
    };
    drop(half());
    assert_eq!(fixture.tree(), before);
    half().abandon().unwrap();
    assert_eq!(fixture.tree(), before);

    // A killed process runs no destructor.
    let killed = half();
    let id = killed.id();
    std::mem::forget(killed);
    let namespace = fixture.namespace();
    assert!(!namespace.backups().unwrap().contains(&id));
    assert!(matches!(
        namespace.manifest(id),
        Err(Error::NotFound { .. })
    ));
    namespace.discard_uncommitted(id).unwrap();
    assert_eq!(fixture.tree(), before);
    namespace.discard_uncommitted(id).unwrap();
}

#[test]
fn a_crash_after_the_barrier_leaves_no_backup_but_sound_packs() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let frame = put(&writer, &data(1, 4));
    writer.durable().unwrap();
    writer.durable().unwrap();
    let id = writer.id();
    std::mem::forget(writer);
    let namespace = fixture.namespace();
    assert!(namespace.backups().unwrap().is_empty());
    namespace.discard_uncommitted(id).unwrap();
    let next = fixture.begin();
    assert_eq!(put(&next, &data(1, 4)), frame);
    assert_eq!(namespace.read_frame(&frame).unwrap(), data(1, 4));
}

#[test]
fn a_committed_backup_is_not_discarded() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let id = writer.id();
    writer.commit(record(vec![])).unwrap();
    let namespace = fixture.namespace();
    assert!(matches!(
        namespace.discard_uncommitted(id),
        Err(Error::Committed(found)) if found == id
    ));
    assert!(matches!(namespace.begin(id), Err(Error::Exists { .. })));
    assert_eq!(namespace.backups().unwrap(), [id]);
}

#[test]
fn a_backup_with_an_unfinished_object_does_not_commit() {
    let fixture = Fixture::new();
    let before = fixture.tree();
    let writer = fixture.begin();
    let name = "o".parse().unwrap();
    let object = writer.create(&name, Encoding::Zstd).unwrap();
    assert!(matches!(
        writer.create(&name, Encoding::Zstd),
        Err(Error::Exists { .. })
    ));
    assert!(matches!(
        writer.commit(record(vec![])),
        Err(Error::UnfinishedObjects { count: 1 })
    ));
    drop(object);
    assert_eq!(fixture.tree(), before);

    let writer = fixture.begin();
    drop(writer.create(&name, Encoding::Zstd).unwrap());
    let manifest = writer.commit(record(vec![])).unwrap();
    assert_eq!(manifest.objects, []);
}

#[test]
fn after_a_failed_write_a_backup_never_commits() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let packs = fixture.path("packs");
    let hidden = fixture.path("elsewhere");
    // A file that cannot be renamed stands for a disk that cannot be written.
    put(&writer, &data(1, 4));
    let temporary = std::fs::read_dir(&packs).unwrap().next().unwrap().unwrap();
    std::fs::rename(temporary.path(), &hidden).unwrap();
    assert!(writer.durable().is_err());
    std::fs::rename(&hidden, temporary.path()).unwrap();
    assert!(matches!(writer.durable(), Err(Error::WriterFailed { .. })));
    assert!(matches!(
        writer.put(&[1; 100], &[], Encoding::Zstd),
        Err(Error::WriterFailed { .. })
    ));
    assert!(matches!(
        writer.commit(record(vec![])),
        Err(Error::WriterFailed { .. })
    ));
    assert!(fixture.packs().is_empty());
}

#[test]
fn a_commit_of_unknown_outcome_says_so_and_removes_nothing() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    put(&writer, &data(1, 4));
    let id = writer.id();
    let manifest = fixture.path(&format!("backups/{id}/manifest.json"));
    std::fs::create_dir(&manifest).unwrap(); // no file can be renamed to this
    let outcome = writer.commit(record(vec![]));
    assert!(matches!(outcome, Err(Error::CommitUnknown { .. })));
    assert!(fixture.path(&format!("backups/{id}/pages")).exists());
    let asked = fixture.namespace().manifest(id);
    assert!(!matches!(asked, Ok(_) | Err(Error::NotFound { .. })));
}

#[test]
fn objects_are_what_was_written_to_any_zstd() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let [a, b, c] = [data(1, 700), data(2, 3), data(3, 2)];
    let whole = [&a[..], &b, &c, &a].concat();
    let make = |name: &str, encoding| {
        let mut object = writer.create(&name.parse().unwrap(), encoding).unwrap();
        object.write(&a).unwrap();
        let encoder = object.encoder();
        let splice = |object: &mut ObjectWriter, bytes: &[u8]| -> Vec<Frame> {
            bytes
                .chunks(FRAME_LIMIT as usize)
                .map(|piece| encoder.encode(piece.to_vec().into()).unwrap())
                .map(|frame| object.append(&frame).unwrap())
                .collect()
        };
        splice(&mut object, &b);
        for piece in c.chunks(1000) {
            object.write(piece).unwrap();
        }
        let frames = splice(&mut object, &a);
        assert_eq!(object.size(), whole.len() as u64);
        assert_eq!(frames.len(), 3, "2.7 MiB");
        (object.finish().unwrap(), frames)
    };
    let (zstd, zstd_frames) = make("zstd", Encoding::Zstd);
    let (raw, raw_frames) = make("raw", Encoding::Identity);
    assert_eq!(zstd.size, whole.len() as u64);
    assert!(zstd.stored < zstd.size);
    let object = |name| fixture.path(&format!("backups/{}/objects/{name}", writer.id()));
    assert!(std::fs::read(object("raw")).unwrap() == whole);
    let decoded = Command::new("zstd")
        .arg("-dc")
        .arg(object("zstd"))
        .output()
        .expect("the zstd program is installed");
    assert!(decoded.status.success() && decoded.stdout == whole);
    let listed = Command::new("zstd").arg("-l").arg(object("zstd")).output();
    assert!(listed.unwrap().status.success());

    // Both before and after the commit, the provider reads its own bytes and no others.
    let check = |objects: StoredObjects| {
        let (own, end) = (a.len() as u64, whole.len() as u64);
        let spliced = own..own + b.len() as u64;
        for info in [&zstd, &raw] {
            let read = |offset: u64, length: u32| objects.read(&info.name, offset, length);
            assert_eq!(objects.size(&info.name).unwrap(), end);
            assert!(read(0, a.len() as u32).unwrap() == a);
            assert_eq!(read(spliced.end, 8192).unwrap(), c);
            assert_eq!(read(spliced.end + 999, 2).unwrap(), c[999..1001]);
            assert_eq!(read((1 << 20) - 1, 2).unwrap(), a[(1 << 20) - 1..][..2]);
            for (offset, length) in [
                (own - 1, 2),
                (own, 1),
                (spliced.end - 1, 1),
                (spliced.end, 8193),
                (end - 1, 1),
                (end, 1),
                (0, 0),
                (u64::MAX, 1),
            ] {
                let refused = read(offset, length);
                assert!(matches!(refused, Err(Error::OutOfRange { .. })), "{offset}");
            }
            objects.verify(&info.name).unwrap();
        }
        let unknown = objects.read(&"none".parse().unwrap(), 0, 1);
        assert!(matches!(unknown, Err(Error::NotFound { .. })));
    };
    check(writer.objects());
    let manifest = writer.commit(record(vec![])).unwrap();
    let namespace = fixture.namespace();
    check(namespace.objects(&manifest));
    for frames in [zstd_frames, raw_frames] {
        let pieces = frames.iter().map(|frame| namespace.read_frame(frame));
        assert!(pieces.flat_map(Result::unwrap).eq(a.iter().copied()));
    }
}

/// Found by the fuzz target `block_table`: the error of the page behind swallowed the zeroes.
#[test]
fn zeroes_before_a_damaged_page_are_told() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    // Two leaves of 128 blocks, of which the first is all zero.
    let table = writer
        .block_table(256 * u64::from(BLOCK), BLOCK, None)
        .unwrap();
    let bytes = data(1, 1);
    let entry = Entry::Placed {
        digest: Digest::of(&bytes),
        frame: put(&writer, &bytes),
        skip: 0,
    };
    table.set(128, entry).unwrap();
    let root = table.finish().unwrap();
    let id = writer.id();
    writer.commit(record(vec![volume(root)])).unwrap();

    // The leaf comes before the page that refers to it.
    flip(&fixture.path(&format!("backups/{id}/pages")), 0);
    let table = fixture.namespace().table(root);
    assert!(table.get(127).is_ok());
    let mut runs = table.entries(0..256).unwrap();
    let zeroes = runs.next().unwrap().unwrap();
    assert_eq!((zeroes.blocks, zeroes.content), (0..128, RunContent::Zero));
    assert!(matches!(runs.next(), Some(Err(Error::Damaged { .. }))));
    assert!(runs.next().is_none());
}

#[test]
fn damage_to_any_file_is_noticed() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let chunk = data(1, 4);
    let frame = put(&writer, &chunk);
    let name: ObjectName = "o".parse().unwrap();
    let mut object = writer.create(&name, Encoding::Zstd).unwrap();
    object.write(&chunk).unwrap();
    object.finish().unwrap();
    let table = writer.block_table(1 << 30, BLOCK, None).unwrap();
    let entry = Entry::Claimed {
        digest: Digest::of(b"b"),
        backup: writer.id(),
    };
    table.set(7, entry).unwrap();
    let root = table.finish().unwrap();
    let component = writer.keep_component(b"component").unwrap();
    let id = writer.id();
    let manifest = writer.commit(record(vec![volume(root)])).unwrap();
    let namespace = fixture.namespace();

    let backup = |below: &str| fixture.path(&format!("backups/{id}/{below}"));
    fn damaged<T>(result: Result<T, Error>) -> bool {
        matches!(result, Err(Error::Damaged { .. }))
    }
    let read_page = || namespace.table(root).get(7);
    let pages = backup("pages");
    for offset in [0, std::fs::metadata(&pages).unwrap().len() - 1] {
        assert!(read_page().is_ok());
        flip(&pages, offset);
        assert!(damaged(read_page()));
        flip(&pages, offset);
    }
    truncate(&pages);
    assert!(damaged(read_page()));

    let verify = || namespace.objects(&manifest).verify(&name);
    assert!(verify().is_ok());
    flip(&backup("objects/o"), 50);
    assert!(damaged(verify()));
    flip(&backup("objects/o"), 50);
    truncate(&backup("objects/o"));
    assert!(damaged(verify()));
    assert!(damaged(namespace.objects(&manifest).read(&name, 0, 1)));

    flip(&fixture.path(&format!("components/{component}.wasm")), 3);
    assert!(damaged(namespace.component(component)));
    let writer = fixture.begin();
    writer.keep_component(b"component").unwrap();
    writer.commit(record(vec![])).unwrap();
    assert_eq!(namespace.component(component).unwrap(), b"component");

    // Frames have no digest of their own: the blocks have.
    let intact = |decoded: Result<Vec<u8>, Error>| {
        decoded.is_ok_and(|bytes| digests(&bytes) == digests(&chunk))
    };
    assert!(intact(namespace.read_frame(&frame)));
    flip(&fixture.packs()[0], frame.offset() + 100);
    assert!(!intact(namespace.read_frame(&frame)));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&fixture.packs()[0])
        .unwrap();
    file.set_len(20).unwrap();
    assert!(damaged(namespace.read_frame(&frame)));

    flip(&backup("manifest.json"), 100);
    assert!(damaged(namespace.manifest(id)));
    // Copied to where it does not belong.
    flip(&backup("manifest.json"), 100);
    let other = fixture.begin();
    let other_id = other.id();
    std::fs::copy(
        backup("manifest.json"),
        fixture.path(&format!("backups/{other_id}/manifest.json")),
    )
    .unwrap();
    assert!(damaged(namespace.manifest(other_id)));
}

#[test]
fn many_threads_share_one_writer() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let table = writer.block_table(1 << 40, BLOCK, None).unwrap();
    let frames: Vec<BTreeMap<u64, Frame>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4u64)
            .map(|thread| {
                let (writer, table) = (&writer, &table);
                scope.spawn(move || {
                    let one = |n: u64| {
                        // Half of the chunks are put by all threads.
                        let seed = if n.is_multiple_of(2) {
                            n
                        } else {
                            n + 1000 * thread
                        };
                        let chunk = data(seed, 256);
                        let frame = put(writer, &chunk);
                        let entry = Entry::Placed {
                            digest: Digest::of(&chunk[..BLOCK as usize]),
                            frame: frame.clone(),
                            skip: 0,
                        };
                        table.set(n * 4096 + thread, entry).unwrap();
                        (seed, frame)
                    };
                    (0..100).map(one).collect()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let root = table.finish().unwrap();
    assert_eq!(writer.stats().chunks, 400);
    writer.commit(record(vec![volume(root)])).unwrap();
    let namespace = fixture.namespace();
    assert!(fixture.packs().len() >= 2);
    for path in fixture.packs() {
        let length = std::fs::metadata(path).unwrap().len();
        assert!(length < u64::from(super::pack::PACK_LIMIT) + (1 << 20));
    }
    let distinct: BTreeSet<_> = frames.iter().flatten().map(|(seed, _)| seed).collect();
    let mut places = BTreeMap::new();
    for (thread, frames) in (0..).zip(&frames) {
        for (seed, frame) in frames {
            assert!(namespace.read_frame(frame).unwrap() == data(*seed, 256));
            assert_eq!(*places.entry(seed).or_insert(frame), frame);
            let n = if *seed >= 1000 {
                seed - 1000 * thread
            } else {
                *seed
            };
            let entry = namespace.table(root).get(n * 4096 + thread).unwrap();
            assert!(matches!(entry, Entry::Placed { frame: found, .. } if found == *frame));
        }
    }
    assert_eq!(places.len(), distinct.len());
}

#[test]
fn a_sparse_tebibyte_costs_what_it_holds() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let size = 1 << 40;
    let table = writer.block_table(size, 65536, None).unwrap();
    let blocks = size / 65536;
    let claimed = |n: u64| Entry::Claimed {
        digest: Digest::of(&n.to_le_bytes()),
        backup: writer.id(),
    };
    table.set_zero(0..blocks).unwrap();
    assert_eq!(
        writer.table(table.finish().unwrap()).get(9).unwrap(),
        Entry::Zero
    );
    for n in [5, blocks / 2, blocks - 1] {
        table.set(n, claimed(n)).unwrap();
    }
    let root = table.finish().unwrap();
    let runs: Vec<_> = writer.table(root).entries(0..blocks).unwrap().collect();
    assert_eq!(runs.len(), 6, "three blocks and the zeroes before each");
    let id = writer.id();
    writer.commit(record(vec![volume(root)])).unwrap();

    let next = fixture.begin();
    let table = next.block_table(size, 65536, Some(root)).unwrap();
    table.set(5, claimed_by(&next, 1)).unwrap();
    table.set(blocks / 2, Entry::Zero).unwrap();
    let changed = table.finish().unwrap();
    let read = next.table(changed);
    assert_eq!(read.get(5).unwrap(), claimed_by(&next, 1));
    assert_eq!(read.get(blocks / 2).unwrap(), Entry::Zero);
    assert!(matches!(read.get(blocks - 1).unwrap(), Entry::Claimed { backup, .. } if backup == id));
    let pages = fixture.path(&format!("backups/{}/pages", next.id()));
    assert!(std::fs::metadata(&pages).unwrap().len() < 1000);

    // What is set to what it was adds nothing.
    let same = next.block_table(size, 65536, Some(changed)).unwrap();
    let length = std::fs::metadata(&pages).unwrap().len();
    same.set(5, claimed_by(&next, 1)).unwrap();
    assert_eq!(same.finish().unwrap(), changed);
    assert_eq!(std::fs::metadata(&pages).unwrap().len(), length);

    assert!(matches!(
        next.block_table(size + 1, 65536, Some(root)),
        Err(Error::BaseDiffers { .. })
    ));
    assert!(matches!(
        same.set(blocks, Entry::Zero),
        Err(Error::OutOfRange { .. })
    ));
    assert!(read.get(blocks).is_err() && read.entries(0..blocks + 1).is_err());
}

fn claimed_by(writer: &BackupWriter, n: u8) -> Entry {
    Entry::Claimed {
        digest: Digest::of(&[n]),
        backup: writer.id(),
    }
}

#[test]
fn a_block_beyond_its_frame_is_refused() {
    let fixture = Fixture::new();
    let writer = fixture.begin();
    let table = writer.block_table(5 * 4096 - 1, BLOCK, None).unwrap();
    let frame = put(&writer, &data(1, 2));
    let set = |block, skip| {
        let digest = Digest::of(b"");
        let frame = frame.clone();
        table.set(
            block,
            Entry::Placed {
                digest,
                frame,
                skip,
            },
        )
    };
    assert!(set(0, 4096).is_ok());
    assert!(matches!(set(0, 4097), Err(Error::OutsideFrame { .. })));
    assert!(matches!(set(0, u32::MAX), Err(Error::OutsideFrame { .. })));
    assert!(set(4, 4097).is_ok(), "the last block is a byte shorter");
}

/// What a test does to a block table.
#[derive(Clone, Debug)]
enum Step {
    Set(u64, Content),
    Zero(u64, u64),
    /// Ends a backup; the next builds on it.
    Commit,
    /// Writes everything out and goes on.
    Finish,
}

#[derive(Clone, Debug)]
enum Content {
    Zero,
    Placed(u8, u32),
    Claimed,
}

fn step(blocks: u64) -> impl Strategy<Value = Step> {
    let content = prop_oneof![
        Just(Content::Zero),
        (0u8..3, 0u32..4).prop_map(|(pack, at)| Content::Placed(pack, at)),
        Just(Content::Claimed),
    ];
    // Mostly close together, so that runs come about.
    let block = prop_oneof![0..blocks.min(40), 0..blocks];
    prop_oneof![
        12 => (block, content).prop_map(|(block, content)| Step::Set(block, content)),
        2 => (0..blocks, 0..blocks).prop_map(|(a, b)| Step::Zero(a.min(b), a.max(b) + 1)),
        1 => Just(Step::Commit),
        1 => Just(Step::Finish),
    ]
}

fn tables() -> impl Strategy<Value = (u64, Vec<Step>)> {
    let sizes = prop_oneof![
        1u64..5,
        100u64..300,
        128u64 * 70..128 * 130,
        Just(128 * 128 * 2 + 3)
    ];
    sizes.prop_flat_map(|blocks| (Just(blocks), prop::collection::vec(step(blocks), 0..250)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_table_over_bases_is_the_map_of_what_was_set((blocks, steps) in tables(), probe in any::<(prop::sample::Index, prop::sample::Index)>()) {
        let fixture = Fixture::new();
        let size = blocks * u64::from(BLOCK) - 7;
        let mut writer = fixture.begin();
        let mut table = writer.block_table(size, BLOCK, None).unwrap();
        let mut model = BTreeMap::new();
        for step in steps {
            match step {
                Step::Set(block, content) => {
                    let digest = Digest::of(&block.to_le_bytes());
                    let entry = match content {
                        Content::Zero => Entry::Zero,
                        Content::Claimed => Entry::Claimed { digest, backup: writer.id() },
                        Content::Placed(pack, at) => {
                            let object = ObjectRef::Pack(PackName::from_bytes([pack; 16]));
                            // A commit asks whether it is there.
                            std::fs::write(fixture.path(&object.to_string()), "").unwrap();
                            let frame = Frame::new(object, 9, 99, 4 * BLOCK, Encoding::Zstd).unwrap();
                            Entry::Placed { digest, frame, skip: (at + block as u32) % 4 * BLOCK }
                        }
                    };
                    table.set(block, entry.clone()).unwrap();
                    model.insert(block, entry);
                }
                Step::Zero(start, end) => {
                    table.set_zero(start..end).unwrap();
                    model.retain(|block, _| !(start..end).contains(block));
                }
                Step::Finish => drop(table.finish().unwrap()),
                Step::Commit => {
                    let root = table.finish().unwrap();
                    writer.commit(record(vec![volume(root)])).unwrap();
                    writer = fixture.begin();
                    table = writer.block_table(size, BLOCK, Some(root)).unwrap();
                }
            }
        }
        model.retain(|_, entry| *entry != Entry::Zero);
        let read = fixture.namespace().table(table.finish().unwrap());
        for (block, entry) in &model {
            prop_assert_eq!(&read.get(*block).unwrap(), entry);
        }
        let (a, b) = (probe.0.index(blocks as usize) as u64, probe.1.index(blocks as usize) as u64);
        for range in [0..blocks, a.min(b)..a.max(b)] {
            let runs: Vec<_> = read.entries(range.clone()).unwrap().map(Result::unwrap).collect();
            let mut at = range.start;
            let mut found = BTreeMap::new();
            for run in &runs {
                prop_assert!(run.blocks.start == at && !run.blocks.is_empty());
                at = run.blocks.end;
                if run.content != RunContent::Zero {
                    found.extend(run.blocks.clone().map(|block| (block, run.entry(block, BLOCK).unwrap())));
                }
            }
            prop_assert_eq!(at, range.end);
            prop_assert!(!runs.windows(2).any(|two| two.iter().all(|run| run.content == RunContent::Zero)));
            prop_assert_eq!(found, model.range(range).map(|(b, e)| (*b, e.clone())).collect());
        }
    }
}

#[test]
fn a_directory_of_several_parts_appears_whole_or_not_at_all() {
    let path = tempfile::tempdir().unwrap();
    let dir = Dir::open_ambient_dir(path.path(), ambient_authority()).unwrap();
    let names = || -> Vec<_> {
        let entries = dir.entries().unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    // One that fails leaves nothing, and what a killed one left goes with the next.
    dir.create_dir_all(".n.0123456789abcdef.tmp/packs").unwrap();
    let failing = |made: &Dir| {
        directory::make_dir(made, "packs").unwrap();
        assert!(!dir.exists("n"));
        Err(Error::NotEmpty)
    };
    assert!(directory::make_dir_once(&dir, "n", failing).is_err());
    assert_eq!(names(), [""; 0]);
    // The first of several wins.
    let first = |made: &Dir| {
        let second = |made: &Dir| {
            directory::make_dir(made, "second").unwrap();
            Ok(())
        };
        directory::make_dir_once(&dir, "n", second).unwrap();
        directory::make_dir(made, "first").unwrap();
        Ok(())
    };
    directory::make_dir_once(&dir, "n", first).unwrap();
    assert_eq!(names(), ["n"]);
    assert!(dir.exists("n/second") && !dir.exists("n/first"));
}

#[test]
fn an_archive_needs_no_hard_links_and_no_rename_that_replaces_nothing() {
    let make = || {
        let path = tempfile::tempdir().unwrap();
        let dir = || Dir::open_ambient_dir(path.path(), ambient_authority()).unwrap();
        let archive = Archive::create(dir()).unwrap();
        assert!(matches!(Archive::create(dir()), Err(Error::NotEmpty)));
        // The one that comes second, and has not seen the first, gets the first's.
        let again = directory::make_once(&dir(), ARCHIVE_FILE, b"{}", ARCHIVE_FILE_LIMIT).unwrap();
        assert_ne!(again, b"{}");
        let name = "n".parse().unwrap();
        let made = archive.create_namespace(&name).unwrap();
        let opened = Archive::open(dir()).unwrap().namespace(&name).unwrap();
        assert_eq!(made.store.key, opened.store.key);
    };
    make();
    crate::poor_file_system::on_one(make);
}
