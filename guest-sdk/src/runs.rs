//! Dirty regions without zeroes and without the host's cuts.

use crate::{DirtyRegions, Error, Extent, Region, RegionKind};

impl DirtyRegions {
    /// Only what has to be stored: zero regions are left out, for the host has recorded them, and neighbouring data
    /// regions are joined. So runs depend on the volume's content alone, which chunks that are to be found again
    /// need.
    pub fn data_runs(self) -> DataRuns<DirtyRegions> {
        DataRuns::new(self)
    }
}

/// Runs of data, ascending and apart from each other; made by [`DirtyRegions::data_runs`].
#[derive(Debug)]
pub struct DataRuns<I> {
    regions: I,
    /// Begun, and perhaps continued by the next region.
    run: Option<Extent>,
}

impl<I: Iterator<Item = Result<Region, Error>>> DataRuns<I> {
    fn new(regions: I) -> DataRuns<I> {
        DataRuns { regions, run: None }
    }
}

impl<I: Iterator<Item = Result<Region, Error>>> Iterator for DataRuns<I> {
    type Item = Result<Extent, Error>;

    fn next(&mut self) -> Option<Result<Extent, Error>> {
        loop {
            let region = match self.regions.next() {
                Some(Ok(region)) => region,
                Some(Err(error)) => return Some(Err(error)),
                None => return self.run.take().map(Ok),
            };
            if region.kind == RegionKind::Zero {
                continue;
            }
            match &mut self.run {
                Some(run) if run.end() == region.range.offset => run.length += region.range.length,
                run => {
                    if let Some(finished) = run.replace(region.range) {
                        return Some(Ok(finished));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ascending regions of 1 to 4 bytes with gaps of 0 to 2.
    fn regions() -> impl Strategy<Value = Vec<Region>> {
        prop::collection::vec((0..3_u64, 1..5_u64, any::<bool>()), 0..50).prop_map(|parts| {
            let mut end = 0;
            parts
                .into_iter()
                .map(|(gap, length, data)| {
                    let range = Extent {
                        offset: end + gap,
                        length,
                    };
                    end = range.end();
                    let kind = if data {
                        RegionKind::Data
                    } else {
                        RegionKind::Zero
                    };
                    Region { range, kind }
                })
                .collect()
        })
    }

    fn bytes(ranges: impl Iterator<Item = Extent>) -> Vec<u64> {
        ranges.flat_map(|range| range.offset..range.end()).collect()
    }

    proptest! {
        #[test]
        fn runs_hold_every_byte_of_data_and_no_other(regions in regions()) {
            let runs = DataRuns::new(regions.iter().copied().map(Ok)).map(Result::unwrap);
            let data = regions.iter().filter(|region| region.kind == RegionKind::Data);
            prop_assert_eq!(bytes(runs), bytes(data.map(|region| region.range)));
        }

        #[test]
        fn runs_never_touch(regions in regions()) {
            let runs: Vec<_> = DataRuns::new(regions.into_iter().map(Ok)).map(Result::unwrap).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].offset));
        }
    }

    #[test]
    fn an_error_is_passed_on() {
        let mut runs = DataRuns::new([Err(Error::Io)].into_iter());
        assert_eq!(runs.next(), Some(Err(Error::Io)));
    }
}
