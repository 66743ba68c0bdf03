//! The mark of a new bitmap (`qemu::mark`): set right after the point in time, over the server that the disks are read
//! from, and looked for by the next backup.

use crate::contract::BLOCK_SIZE;
use crate::extent::Extent;
use crate::nbd;
use crate::qemu::{BitmapName, Disk, Monitor, MonitorError, PointInTime};
use crate::volume::reader;

/// The last one of so many parts of a disk has the mark: guests write there least, and a block that the guest wrote says
/// nothing of a bitmap that was cleared before.
const QUIET: u64 = 16;

/// Why a bitmap has no mark.
#[derive(Debug, thiserror::Error)]
pub(super) enum MarkError {
    /// QEMU refused.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The block could not be discarded.
    #[error(transparent)]
    Nbd(#[from] nbd::Error),
    /// The system gives no random bytes.
    #[error("no random bytes")]
    Random(#[from] getrandom::Error),
}

/// Makes a block dirty in `bitmap`, and says where it begins. It is the base's, so that a backup that fails and is poured
/// back into the base's bitmap adds nothing to that; else it is drawn at random from the end of the disk.
pub(super) async fn set(
    monitor: &Monitor,
    point: &PointInTime,
    index: u16,
    disk: &Disk,
    bitmap: &BitmapName,
    base: Option<u64>,
) -> Result<u64, MarkError> {
    let block = u64::from(BLOCK_SIZE);
    let start = match base {
        Some(start) => start,
        None => {
            let blocks = disk.size.div_ceil(block).max(1);
            let last = blocks.div_ceil(QUIET);
            (blocks - 1 - getrandom::u64()? % last) * block
        }
    };
    let export = point.prepare_mark(monitor, index, disk, BLOCK_SIZE).await?;
    if let Some(mark) = Extent::between(start, (start + block).min(disk.size)) {
        let connection = reader::connect(&point.socket, &export, None).await?;
        let trimmed = connection.trim(mark).await;
        connection.disconnect().await;
        trimmed?;
    }
    point.set_mark(monitor, index, disk, bitmap).await?;
    Ok(start)
}
