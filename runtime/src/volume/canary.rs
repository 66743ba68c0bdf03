//! One block per disk that is never given back: reading it after the last read shows that the snapshot was intact.
//!
//! A snapshot that breaks (a full fleecing image with `break-snapshot`, a cancelled job) says nothing by itself; from
//! then on every read of it fails.

use super::plan::Plan;
use super::reader::Reader;
use crate::digest::Digest;
use crate::extent::Extent;
use crate::nbd;

/// The block that is kept.
#[derive(Debug, Clone, Copy)]
pub struct Canary(Option<Extent>);

impl Canary {
    /// The first block that has to be read, else the first of the volume; an empty volume has none.
    pub fn choose(plan: &Plan) -> Self {
        let data = plan
            .dirty()
            .iter()
            .find_map(|dirty| plan.zero().gaps(dirty).next());
        let start = data.map_or(0, Extent::start);
        let end = start
            .saturating_add(u64::from(plan.block()))
            .min(plan.size());
        Self(Extent::between(start, end))
    }

    /// The parts of `extent` that may be given back.
    pub fn spared(self, extent: Extent) -> impl Iterator<Item = Extent> {
        let (start, end) = self.0.map_or((extent.end(), extent.end()), |keep| {
            (keep.start(), keep.end())
        });
        [
            Extent::between(extent.start(), start.min(extent.end())),
            Extent::between(end.max(extent.start()), extent.end()),
        ]
        .into_iter()
        .flatten()
    }

    /// Reads it on the connection that was made first, and returns its place and digest.
    pub async fn read(self, reader: &Reader) -> Result<Option<(Extent, Digest)>, nbd::Error> {
        let Some(extent) = self.0 else {
            return Ok(None);
        };
        let bytes = reader.read_on_first(extent).await?;
        Ok(Some((extent, Digest::of(&bytes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ExtentSet;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everything_but_the_canary_is_spared(offset in 0u64..40, length in 1u64..40, dirty in 0u64..60) {
            let plan = Plan::new(64, 4, Extent::new(dirty, 1).ok(), []);
            let canary = Canary::choose(&plan);
            let extent = Extent::new(offset, length).unwrap();
            let spared: ExtentSet = canary.spared(extent).collect();
            let kept = Extent::new(dirty / 4 * 4, 4).unwrap();
            for byte in 0..100 {
                let one = Extent::new(byte, 1).unwrap();
                prop_assert_eq!(spared.contains(one), extent.contains(one) && !kept.contains(one));
            }
        }
    }
}
