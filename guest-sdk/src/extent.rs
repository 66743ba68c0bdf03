//! Ranges of a volume.

use crate::imports::types;

/// The half-open byte range `offset .. offset + length` of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl Extent {
    /// The byte after the last.
    ///
    /// # Panics
    ///
    /// If `offset + length` overflows. No range that the host hands out does.
    pub fn end(&self) -> u64 {
        self.offset
            .checked_add(self.length)
            .expect("a range ends within u64")
    }

    /// Cuts the range at every multiple of `grid`, counted from the volume's start, so that the same place of a
    /// volume is always cut the same way. No piece is longer than `grid`. If `grid` is a multiple of the block size,
    /// pieces of whole blocks are whole blocks.
    ///
    /// ```
    /// # use fleecebox_guest::Extent;
    /// let range = Extent { offset: 3, length: 7 };
    /// let pieces: Vec<_> = range.pieces(4).map(|piece| piece.offset..piece.end()).collect();
    /// assert_eq!(pieces, [3..4, 4..8, 8..10]);
    /// ```
    ///
    /// # Panics
    ///
    /// If `grid` is 0.
    pub fn pieces(&self, grid: u64) -> Pieces {
        assert!(grid > 0, "a grid has a width");
        Pieces { rest: *self, grid }
    }
}

/// The pieces of a range; made by [`Extent::pieces`].
#[derive(Debug, Clone)]
pub struct Pieces {
    rest: Extent,
    grid: u64,
}

impl Iterator for Pieces {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        if self.rest.length == 0 {
            return None;
        }
        let offset = self.rest.offset;
        let length = self.rest.length.min(self.grid - offset % self.grid);
        self.rest = Extent {
            offset: offset + length,
            length: self.rest.length - length,
        };
        Some(Extent { offset, length })
    }
}

impl From<types::Extent> for Extent {
    fn from(extent: types::Extent) -> Extent {
        Extent {
            offset: extent.offset,
            length: extent.length,
        }
    }
}

impl From<Extent> for types::Extent {
    fn from(extent: Extent) -> types::Extent {
        types::Extent {
            offset: extent.offset,
            length: extent.length,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_follow_each_other_and_never_cross_the_grid(
            offset in 0..1_000_000_u64,
            length in 0..100_000_u64,
            grid in 1_000..50_000_u64,
        ) {
            let range = Extent { offset, length };
            let mut position = offset;
            for piece in range.pieces(grid) {
                prop_assert_eq!(piece.offset, position);
                prop_assert!(piece.length > 0);
                prop_assert_eq!(piece.offset / grid, (piece.end() - 1) / grid);
                position = piece.end();
            }
            prop_assert_eq!(position, range.end());
        }

        #[test]
        fn pieces_are_as_few_as_the_grid_allows(
            offset in 0..1_000_000_u64,
            length in 1..100_000_u64,
            grid in 1_000..50_000_u64,
        ) {
            let range = Extent { offset, length };
            let cells = (range.end() - 1) / grid - offset / grid + 1;
            prop_assert_eq!(range.pieces(grid).count() as u64, cells);
        }
    }

    #[test]
    fn pieces_reach_the_last_byte_that_a_range_can_have() {
        let range = Extent {
            offset: u64::MAX - 5,
            length: 5,
        };
        assert_eq!(
            range.pieces(1 << 20).map(|piece| piece.length).sum::<u64>(),
            5
        );
    }
}
