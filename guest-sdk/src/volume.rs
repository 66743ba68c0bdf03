//! One frozen volume: what it is, what of it is to be backed up, and its bytes.

use std::vec;

use crate::imports::{content, types, volume};
use crate::{Error, Extent};

/// Regions that one call asks the host for: enough that calls cost nothing beside the copying, and still only a few
/// pages of memory.
const REGIONS_PER_CALL: u32 = 1024;

/// What is known of the changes since an earlier backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    /// Nothing is tracked: the whole volume is to be backed up.
    None,
    /// Tracking starts with this backup: the whole volume is to be backed up.
    New,
    /// Only what changed since the base is to be backed up.
    Reuse,
}

/// What a provider may know about a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Stable across backups, such as `drive-scsi0`. Fit for the name of an object.
    pub name: String,
    /// In bytes. Need not be a multiple of the block size.
    pub size: u64,
    /// In bytes, a power of two. Ranges begin and end on multiples of this, but for the volume's end.
    pub block_size: u32,
    /// What the dirty regions are made from.
    pub mode: BitmapMode,
}

/// Names one frozen volume. It reveals no byte of it: the host copies on the holder's behalf.
#[derive(Debug)]
pub struct Snapshot {
    handle: volume::Snapshot,
}

impl Snapshot {
    pub(crate) fn new(handle: volume::Snapshot) -> Snapshot {
        Snapshot { handle }
    }

    pub(crate) fn handle(&self) -> &volume::Snapshot {
        &self.handle
    }

    /// What the volume is. The same at every call.
    pub fn info(&self) -> VolumeInfo {
        let info = self.handle.info();
        VolumeInfo {
            name: info.name,
            size: info.size,
            block_size: info.block_size,
            mode: match info.mode {
                volume::BitmapMode::None => BitmapMode::None,
                volume::BitmapMode::New => BitmapMode::New,
                volume::BitmapMode::Reuse => BitmapMode::Reuse,
            },
        }
    }
}

/// What is known of a region without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionKind {
    /// To be backed up. It may still read as zeroes.
    Data,
    /// Reads as zeroes. The host has recorded it already; nothing needs to be done.
    Zero,
}

/// A part of what is to be backed up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Made of whole blocks; never empty.
    pub range: Extent,
    /// The same for the whole range.
    pub kind: RegionKind,
}

/// What is to be backed up: regions in ascending order that do not overlap. Neighbours may be of the same kind; how
/// the host cuts them means nothing.
///
/// An item is an error if the host could not say what comes next.
#[derive(Debug)]
pub struct DirtyRegions {
    handle: volume::DirtyRegions,
    batch: vec::IntoIter<types::Region>,
}

impl DirtyRegions {
    pub(crate) fn new(handle: volume::DirtyRegions) -> DirtyRegions {
        DirtyRegions {
            handle,
            batch: Vec::new().into_iter(),
        }
    }
}

impl Iterator for DirtyRegions {
    type Item = Result<Region, Error>;

    fn next(&mut self) -> Option<Result<Region, Error>> {
        if self.batch.len() == 0 {
            match self.handle.next(REGIONS_PER_CALL) {
                Ok(batch) => self.batch = batch.into_iter(),
                Err(code) => return Some(Err(code.into())),
            }
        }
        self.batch.next().map(|region| {
            Ok(Region {
                range: region.range.into(),
                kind: match region.kind {
                    types::RegionKind::Data => RegionKind::Data,
                    types::RegionKind::Zero => RegionKind::Zero,
                },
            })
        })
    }
}

/// Authority to see a volume's bytes.
#[derive(Debug)]
pub struct Reader {
    handle: content::Reader,
    max_read: u32,
}

impl Reader {
    pub(crate) fn new(handle: content::Reader) -> Reader {
        let max_read = handle.max_read();
        Reader { handle, max_read }
    }

    /// Most bytes that one [`read`](Self::read) may ask for, at least 64 KiB. Reads of about this size, in ascending
    /// order, are the fastest.
    pub fn max_read(&self) -> u32 {
        self.max_read
    }

    /// Reads exactly `length` bytes at any offset within the dirty regions.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] above [`max_read`](Self::max_read); [`Error::OutOfRange`], [`Error::NotDirty`],
    /// [`Error::Discarded`], [`Error::QuotaExceeded`], [`Error::Io`].
    pub fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        Ok(self.handle.read(offset, length)?)
    }

    /// Fills `buffer` with the bytes from `offset` on, in as many calls as it takes.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read), but never [`Error::TooLarge`]. The buffer's contents are then unspecified.
    pub fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let mut offset = offset;
        for part in buffer.chunks_mut(self.max_read as usize) {
            part.copy_from_slice(&self.read(offset, part.len() as u32)?);
            offset += part.len() as u64;
        }
        Ok(())
    }
}

/// Authority to give snapshot space back early. Acts on the fleecing image only, never on the disk of the VM.
#[derive(Debug)]
pub struct Discarder {
    handle: volume::Discarder,
}

impl Discarder {
    pub(crate) fn new(handle: volume::Discarder) -> Discarder {
        Discarder { handle }
    }

    /// Gives up a range of whole blocks whose backup is finished: nothing reads it again in this backup.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::NotDirty`] if some byte of it is in no dirty region, or neither zero, nor put,
    /// nor in an object that is finished.
    pub fn discard(&self, range: Extent) -> Result<(), Error> {
        Ok(self.handle.discard(range.into())?)
    }
}
