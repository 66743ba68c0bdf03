//! From an NBD export to a frozen disk: asks what is dirty and what is zero, on a connection of its own each.

use super::bandwidth::Bandwidth;
use super::frozen::Frozen;
use super::plan::Plan;
use super::reader::{self, Reader};
use crate::extent::Extent;
use crate::nbd;
use std::path::Path;
use std::sync::Arc;

/// Meta context of the protocol's own for holes and zeroes.
const ALLOCATION: &str = "base:allocation";

/// `NBD_STATE_ZERO` of `base:allocation`: the range reads as zeroes.
const STATE_ZERO: u64 = 1 << 1;

/// `qemu:dirty-bitmap:NAME`, bit 0: the range is dirty.
const DIRTY: u64 = 1;

/// Asked about at once, in bytes: few enough runs to fit in memory, whatever the server says.
const STATUS_PIECE: u64 = 4 << 30;

/// Connects to the export. With a `dirty_context` (`qemu:dirty-bitmap:NAME`) only what that bitmap holds is covered,
/// otherwise everything is.
pub async fn open(
    socket: &Path,
    export: &str,
    dirty_context: Option<&str>,
    block: u32,
    bandwidth: Option<Arc<Bandwidth>>,
) -> Result<Frozen, nbd::Error> {
    let reader = Reader::connect(socket, export, bandwidth).await?;
    let Ok(all) = Extent::new(0, reader.size()) else {
        return Ok(Frozen {
            plan: Plan::new(0, block, [], []),
            reader,
        });
    };
    let dirty = match dirty_context {
        Some(context) => ranges(socket, export, context, &[all], DIRTY).await?,
        None => vec![all],
    };
    let zero = ranges(socket, export, ALLOCATION, &dirty, STATE_ZERO).await?;
    Ok(Frozen {
        plan: Plan::new(all.len(), block, dirty, zero),
        reader,
    })
}

/// The parts of `within` that `context` marks with `flag`.
async fn ranges(
    socket: &Path,
    export: &str,
    context: &str,
    within: &[Extent],
    flag: u64,
) -> Result<Vec<Extent>, nbd::Error> {
    let connection = reader::connect(socket, export, Some(context)).await?;
    let mut marked = Vec::new();
    for extent in within.iter().flat_map(|extent| extent.pieces(STATUS_PIECE)) {
        let runs = reader::in_time(connection.block_status(extent)).await?;
        marked.extend(
            runs.into_iter()
                .filter(|run| run.flags & flag != 0)
                .map(|run| run.extent),
        );
    }
    connection.disconnect().await;
    Ok(marked)
}
