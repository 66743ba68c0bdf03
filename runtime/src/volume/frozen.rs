//! A disk as of the point in time: its plan, and its bytes.

use super::plan::Plan;
use super::reader::{Permit, Reader};
use crate::buffer::Buffer;
use crate::extent::Extent;
use crate::nbd;

/// One frozen disk.
#[derive(Debug)]
pub struct Frozen {
    /// What a backup of it covers.
    pub plan: Plan,
    /// Its NBD export.
    pub reader: Reader,
}

/// Bytes of the disk, with the right to hold them in memory.
#[derive(Debug)]
pub struct Held {
    /// Exactly as many as were asked for.
    pub bytes: Buffer,
    permit: Permit,
}

impl Held {
    /// The bytes and the right to hold them, for whoever makes something else of them.
    pub fn into_parts(self) -> (Buffer, Permit) {
        (self.bytes, self.permit)
    }
}

impl Frozen {
    /// The bytes of `extent`, as soon as memory for them is free. What the plan calls zero is not read.
    pub async fn bytes(&self, extent: Extent) -> Result<Held, nbd::Error> {
        let permit = self.reader.permit(extent.len()).await;
        self.bytes_with(permit, extent).await
    }

    /// As [`Frozen::bytes`], with a permit that was taken before.
    pub async fn bytes_with(&self, permit: Permit, extent: Extent) -> Result<Held, nbd::Error> {
        let bytes = if !self.plan.zero().overlaps(extent) {
            self.reader.read(extent).await?
        } else {
            let length = extent.len() as usize;
            let mut bytes = Buffer::for_bytes(length);
            bytes.resize(length, 0);
            for data in self.plan.zero().gaps(extent) {
                let at = (data.start() - extent.start()) as usize;
                bytes[at..at + data.len() as usize].copy_from_slice(&self.reader.read(data).await?);
            }
            bytes
        };
        Ok(Held { bytes, permit })
    }
}
