//! The two kinds of page and their bytes.
//!
//! A page is read only after its digest matched. It is still parsed with suspicion: digests of pages are not
//! keyed, and an archive may lie where others can write.

use super::super::error::{Damage, Error};
use super::super::frame::{Frame, ObjectRef};
use super::super::name::BackupId;
use super::{Entry, FAN_OUT, PageRef, Run, RunContent, Shape};
use fleecebox_contract::digest::Digest;
use fleecebox_contract::{Encoding, with_causes};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Longest page, in bytes. The largest that can be written is a leaf of [`FAN_OUT`] blocks, each in an object of its
/// own with a name of the greatest length: 128 × (160 for the object + 32 for the digest + 32 for the place).
pub(super) const PAGE_LIMIT: u32 = 64 << 10;

/// Blocks as runs, in ascending order without gaps.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    runs: Vec<Run>,
}

/// References to the pages below; none where all is zero.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(super) struct Inner {
    pub(super) children: [Option<PageRef>; FAN_OUT as usize],
}

impl Leaf {
    /// `entries` are those of the blocks from `first` on.
    pub(super) fn of(first: u64, entries: &[Entry], shape: Shape) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for (block, entry) in (first..).zip(entries) {
            let extended = runs.last_mut().is_some_and(|run| run.extend(entry, shape));
            if !extended {
                runs.push(Run::of(block, entry));
            }
        }
        Self { runs }
    }

    /// One per block.
    pub(super) fn entries(&self, block_size: u32) -> Vec<Entry> {
        let one_by_one = |run: &'_ Run| -> Vec<Entry> {
            let blocks = run.blocks.clone();
            blocks
                .filter_map(|block| run.entry(block, block_size))
                .collect()
        };
        self.runs.iter().flat_map(one_by_one).collect()
    }

    /// In ascending order, without gaps.
    pub(super) fn all(&self) -> &[Run] {
        &self.runs
    }

    /// The run that holds a block.
    pub(super) fn run(&self, block: u64) -> Option<&Run> {
        let at = self.runs.partition_point(|run| run.blocks.end <= block);
        self.runs.get(at).filter(|run| run.blocks.contains(&block))
    }

    /// Whether it was parsed for these blocks: a page of the same bytes may stand in several places.
    pub(super) fn covers(&self, blocks: &Range<u64>) -> bool {
        let first = self.runs.first().map(|run| run.blocks.start);
        let end = self.runs.last().map(|run| run.blocks.end);
        (first, end) == (Some(blocks.start), Some(blocks.end))
    }

    pub(super) fn is_zero(&self) -> bool {
        self.runs.iter().all(|run| run.content == RunContent::Zero)
    }

    pub(super) fn render(&self) -> Result<Vec<u8>, Error> {
        let mut objects = Vec::<ObjectRef>::new();
        let mut runs = Vec::with_capacity(self.runs.len());
        for run in &self.runs {
            runs.push(match &run.content {
                RunContent::Zero => WireRun::Zero((run.blocks.end - run.blocks.start) as u32),
                RunContent::Claimed { backup, digests } => {
                    WireRun::Claimed(*backup, digests.clone())
                }
                RunContent::Placed {
                    frame,
                    skip,
                    digests,
                } => {
                    let known = objects.iter().position(|object| object == frame.object());
                    let object = known.unwrap_or_else(|| {
                        objects.push(frame.object().clone());
                        objects.len() - 1
                    });
                    WireRun::Placed {
                        object: object as u32,
                        offset: frame.offset(),
                        stored: frame.stored(),
                        decoded: frame.decoded(),
                        encoding: frame.encoding(),
                        skip: *skip,
                        digests: digests.clone(),
                    }
                }
            });
        }
        render(&WirePage::Leaf { objects, runs })
    }

    /// A leaf for exactly these blocks.
    pub(super) fn parse(bytes: &[u8], blocks: Range<u64>, shape: Shape) -> Result<Self, Damage> {
        let WirePage::Leaf { objects, runs } = parse(bytes)? else {
            return Err(Damage::Malformed("an inner page in place of a leaf"));
        };
        let mut parsed = Vec::with_capacity(runs.len());
        let mut at = blocks.start;
        for run in runs {
            let run = run.parse(at, &objects, shape)?;
            at = run.blocks.end;
            parsed.push(run);
            if at > blocks.end {
                break;
            }
        }
        if at != blocks.end {
            return Err(Damage::Malformed("a leaf of another number of blocks"));
        }
        Ok(Self { runs: parsed })
    }
}

