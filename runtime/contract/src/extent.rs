//! Byte ranges and sets of them: the arithmetic that coverage, trimming and dirty tracking rest on.
//!
//! Nothing here wraps: an extent whose end would pass `u64::MAX` cannot be made.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A non-empty half-open byte range whose end fits in a `u64`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64)", into = "(u64, u64)")]
pub struct Extent {
    start: u64,
    end: u64,
}

/// The range is empty or its end passes `u64::MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset}, length {length} is no range of bytes: it is empty or overflows")]
pub struct NotARange {
    offset: u64,
    length: u64,
}

impl Extent {
    /// As long as an extent can be.
    pub const WHOLE: Self = Self {
        start: 0,
        end: u64::MAX,
    };

    /// The range `offset .. offset + length`, where that is a range.
    pub fn new(offset: u64, length: u64) -> Result<Self, NotARange> {
        match offset.checked_add(length) {
            Some(end) if length > 0 => Ok(Self { start: offset, end }),
            _ => Err(NotARange { offset, length }),
        }
    }

    /// The range `start .. end`, or nothing where that is empty.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.end
    }

    /// Number of bytes, at least 1.
    #[allow(clippy::len_without_is_empty)] // an extent is never empty
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether every byte of `other` is in `self`.
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// What both hold.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// Grows to whole blocks, clipped at `size`, the end of the volume.
    ///
    /// `block` is a power of two; `self` must begin below `size`.
    pub fn grown_to_blocks(self, block: u32, size: u64) -> Self {
        let mask = u64::from(block) - 1;
        let start = self.start & !mask;
        let end = self
            .end
            .checked_add(mask)
            .map_or(size, |end| (end & !mask).min(size));
        Self { start, end }
    }

    /// The whole blocks inside, where the volume's short last block counts as whole.
    pub fn shrunk_to_blocks(self, block: u32, size: u64) -> Option<Self> {
        let mask = u64::from(block) - 1;
        let start = self.start.checked_add(mask)? & !mask;
        let end = if self.end >= size {
            size
        } else {
            self.end & !mask
        };
        Self::between(start, end)
    }

    /// Whether it begins and ends on block boundaries, or at the end of the volume.
    pub fn is_whole_blocks(self, block: u32, size: u64) -> bool {
        let mask = u64::from(block) - 1;
        self.start & mask == 0 && (self.end & mask == 0 || self.end == size)
    }

    /// Cuts into consecutive pieces of at most `length` bytes, `length` > 0, in ascending order.
    pub fn pieces(self, length: u64) -> impl Iterator<Item = Self> + Send {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let all = rest?;
            let cut = all.start.saturating_add(length).min(all.end);
            rest = Self::between(cut, all.end);
            Some(Self {
                start: all.start,
                end: cut,
            })
        })
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl TryFrom<(u64, u64)> for Extent {
    type Error = NotARange;

    fn try_from((offset, length): (u64, u64)) -> Result<Self, NotARange> {
        Self::new(offset, length)
    }
}

impl From<Extent> for (u64, u64) {
    fn from(extent: Extent) -> Self {
        (extent.start, extent.len())
    }
}

/// A set of bytes kept as disjoint extents that do not touch, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    /// Start → end.
    runs: std::collections::BTreeMap<u64, u64>,
}

