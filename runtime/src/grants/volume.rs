//! `volume`: what of the disk is wanted, and giving it back early.

use super::put;
use super::run::{Run, refused};
use crate::channel::Answer;
use crate::contract::{ErrorCode, MAX_REGIONS, RawRange};
use crate::volume::discard;

impl Run {
    pub(super) fn next_regions(&mut self, limit: u32) -> Answer {
        let regions = self
            .cursor
            .next(&self.target.frozen.plan, limit.min(MAX_REGIONS) as usize);
        Answer::Regions(
            regions
                .into_iter()
                .map(|region| (region.extent.start(), region.extent.len(), region.zero))
                .collect(),
        )
    }

    pub(super) async fn discard(&mut self, range: RawRange) -> Result<Answer, ErrorCode> {
        if !self.terms.discarder {
            return Err(ErrorCode::NotFound);
        }
        let extent = self.whole_blocks(range)?;
        put::ended(&self.target, extent).await;
        self.check_host()?;
        let fresh = self
            .target
            .books()
            .begin_discard(&self.target.frozen.plan, extent)
            .map_err(refused)?;
        for part in fresh {
            discard::trim(&self.target.frozen, self.target.canary, part)
                .await
                .map_err(|error| self.failed(error.into()))?;
        }
        Ok(Answer::Unit)
    }
}
