//! The pages of a block table that somebody wrote into the archive, with the right digests.
//!
//! What must hold: no panic; what the table says of a range is what it says of each block of it; and a frame that it
//! names is long enough for its blocks.

#![no_main]

use arbitrary::Arbitrary;
use fleecebox::archive::{BlockTable, Entry, RunContent, TableRoot};
use fleecebox_fuzz::scratch::{BACKUP, Scratch};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde_json::json;
use std::sync::LazyLock;

#[derive(Debug, Arbitrary)]
struct Case {
    size: u64,
    block_size: u8,
    pages: Vec<Page>,
    blocks: Vec<u64>,
}

/// In the order of the file; an inner page may refer to pages before it.
#[derive(Debug, Arbitrary)]
enum Page {
    Bytes(Vec<u8>),
    Leaf {
        objects: Vec<Object>,
        runs: Vec<Run>,
    },
    Inner {
        level: u8,
        children: Vec<(u8, u8, Option<u32>)>,
    },
}

#[derive(Debug, Arbitrary)]
enum Object {
    Pack,
    Named,
}

#[derive(Debug, Arbitrary)]
enum Run {
    Zero(u32),
    Whole,
    Placed {
        object: u8,
        offset: u64,
        stored: u32,
        decoded: u32,
        zstd: bool,
        skip: u32,
        count: u8,
    },
    Claimed(u8),
}

// The product's pages, as postcard writes them.
#[derive(Serialize)]
enum WirePage {
    Leaf {
        objects: Vec<WireObject>,
        runs: Vec<WireRun>,
    },
    Inner {
        level: u32,
        backups: Vec<(u64, u64)>,
        children: Vec<(u8, u8, u64, u32, [u8; 32])>,
    },
}

#[derive(Serialize)]
enum WireObject {
    Pack([u8; 16]),
    Object((u64, u64), &'static str),
}

#[derive(Serialize)]
enum WireRun {
    Zero(u32),
    Placed(u32, u64, u32, u32, u32, u32, Vec<[u8; 32]>),
    Claimed((u64, u64), Vec<[u8; 32]>),
}

/// [`BACKUP`] in binary form: its seconds and its random half.
const ID: (u64, u64) = (1_795_393_800, 0x0123_4567_89ab_cdef);

static SCRATCH: LazyLock<Scratch> = LazyLock::new(|| {
    let scratch = Scratch::new();
    scratch.make_backup();
    scratch
});

/// Blocks of a table that are compared one by one.
const COMPARED: u64 = 512;

fuzz_target!(|case: Case| {
    let mut file = Vec::new();
    let mut places: Vec<(u64, u32, [u8; 32])> = Vec::new();
    for page in case.pages.iter().take(16) {
        let bytes = page.render(&places);
        places.push((
            file.len() as u64,
            bytes.len() as u32,
            *blake3::hash(&bytes).as_bytes(),
        ));
        file.extend(bytes);
    }
    SCRATCH.write(&format!("backups/{BACKUP}/pages"), &file);
    let page = places.last().map(|(offset, length, digest)| {
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({ "backup": BACKUP, "offset": offset, "length": length, "digest": digest })
    });
    let root: TableRoot = serde_json::from_value(json!({
        "shape": { "size": case.size, "block_size": 4096u32 << (case.block_size % 9) },
        "page": page,
    }))
    .expect("it is a root");
    let table = SCRATCH.namespace.table(root);
    let blocks = root.blocks();
    for &block in &case.blocks {
        let block = block % blocks.saturating_add(2);
        assert!(block < blocks || table.get(block).is_err());
        compare(&table, block..block.saturating_add(COMPARED).min(blocks));
    }
    compare(&table, 0..COMPARED.min(blocks));
});

fn compare(table: &BlockTable, blocks: std::ops::Range<u64>) {
    if blocks.is_empty() {
        return;
    }
    let runs = table
        .entries(blocks.clone())
        .expect("the range is inside the volume");
    let block_size = table.root().block_size();
    let mut at = blocks.start;
    for run in runs {
        let Ok(run) = run else {
            // The bytes are the same as before, so the block itself cannot be told either.
            assert!(table.get(at).is_err());
            return;
        };
        assert_eq!(run.blocks.start, at);
        assert!(run.blocks.end > at && run.blocks.end <= blocks.end);
        if let RunContent::Placed {
            frame,
            skip,
            digests,
        } = &run.content
        {
            assert_eq!(digests.len() as u64, run.blocks.end - run.blocks.start);
            let length: u64 = run
                .blocks
                .clone()
                .map(|block| u64::from(table.root().block_length(block)))
                .sum();
            assert!(u64::from(*skip) + length <= u64::from(frame.decoded()));
        }
        for block in run.blocks.clone() {
            let one = run
                .entry(block, block_size)
                .expect("the block is in its run");
            // A page that cannot be read may lie behind a run that was told as zero before it: none does.
            assert_eq!(table.get(block).expect("the range could be told"), one);
            if let Entry::Placed { frame, .. } = one {
                let _ = SCRATCH.namespace.read_frame(&frame);
            }
        }
        at = run.blocks.end;
    }
    assert_eq!(at, blocks.end);
}

impl Page {
    fn render(&self, before: &[(u64, u32, [u8; 32])]) -> Vec<u8> {
        let page = match self {
            Self::Bytes(bytes) => return bytes.clone(),
            Self::Leaf { objects, runs } => WirePage::Leaf {
                objects: objects
                    .iter()
                    .map(|object| match object {
                        Object::Pack => WireObject::Pack([7; 16]),
                        Object::Named => WireObject::Object(ID, "x"),
                    })
                    .collect(),
                runs: runs.iter().map(Run::wire).collect(),
            },
            Self::Inner { level, children } => WirePage::Inner {
                level: u32::from(*level % 8),
                backups: vec![ID],
                children: children
                    .iter()
                    .filter_map(|&(slot, page, length)| {
                        let &(offset, own, digest) =
                            before.get(usize::from(page) % before.len().max(1))?;
                        Some((slot, 0, offset, length.unwrap_or(own), digest))
                    })
                    .collect(),
            },
        };
        postcard::to_stdvec(&page).expect("a page can be written")
    }
}

impl Run {
    fn wire(&self) -> WireRun {
        match self {
            Self::Zero(count) => WireRun::Zero(*count),
            Self::Whole => WireRun::Zero(128),
            Self::Claimed(count) => WireRun::Claimed(ID, vec![[1; 32]; (*count).into()]),
            Self::Placed {
                object,
                offset,
                stored,
                decoded,
                zstd,
                skip,
                count,
            } => {
                let decoded = if *zstd { *decoded } else { *stored };
                let digests = vec![[2; 32]; (*count).into()];
                let encoding = u32::from(*zstd);
                WireRun::Placed(
                    (*object).into(),
                    *offset,
                    *stored,
                    decoded,
                    encoding,
                    *skip,
                    digests,
                )
            }
        }
    }
}