impl ExtentSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds every byte of `extent`.
    pub fn insert(&mut self, extent: Extent) {
        let (mut start, mut end) = (extent.start, extent.end);
        // Every run that overlaps or touches becomes part of the new one; the last such run begins at or before `end`.
        while let Some((&run_start, &run_end)) = self.runs.range(..=end).next_back() {
            if run_end < start {
                break;
            }
            self.runs.remove(&run_start);
            start = start.min(run_start);
            end = end.max(run_end);
        }
        self.runs.insert(start, end);
    }

    /// Takes every byte of `extent` out.
    pub fn remove(&mut self, extent: Extent) {
        while let Some((&run_start, &run_end)) = self.runs.range(..extent.end).next_back() {
            if run_end <= extent.start {
                break;
            }
            self.runs.remove(&run_start);
            if run_start < extent.start {
                self.runs.insert(run_start, extent.start);
            }
            if run_end > extent.end {
                self.runs.insert(extent.end, run_end);
            }
        }
    }

    /// Whether every byte of `extent` is in the set.
    pub fn contains(&self, extent: Extent) -> bool {
        self.runs
            .range(..=extent.start)
            .next_back()
            .is_some_and(|(_, &end)| end >= extent.end)
    }

    /// Whether any byte of `extent` is in the set.
    pub fn overlaps(&self, extent: Extent) -> bool {
        self.runs
            .range(..extent.end)
            .next_back()
            .is_some_and(|(_, &end)| end > extent.start)
    }

    /// The parts of `extent` that are in the set, in ascending order.
    pub fn within(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let first = self
            .runs
            .range(..=extent.start)
            .next_back()
            .map_or(extent.start, |(&start, _)| start);
        self.runs
            .range(first..extent.end)
            .filter_map(move |(&start, &end)| Extent { start, end }.intersection(extent))
    }

    /// The parts of `extent` that are not in the set, in ascending order.
    pub fn gaps(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let mut at = extent.start;
        let mut present = self.within(extent);
        let mut done = false;
        std::iter::from_fn(move || {
            while !done {
                let gap = match present.next() {
                    Some(run) => {
                        let gap = Extent::between(at, run.start);
                        at = run.end;
                        gap
                    }
                    None => {
                        done = true;
                        Extent::between(at, extent.end)
                    }
                };
                if gap.is_some() {
                    return gap;
                }
            }
            None
        })
    }

    /// All extents, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.runs.iter().map(|(&start, &end)| Extent { start, end })
    }

    /// Number of bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.iter().map(Extent::len).sum()
    }

    /// Whether the set holds no byte.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        for extent in extents {
            set.insert(extent);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn extent() -> impl Strategy<Value = Extent> {
        (0u64..200, 1u64..40).prop_map(|(offset, length)| Extent::new(offset, length).unwrap())
    }

    fn bytes(set: &ExtentSet) -> BTreeSet<u64> {
        set.iter().flat_map(|e| e.start()..e.end()).collect()
    }

    #[test]
    fn a_range_that_overflows_or_is_empty_is_refused() {
        assert!(Extent::new(u64::MAX, 1).is_err());
        assert!(Extent::new(1, u64::MAX).is_err());
        assert!(Extent::new(5, 0).is_err());
        assert!(Extent::new(u64::MAX - 1, 1).is_ok());
    }

    proptest! {
        #[test]
        fn a_set_of_extents_is_the_set_of_their_bytes(steps in prop::collection::vec((any::<bool>(), extent()), 0..60), probe in extent()) {
            let mut set = ExtentSet::new();
            let mut model = BTreeSet::new();
            for (insert, extent) in steps {
                if insert {
                    set.insert(extent);
                    model.extend(extent.start()..extent.end());
                } else {
                    set.remove(extent);
                    model.retain(|b| !(extent.start()..extent.end()).contains(b));
                }
            }
            prop_assert_eq!(bytes(&set), model.clone());
            let runs: Vec<_> = set.iter().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end() < w[1].start()));
            let range = probe.start()..probe.end();
            prop_assert_eq!(set.contains(probe), range.clone().all(|b| model.contains(&b)));
            prop_assert_eq!(set.overlaps(probe), range.clone().any(|b| model.contains(&b)));
            let inside: BTreeSet<u64> = set.within(probe).flat_map(|e| e.start()..e.end()).collect();
            let gaps: BTreeSet<u64> = set.gaps(probe).flat_map(|e| e.start()..e.end()).collect();
            prop_assert_eq!(&inside, &range.clone().filter(|b| model.contains(b)).collect());
            prop_assert_eq!(&gaps, &range.filter(|b| !model.contains(b)).collect());
        }

        #[test]
        fn growing_and_shrinking_bracket_the_range(e in extent(), size in 240u64..300, log in 0u32..6) {
            let block = 1 << log;
            let grown = e.grown_to_blocks(block, size);
            prop_assert!(grown.contains(e) && grown.is_whole_blocks(block, size));
            if let Some(shrunk) = e.shrunk_to_blocks(block, size) {
                prop_assert!(e.contains(shrunk) && shrunk.is_whole_blocks(block, size));
            }
        }

        #[test]
        fn pieces_rebuild_the_range(e in extent(), length in 1u64..50) {
            let pieces: Vec<_> = e.pieces(length).collect();
            prop_assert!(pieces.iter().all(|p| p.len() <= length));
            prop_assert_eq!(pieces[0].start(), e.start());
            prop_assert_eq!(pieces.last().unwrap().end(), e.end());
            prop_assert!(pieces.windows(2).all(|w| w[0].end() == w[1].start()));
        }
    }
}
