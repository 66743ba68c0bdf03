//! From a range of a volume to the pieces that make it up.

use crate::archive::{BlockTable, Error, Run, RunContent};
use crate::extent::Extent;
use std::ops::Range;

/// One volume, by its block table.
pub struct Image {
    table: BlockTable,
}

/// A part of a range whose bytes come from one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Of the range; it lies within the blocks.
    pub extent: Extent,
    /// What the block table says of whole blocks, which is what digests are of.
    pub run: Run,
    /// Where these blocks lie.
    pub blocks: Extent,
}

/// Neighbouring bytes of which is known whether they are all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Which.
    pub extent: Extent,
    /// Whether they are zero, and nothing is stored for them.
    pub is_zero: bool,
}

impl Image {
    /// What `table` describes.
    pub fn new(table: BlockTable) -> Self {
        Self { table }
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.table.root().size()
    }

    /// In bytes.
    pub fn block_size(&self) -> u32 {
        self.table.root().block_size()
    }

    /// The pieces of a range that lies within the volume: without gaps, from its start to its end.
    ///
    /// # Errors
    /// Where the block table cannot be read.
    pub fn pieces(&self, extent: Extent) -> Result<Vec<Piece>, Error> {
        let runs = self.table.entries(self.blocks_around(extent))?;
        runs.map(|run| Ok(self.piece(extent, run?))).collect()
    }

    /// What is zero of a range that lies within the volume, from its start on: at least one part, and at most `most`;
    /// neighbours differ.
    ///
    /// # Errors
    /// Where the block table cannot be read.
    pub fn allocation(&self, extent: Extent, most: usize) -> Result<Vec<Allocation>, Error> {
        let mut parts: Vec<Allocation> = Vec::new();
        for run in self.table.entries(self.blocks_around(extent))? {
            let piece = self.piece(extent, run?);
            let is_zero = piece.run.content == RunContent::Zero;
            if let Some(last) = parts.last_mut().filter(|last| last.is_zero == is_zero) {
                let both = Extent::between(last.extent.start(), piece.extent.end());
                last.extent = both.unwrap_or(last.extent);
                continue;
            }
            if parts.len() == most {
                break;
            }
            parts.push(Allocation {
                extent: piece.extent,
                is_zero,
            });
        }
        Ok(parts)
    }

    /// The blocks that hold a range.
    fn blocks_around(&self, extent: Extent) -> Range<u64> {
        let block = u64::from(self.block_size());
        extent.start() / block..extent.end().div_ceil(block)
    }

