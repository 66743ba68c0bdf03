//! When to give snapshot space back.

use fleecebox_guest::Extent;

/// Discards wait until they are worth it: each makes the host finish the copies of its range first, and the more
/// there is in one the less the copies stand still.
const DISCARD_AT_ONCE: u64 = 32 << 20;

/// Chunks that were put and not yet discarded, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    range: Option<Extent>,
}

impl Finished {
    /// Takes note of a chunk, and returns what should be discarded now. What never becomes large enough is left
    /// to the end of the backup, when everything is given back anyway.
    pub(crate) fn add(&mut self, chunk: Extent) -> Option<Extent> {
        let before = self.range.take();
        let (range, apart) = match before {
            Some(range) if range.end() == chunk.offset => {
                let length = range.length + chunk.length;
                (Extent { length, ..range }, None)
            }
            before => (chunk, before),
        };
        if apart.is_none() && range.length >= DISCARD_AT_ONCE {
            return Some(range);
        }
        self.range = Some(range);
        apart
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 4 << 20;

    fn chunk(index: u64) -> Extent {
        Extent {
            offset: index * CHUNK,
            length: CHUNK,
        }
    }

    #[test]
    fn neighbours_are_discarded_together_once_they_are_many() {
        let mut finished = Finished::default();
        let discarded: Vec<_> = (0..20)
            .filter_map(|index| finished.add(chunk(index)))
            .collect();
        let expected = [0, 8].map(|index| Extent {
            length: DISCARD_AT_ONCE,
            ..chunk(index)
        });
        assert_eq!(discarded, expected);
    }

    #[test]
    fn what_stands_apart_is_discarded_when_the_next_begins() {
        let mut finished = Finished::default();
        assert_eq!(finished.add(chunk(0)), None);
        assert_eq!(finished.add(chunk(1)), None);
        assert_eq!(
            finished.add(chunk(3)),
            Some(Extent {
                offset: 0,
                length: 2 * CHUNK
            })
        );
        assert_eq!(finished.add(chunk(5)), Some(chunk(3)));
    }
}