impl Inner {
    pub(super) fn empty() -> Self {
        Self {
            children: [None; FAN_OUT as usize],
        }
    }

    pub(super) fn is_zero(&self) -> bool {
        self.children.iter().all(Option::is_none)
    }

    pub(super) fn render(&self, level: u32) -> Result<Vec<u8>, Error> {
        let mut backups = Vec::new();
        let mut children = Vec::new();
        for (slot, child) in (0u8..).zip(&self.children) {
            let Some(child) = child else { continue };
            let known = backups.iter().position(|backup| *backup == child.backup);
            let backup = known.unwrap_or_else(|| {
                backups.push(child.backup);
                backups.len() - 1
            });
            children.push(WireChild {
                slot,
                backup: backup as u8,
                offset: child.offset,
                length: child.length,
                digest: child.digest,
            });
        }
        render(&WirePage::Inner {
            level,
            backups,
            children,
        })
    }

    /// An inner page of exactly this level.
    pub(super) fn parse(bytes: &[u8], expected: u32) -> Result<Self, Damage> {
        let malformed = Damage::Malformed("not an inner page of its level");
        match parse(bytes)? {
            WirePage::Inner {
                level,
                backups,
                children,
            } if level == expected => {
                let mut inner = Self::empty();
                for child in children {
                    let slot = inner.children.get_mut(usize::from(child.slot));
                    let backup = backups.get(usize::from(child.backup));
                    let (Some(slot), Some(&backup)) = (slot, backup) else {
                        return Err(malformed);
                    };
                    *slot = Some(PageRef {
                        backup,
                        offset: child.offset,
                        length: child.length,
                        digest: child.digest,
                    });
                }
                Ok(inner)
            }
            _ => Err(malformed),
        }
    }
}

impl Run {
    fn of(block: u64, entry: &Entry) -> Self {
        let content = match entry {
            Entry::Zero => RunContent::Zero,
            Entry::Placed {
                digest,
                frame,
                skip,
            } => RunContent::Placed {
                frame: frame.clone(),
                skip: *skip,
                digests: vec![*digest],
            },
            Entry::Claimed { digest, backup } => RunContent::Claimed {
                backup: *backup,
                digests: vec![*digest],
            },
        };
        Self {
            blocks: block..block + 1,
            content,
        }
    }

    /// Takes in the entry of the next block, where the same rule describes it.
    fn extend(&mut self, entry: &Entry, shape: Shape) -> bool {
        let length = shape.length(self.blocks.clone());
        match (&mut self.content, entry) {
            (RunContent::Zero, Entry::Zero) => {}
            (
                RunContent::Placed {
                    frame: own,
                    skip: first,
                    digests,
                },
                Entry::Placed {
                    digest,
                    frame,
                    skip,
                },
            ) if own == frame && u64::from(*first) + length == u64::from(*skip) => {
                digests.push(*digest);
            }
            (
                RunContent::Claimed {
                    backup: own,
                    digests,
                },
                Entry::Claimed { digest, backup },
            ) if own == backup => {
                digests.push(*digest);
            }
            _ => return false,
        }
        self.blocks.end += 1;
        true
    }

