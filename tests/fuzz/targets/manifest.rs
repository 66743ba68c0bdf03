//! A manifest that somebody wrote into the archive, with the right digest, as anybody can make one.
//!
//! What must hold: no panic; what is accepted is of this archive and this backup; and what it refers to can be asked for.

#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use fleecebox::archive::{BackupId, TableRoot};
use fleecebox_fuzz::json;
use fleecebox_fuzz::scratch::{BACKUP, Scratch};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// Keys, and texts that decide something.
const WORDS: &[&str] = &[
    "format",
    "archive",
    "namespace",
    "backup",
    "objects",
    "stats",
    "record",
    "digest",
    "vm",
    "created",
    "provider",
    "host_version",
    "volumes",
    "attachments",
    "name",
    "component",
    "world",
    "settings",
    "disk",
    "identity",
    "mode",
    "base",
    "fallback",
    "bitmap",
    "root",
    "receipt",
    "dirty_bytes",
    "zero_bytes",
    "placed_bytes",
    "claimed_bytes",
    "proof",
    "shape",
    "page",
    "size",
    "block_size",
    "offset",
    "length",
    "encoding",
    "stored",
    "written",
    "zstd",
    "identity",
    "reuse",
    "provider",
    "blind-provider",
    "proven",
    "unproven",
    "object",
    "00ff",
    BACKUP,
    "1970-01-01T00:00:00Z",
    "ns",
    "x",
    "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
];

#[derive(Debug)]
enum Case {
    /// As the file is.
    Bytes(Vec<u8>),
    /// A sound manifest with other values here and there.
    Edits(Vec<(Vec<u8>, Value)>),
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        if u.ratio(1, 8)? {
            return Ok(Self::Bytes(u.arbitrary()?));
        }
        let edits = (0..u.int_in_range(1..=4)?)
            .map(|_| Ok((u.arbitrary()?, json::value(u, WORDS)?)))
            .collect::<Result<_>>()?;
        Ok(Self::Edits(edits))
    }
}

static SCRATCH: LazyLock<(Scratch, Value)> = LazyLock::new(|| {
    let scratch = Scratch::new();
    scratch.make_backup();
    let root: TableRoot = serde_json::from_value(json!({
        "shape": { "size": 1 << 30, "block_size": 65536 },
        "page": { "backup": BACKUP, "offset": 0, "length": 10, "digest": "00".repeat(32) },
    }))
    .expect("it is a root");
    let mut sound = serde_json::to_value(scratch.manifest(root)).expect("a manifest is JSON");
    sound["objects"] = json!([{
        "name": "x", "encoding": "zstd", "size": 10, "stored": 20, "digest": "00".repeat(32),
        "written": [[0, 10]],
    }]);
    scratch.write(&format!("backups/{BACKUP}/pages"), &[0; 64]);
    scratch.write(&format!("backups/{BACKUP}/objects/x"), &[0; 64]);
    (scratch, sound)
});

fuzz_target!(|case: Case| {
    let (scratch, sound) = &*SCRATCH;
    let bytes = match case {
        Case::Bytes(bytes) => bytes,
        Case::Edits(edits) => {
            let mut value = sound.clone();
            for (path, edit) in edits {
                *at(&mut value, &path) = edit;
            }
            sign(&mut value);
            value.to_string().into_bytes()
        }
    };
    scratch.write(&format!("backups/{BACKUP}/manifest.json"), &bytes);
    let id: BackupId = BACKUP.parse().expect("it is an id");
    let Ok(manifest) = scratch.namespace.manifest(id) else {
        return;
    };
    assert_eq!(manifest.backup, id);
    assert_eq!(manifest.archive, scratch.namespace.archive());
    let objects = scratch.namespace.objects(&manifest);
    for object in &manifest.objects {
        for run in object.written.iter().take(4) {
            let _ = objects.read(&object.name, run.start(), run.len().min(4096) as u32);
        }
        let _ = objects.verify(&object.name);
    }
    for volume in &manifest.record.volumes {
        let table = scratch.namespace.table(volume.root);
        let blocks = volume.root.blocks();
        for block in [0, blocks / 2, blocks.saturating_sub(1), blocks, u64::MAX] {
            let _ = table.get(block);
            volume.root.block_length(block);
        }
        if let Ok(runs) = table.entries(0..blocks) {
            runs.take(4).for_each(drop);
        }
    }
});

/// The place that a path leads to: each step chooses among the values of an object or array.
fn at<'v>(value: &'v mut Value, path: &[u8]) -> &'v mut Value {
    let mut place = value;
    for &step in path.iter().take(6) {
        let step = usize::from(step);
        let deeper = match place {
            Value::Object(fields) if !fields.is_empty() => step % fields.len(),
            Value::Array(items) if !items.is_empty() => step % items.len(),
            _ => break,
        };
        place = match place {
            Value::Object(fields) => fields.values_mut().nth(deeper).expect("it is in range"),
            Value::Array(items) => &mut items[deeper],
            _ => break,
        };
    }
    place
}

/// As the archive does: the digest of the compact JSON with sorted keys, without the digest.
fn sign(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.remove("digest");
    }
    let digest = blake3::hash(value.to_string().as_bytes())
        .to_hex()
        .to_string();
    if let Value::Object(fields) = value {
        fields.insert("digest".into(), digest.into());
    }
}
