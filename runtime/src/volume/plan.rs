//! What one backup has to cover: dirty ranges grown to whole blocks, and which of them read as zeroes.

use crate::extent::{Extent, ExtentSet};

/// The whole blocks of a volume that a backup covers, and those among them that are zero.
///
/// Both sets are made of whole blocks (the volume's short last block counts as whole), and the zero blocks are a
/// subset of the dirty ones. Growing happens here, before anything is trimmed, so that no trim can reach into a
/// block that is still to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    size: u64,
    block: u32,
    dirty: ExtentSet,
    zero: ExtentSet,
}

impl Plan {
    /// `dirty` and `zero` are ranges as QEMU reports them, in any order and of any alignment; what lies past
    /// `size` is ignored. `block` is a power of two.
    pub fn new(
        size: u64,
        block: u32,
        dirty: impl IntoIterator<Item = Extent>,
        zero: impl IntoIterator<Item = Extent>,
    ) -> Self {
        debug_assert!(block.is_power_of_two());
        let inside = |extent: Extent| extent.intersection(Extent::new(0, size).ok()?);
        let dirty: ExtentSet = dirty
            .into_iter()
            .filter_map(inside)
            .map(|extent| extent.grown_to_blocks(block, size))
            .collect();
        // Joined before shrinking: a zero block may be reported in two halves.
        let zero_bytes: ExtentSet = zero.into_iter().filter_map(inside).collect();
        let zero = zero_bytes
            .iter()
            .filter_map(|extent| extent.shrunk_to_blocks(block, size))
            .flat_map(|extent| dirty.within(extent).collect::<Vec<_>>())
            .collect();
        Self {
            size,
            block,
            dirty,
            zero,
        }
    }

    /// Takes a whole block out that turned out not to have changed.
    pub fn leave(&mut self, block: Extent) {
        self.dirty.remove(block);
        self.zero.remove(block);
    }

    /// Of the volume, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// In bytes, a power of two.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// What the backup covers.
    pub fn dirty(&self) -> &ExtentSet {
        &self.dirty
    }

    /// The part of [`Plan::dirty`] that reads as zeroes.
    pub fn zero(&self) -> &ExtentSet {
        &self.zero
    }

    /// What did not change since the base, in ascending order.
    pub fn clean(&self) -> impl Iterator<Item = Extent> + '_ {
        Extent::new(0, self.size)
            .into_iter()
            .flat_map(|all| self.dirty.gaps(all))
    }

    /// Bytes that have to be read: dirty and not zero.
    pub fn data_bytes(&self) -> u64 {
        self.dirty.bytes() - self.zero.bytes()
    }

    /// Checks a range that a provider passed: a range of whole blocks of this volume.
    pub fn whole_blocks(&self, offset: u64, length: u64) -> Option<Extent> {
        Extent::new(offset, length).ok().filter(|extent| {
            extent.end() <= self.size && extent.is_whole_blocks(self.block, self.size)
        })
    }
}

/// A position in a [`Plan`]: hands out its regions once, in ascending order.
#[derive(Debug, Default)]
pub struct Cursor {
    at: u64,
}

/// A dirty range that is all data or all zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Whole blocks.
    pub extent: Extent,
    /// Whether it reads as zeroes.
    pub zero: bool,
}

impl Cursor {
    /// The next regions, at most `limit`; none at the end.
    pub fn next(&mut self, plan: &Plan, limit: usize) -> Vec<Region> {
        let mut regions = Vec::new();
        while regions.len() < limit
            && let Some(region) = self.step(plan)
        {
            self.at = region.extent.end();
            regions.push(region);
        }
        regions
    }

    fn step(&self, plan: &Plan) -> Option<Region> {
        let dirty = plan
            .dirty
            .within(Extent::between(self.at, plan.size)?)
            .next()?;
        let zero = plan.zero.within(dirty).next();
        Some(match zero {
            Some(zero) if zero.start() == dirty.start() => Region {
                extent: zero,
                zero: true,
            },
            _ => Region {
                extent: Extent::between(dirty.start(), zero.map_or(dirty.end(), Extent::start))?,
                zero: false,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u32 = 16;

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0u64..600, 1u64..90), 0..12).prop_map(|all| {
            all.into_iter()
                .map(|(o, l)| Extent::new(o, l).unwrap())
                .collect()
        })
    }

    fn covers(extents: &[Extent], byte: u64) -> bool {
        extents.iter().any(|e| e.start() <= byte && byte < e.end())
    }

    proptest! {
        #[test]
        fn every_dirty_byte_is_covered_and_only_true_zeroes_are_zero(size in 1u64..550, dirty in extents(), zero in extents()) {
            let plan = Plan::new(size, BLOCK, dirty.clone(), zero.clone());
            for block in 0..size.div_ceil(u64::from(BLOCK)) {
                let start = block * u64::from(BLOCK);
                let end = (start + u64::from(BLOCK)).min(size);
                let extent = Extent::between(start, end).unwrap();
                let is_dirty = (start..end).any(|b| covers(&dirty, b));
                let is_zero = (start..end).all(|b| covers(&zero, b));
                prop_assert_eq!(plan.dirty().contains(extent), is_dirty);
                prop_assert_eq!(plan.dirty().overlaps(extent), is_dirty);
                prop_assert_eq!(plan.zero().contains(extent), is_dirty && is_zero);
                prop_assert_eq!(plan.zero().overlaps(extent), is_dirty && is_zero);
            }
            let clean: u64 = plan.clean().map(Extent::len).sum();
            prop_assert_eq!(clean + plan.dirty().bytes(), size);
        }

        #[test]
        fn the_cursor_gives_each_dirty_byte_once_in_order(size in 1u64..550, dirty in extents(), zero in extents(), limit in 1usize..5) {
            let plan = Plan::new(size, BLOCK, dirty, zero);
            let mut cursor = Cursor::default();
            let mut data = ExtentSet::new();
            let mut zeroes = ExtentSet::new();
            let mut at = 0;
            loop {
                let regions = cursor.next(&plan, limit);
                prop_assert!(regions.len() <= limit);
                if regions.is_empty() { break; }
                for region in regions {
                    prop_assert!(region.extent.start() >= at);
                    at = region.extent.end();
                    if region.zero { zeroes.insert(region.extent) } else { data.insert(region.extent) }
                }
            }
            prop_assert_eq!(&zeroes, plan.zero());
            prop_assert_eq!(data.bytes(), plan.data_bytes());
            for extent in data.iter().chain(zeroes.iter()) { prop_assert!(plan.dirty().contains(extent)); }
        }
    }

    #[test]
    fn a_range_that_is_not_whole_blocks_is_refused() {
        let plan = Plan::new(100, BLOCK, [], []);
        assert!(plan.whole_blocks(0, 100).is_some());
        assert!(plan.whole_blocks(96, 4).is_some());
        assert!(plan.whole_blocks(16, 4).is_none());
        assert!(plan.whole_blocks(96, 16).is_none());
        assert!(plan.whole_blocks(8, 16).is_none());
        assert!(plan.whole_blocks(16, u64::MAX).is_none());
        assert!(plan.whole_blocks(16, 0).is_none());
    }
}