    /// The part of the run within `blocks`, where there is one.
    pub(super) fn clipped(&self, blocks: &Range<u64>, block_size: u32) -> Option<Self> {
        let start = self.blocks.start.max(blocks.start);
        let end = self.blocks.end.min(blocks.end);
        if start >= end {
            return None;
        }
        // A run with digests is at most a leaf long.
        let cut = (start - self.blocks.start) as usize..(end - self.blocks.start) as usize;
        let content = match &self.content {
            RunContent::Zero => RunContent::Zero,
            RunContent::Placed {
                frame,
                skip,
                digests,
            } => RunContent::Placed {
                frame: frame.clone(),
                // Only a volume's last block is short, and nothing follows it.
                skip: skip + cut.start as u32 * block_size,
                digests: digests.get(cut)?.to_vec(),
            },
            RunContent::Claimed { backup, digests } => RunContent::Claimed {
                backup: *backup,
                digests: digests.get(cut)?.to_vec(),
            },
        };
        Some(Self {
            blocks: start..end,
            content,
        })
    }

    /// The entry of one block of the run, in a table of this block size.
    pub fn entry(&self, block: u64, block_size: u32) -> Option<Entry> {
        let one = self.clipped(&(block..block.checked_add(1)?), block_size)?;
        Some(match one.content {
            RunContent::Zero => Entry::Zero,
            RunContent::Placed {
                frame,
                skip,
                digests,
            } => Entry::Placed {
                digest: *digests.first()?,
                frame,
                skip,
            },
            RunContent::Claimed { backup, digests } => Entry::Claimed {
                digest: *digests.first()?,
                backup,
            },
        })
    }
}

#[derive(Serialize, Deserialize)]
enum WirePage {
    Leaf {
        /// Runs name them by their number here: a name is long and seldom alone.
        objects: Vec<ObjectRef>,
        runs: Vec<WireRun>,
    },
    Inner {
        level: u32,
        /// Children name them by their number here.
        backups: Vec<BackupId>,
        children: Vec<WireChild>,
    },
}

#[derive(Serialize, Deserialize)]
enum WireRun {
    Zero(u32),
    Placed {
        object: u32,
        offset: u64,
        stored: u32,
        decoded: u32,
        encoding: Encoding,
        skip: u32,
        digests: Vec<Digest>,
    },
    Claimed(BackupId, Vec<Digest>),
}

#[derive(Serialize, Deserialize)]
struct WireChild {
    slot: u8,
    backup: u8,
    offset: u64,
    length: u32,
    digest: Digest,
}

impl WireRun {
    fn parse(self, start: u64, objects: &[ObjectRef], shape: Shape) -> Result<Run, Damage> {
        let malformed = Damage::Malformed("a leaf with an impossible run");
        let (count, content) = match self {
            Self::Zero(count) => (count as usize, RunContent::Zero),
            Self::Claimed(backup, digests) => {
                (digests.len(), RunContent::Claimed { backup, digests })
            }
            Self::Placed {
                object,
                offset,
                stored,
                decoded,
                encoding,
                skip,
                digests,
            } => {
                let object = objects.get(object as usize).ok_or(malformed.clone())?;
                let frame = Frame::new(object.clone(), offset, stored, decoded, encoding)
                    .map_err(|_| malformed.clone())?;
                let content = RunContent::Placed {
                    frame,
                    skip,
                    digests,
                };
                (content.digests(), content)
            }
        };
        let end = start.saturating_add(count as u64);
        let blocks = start..end;
        let fits = match &content {
            RunContent::Placed { frame, skip, .. } => {
                u64::from(*skip) + shape.length(blocks.clone()) <= u64::from(frame.decoded())
            }
            _ => true,
        };
        if blocks.is_empty() || count as u64 > FAN_OUT || !fits {
            return Err(malformed);
        }
        Ok(Run { blocks, content })
    }
}

impl RunContent {
    fn digests(&self) -> usize {
        match self {
            Self::Zero => 0,
            Self::Placed { digests, .. } | Self::Claimed { digests, .. } => digests.len(),
        }
    }
}

fn render(page: &WirePage) -> Result<Vec<u8>, Error> {
    postcard::to_stdvec(page).map_err(|error| Error::Serialise(with_causes(&error)))
}

