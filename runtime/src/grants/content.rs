//! `content`: the bytes of the volume.

use super::run::Run;
use crate::contract::{ErrorCode, MAX_READ, World};
use crate::extent::Extent;

impl Run {
    pub(super) async fn read(&mut self, offset: u64, length: u32) -> Result<(), ErrorCode> {
        if !self.terms.reader || self.terms.world == World::BlindProvider {
            return Err(ErrorCode::NotFound);
        }
        if length > MAX_READ {
            return Err(ErrorCode::TooLarge);
        }
        let plan = &self.target.frozen.plan;
        let extent = Extent::new(offset, length.into())
            .ok()
            .filter(|extent| extent.end() <= plan.size())
            .ok_or(ErrorCode::OutOfRange)?;
        if !plan.dirty().contains(extent) {
            return Err(ErrorCode::NotDirty);
        }
        if self.target.books().is_discarded(extent) {
            return Err(ErrorCode::Discarded);
        }
        self.charge_read(extent.len())?;
        self.buffer.clear();
        let read = self.read_ahead.read(extent, &mut self.buffer).await;
        read.map_err(|error| self.failed(error.into()))
    }

    /// Charges a read of `length` bytes: in sum no less than was given, and no less than was fetched for it. A byte here
    /// and a byte there cost the host a whole window each.
    fn charge_read(&mut self, length: u64) -> Result<(), ErrorCode> {
        let given = self.read_given.saturating_add(length);
        let due = given.max(self.read_ahead.fetched());
        self.account.read(due.saturating_sub(self.read_charged))?;
        self.read_given = given;
        self.read_charged = due.max(self.read_charged);
        Ok(())
    }
}