    /// What a run among the blocks around a range is of it.
    fn piece(&self, extent: Extent, run: Run) -> Piece {
        let block = u64::from(self.block_size());
        let end = (run.blocks.end * block).min(self.size());
        let blocks = Extent::between(run.blocks.start * block, end).expect("a run is not empty");
        let extent = blocks.intersection(extent);
        Piece {
            extent: extent.expect("each block around a range holds a byte of it"),
            run,
            blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{Archive, BackupId, BackupWriter, Entry, Frame, ObjectRef};
    use crate::contract::Encoding;
    use crate::digest::Digest;
    use cap_std::ambient_authority;
    use cap_std::fs::Dir;
    use proptest::prelude::*;
    use tempfile::TempDir;
    use time::OffsetDateTime;

    const BLOCK: u64 = 4096;

    /// What a block is, in a model that has one entry for each.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Kind {
        Zero,
        /// In the frame of this number, four blocks each.
        Placed(u64),
        Claimed,
    }

    fn kind() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Zero),
            (0u64..3).prop_map(Kind::Placed),
            Just(Kind::Claimed)
        ]
    }

    /// With what holds its pages.
    fn image(size: u64, kinds: &[Kind]) -> (TempDir, BackupWriter, Image) {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        let archive = Archive::create(root).unwrap();
        let namespace = archive
            .create_namespace(&"tenant".parse().unwrap())
            .unwrap();
        let id = BackupId::random(OffsetDateTime::UNIX_EPOCH).unwrap();
        let writer = namespace.begin(id).unwrap();
        let table = writer.block_table(size, BLOCK as u32, None).unwrap();
        for (block, kind) in (0u64..).zip(kinds) {
            let digest = Digest::of(&block.to_le_bytes());
            let entry = match kind {
                Kind::Zero => Entry::Zero,
                Kind::Placed(number) => Entry::Placed {
                    digest,
                    frame: frame(id, *number),
                    skip: (block % 4 * BLOCK) as u32,
                },
                Kind::Claimed => Entry::Claimed { digest, backup: id },
            };
            table.set(block, entry).unwrap();
        }
        let image = Image::new(writer.table(table.finish().unwrap()));
        (folder, writer, image)
    }

    fn frame(backup: BackupId, number: u64) -> Frame {
        let object = ObjectRef::Object {
            backup,
            name: "object".parse().unwrap(),
        };
        let length = 4 * BLOCK as u32;
        Frame::new(object, number << 20, length, length, Encoding::Identity).unwrap()
    }

    /// A volume of some blocks, the last of which may be short, and a range within it.
    fn volume_and_range() -> impl Strategy<Value = (u64, Vec<Kind>, Extent)> {
        (prop::collection::vec(kind(), 1..40), 0u64..BLOCK / 512)
            .prop_flat_map(|(kinds, missing)| {
                let size = kinds.len() as u64 * BLOCK - missing * 512;
                (Just(size), Just(kinds), 0..size)
            })
            .prop_flat_map(|(size, kinds, start)| {
                let extent =
                    (start + 1..=size).prop_map(move |end| Extent::between(start, end).unwrap());
                (Just(size), Just(kinds), extent)
            })
    }

    fn is(run: &Run, kind: Kind) -> bool {
        match (&run.content, kind) {
            (RunContent::Zero, Kind::Zero) | (RunContent::Claimed { .. }, Kind::Claimed) => true,
            (RunContent::Placed { frame, .. }, Kind::Placed(number)) => {
                frame.offset() == number << 20
            }
            _ => false,
        }
    }

    proptest! {
        // Each makes an archive.
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_pieces_of_a_range_are_all_of_it_and_each_block_is_what_it_is((size, kinds, extent) in volume_and_range()) {
            let (_folder, _writer, image) = image(size, &kinds);
            let pieces = image.pieces(extent).unwrap();
            let mut at = extent.start();
            for piece in &pieces {
                prop_assert_eq!(piece.extent.start(), at);
                at = piece.extent.end();
                prop_assert!(piece.blocks.contains(piece.extent));
                prop_assert!(piece.blocks.end() <= size);
                prop_assert_eq!(piece.blocks.start(), piece.run.blocks.start * BLOCK);
                for block in piece.run.blocks.clone() {
                    prop_assert!(is(&piece.run, kinds[block as usize]), "{} {:?}", block, &piece.run);
                }
                // Where a piece begins in its frame is where its first block does.
                if let RunContent::Placed { skip, digests, .. } = &piece.run.content {
                    prop_assert_eq!(u64::from(*skip), piece.run.blocks.start % 4 * BLOCK);
                    let expected = piece.run.blocks.clone().map(|block| Digest::of(&block.to_le_bytes()));
                    prop_assert_eq!(digests, &expected.collect::<Vec<_>>());
                }
            }
            prop_assert_eq!(at, extent.end());
        }

        #[test]
        fn what_is_zero_is_told_byte_by_byte_and_in_no_more_parts_than_asked(
            (size, kinds, extent) in volume_and_range(),
            most in 1usize..6,
        ) {
            let (_folder, _writer, image) = image(size, &kinds);
            let parts = image.allocation(extent, most).unwrap();
            prop_assert!(!parts.is_empty() && parts.len() <= most);
            let mut at = extent.start();
            for part in &parts {
                prop_assert_eq!(part.extent.start(), at);
                at = part.extent.end();
                for block in part.extent.start() / BLOCK..part.extent.end().div_ceil(BLOCK) {
                    prop_assert_eq!(part.is_zero, kinds[block as usize] == Kind::Zero);
                }
            }
            prop_assert!(at == extent.end() || parts.len() == most && at < extent.end());
            prop_assert!(parts.windows(2).all(|two| two[0].is_zero != two[1].is_zero));
        }
    }
}