fn parse(bytes: &[u8]) -> Result<WirePage, Damage> {
    match postcard::take_from_bytes(bytes) {
        Ok((page, [])) => Ok(page),
        _ => Err(Damage::Malformed("not a page of a block table")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::name::PackName;
    use super::*;
    use proptest::prelude::*;

    fn shape() -> Shape {
        Shape::new(100 * 4096 - 5, 4096).unwrap()
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let digest = any::<u8>().prop_map(|n| Digest::of(&[n]));
        prop_oneof![
            Just(Entry::Zero),
            (digest.clone(), 0u8..2, 0u32..4).prop_map(|(digest, pack, block)| Entry::Placed {
                digest,
                frame: Frame::new(
                    ObjectRef::Pack(PackName::from_bytes([pack; 16])),
                    7,
                    1000,
                    4 * 4096,
                    Encoding::Zstd
                )
                .unwrap(),
                skip: block * 4096,
            }),
            digest.prop_map(|digest| Entry::Claimed {
                digest,
                backup: "20261123T003000Z-0123456789abcdef".parse().unwrap(),
            }),
        ]
    }

    #[test]
    fn the_largest_possible_leaf_is_within_the_limit() {
        let entries: Vec<_> = (0..FAN_OUT)
            .map(|n| Entry::Placed {
                digest: Digest::of(&[1]),
                frame: Frame::new(
                    ObjectRef::Object {
                        backup: "99991231T235959Z-ffffffffffffffff".parse().unwrap(),
                        name: format!("{n:0>128}").parse().unwrap(),
                    },
                    u64::MAX - (1 << 24),
                    1 << 20,
                    1 << 20,
                    Encoding::Identity,
                )
                .unwrap(),
                skip: 1 << 19,
            })
            .collect();
        let shape = Shape::new(FAN_OUT * 4096, 4096).unwrap();
        let bytes = Leaf::of(0, &entries, shape).render().unwrap();
        assert!(bytes.len() <= PAGE_LIMIT as usize, "{}", bytes.len());
    }

    proptest! {
        #[test]
        fn a_leaf_parses_to_its_entries(entries in prop::collection::vec(entry(), 100)) {
            let leaf = Leaf::of(0, &entries, shape());
            let bytes = leaf.render().unwrap();
            let parsed = Leaf::parse(&bytes, 0..100, shape()).unwrap();
            prop_assert_eq!(&parsed, &leaf);
            prop_assert_eq!(parsed.entries(4096), entries.clone());
            for (block, entry) in (0..).zip(entries) {
                prop_assert_eq!(parsed.run(block).unwrap().entry(block, 4096), Some(entry));
            }
            prop_assert!(Leaf::parse(&bytes, 0..99, shape()).is_err());
            prop_assert!(Inner::parse(&bytes, 1).is_err());
        }

        #[test]
        fn damaged_pages_are_refused_or_hold_their_blocks(entries in prop::collection::vec(entry(), 100), at in any::<prop::sample::Index>(), flip in 1u8.., noise in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = Leaf::of(0, &entries, shape()).render().unwrap();
            let index = at.index(bytes.len());
            bytes[index] ^= flip;
            for bytes in [bytes, noise] {
                let _ = Inner::parse(&bytes, 1);
                if let Ok(leaf) = Leaf::parse(&bytes, 0..100, shape()) {
                    prop_assert_eq!(leaf.entries(4096).len(), 100);
                }
            }
        }

        #[test]
        fn an_inner_page_parses_to_its_children(slots in prop::collection::btree_map(0usize..128, (any::<u64>(), any::<u32>(), 0u64..3), 0..128)) {
            let mut inner = Inner::empty();
            for (slot, (offset, length, random)) in slots {
                let backup = format!("20261123T003000Z-{random:016x}").parse().unwrap();
                inner.children[slot] = Some(PageRef { backup, offset, length, digest: Digest::of(&[slot as u8]) });
            }
            let bytes = inner.render(3).unwrap();
            prop_assert!(bytes.len() <= PAGE_LIMIT as usize);
            prop_assert_eq!(Inner::parse(&bytes, 3).unwrap(), inner);
            prop_assert!(Inner::parse(&bytes, 2).is_err());
        }
    }
}
