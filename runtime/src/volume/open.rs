//! From an NBD export to a frozen disk: asks what is dirty and what is zero, on a connection of its own each.

use super::bandwidth::Bandwidth;
use super::frozen::Frozen;
use super::lane::REPLY;
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

/// Most bytes that one run takes in an answer: a descriptor of an extended header.
const RUN_BYTES: u64 = 16;

/// Shortest run of zeroes that file systems and image formats commonly have, in bytes.
const SHORTEST_RUN: u64 = 4 << 10;

/// Connects to the export. With a `dirty_context` (`qemu:dirty-bitmap:NAME`) only what that bitmap holds is covered,
/// otherwise everything is. `disks` is how many are read side by side.
pub async fn open(
    socket: &Path,
    export: &str,
    dirty_context: Option<&str>,
    block: u32,
    disks: usize,
    bandwidth: Option<Arc<Bandwidth>>,
) -> Result<Frozen, nbd::Error> {
    let reader = Reader::connect(socket, export, disks, bandwidth).await?;
    let Ok(all) = Extent::new(0, reader.size()) else {
        return Ok(Frozen {
            plan: Plan::new(0, block, [], []),
            reader,
        });
    };
    let dirty = match dirty_context {
        Some(context) => ranges(socket, export, (context, block.into(), DIRTY), &[all]).await?,
        None => vec![all],
    };
    let zero = ranges(
        socket,
        export,
        (ALLOCATION, SHORTEST_RUN, STATE_ZERO),
        &dirty,
    )
    .await?;
    Ok(Frozen {
        plan: Plan::new(all.len(), block, dirty, zero),
        reader,
    })
}

/// The parts of `within` that a context marks with a flag. No run of it is shorter than the length that is given with it,
/// so that the answers are not longer than [`REPLY`].
async fn ranges(
    socket: &Path,
    export: &str,
    (context, shortest, flag): (&str, u64, u64),
    within: &[Extent],
) -> Result<Vec<Extent>, nbd::Error> {
    let lane = reader::connect(socket, export, Some(context)).await?;
    let piece = REPLY / RUN_BYTES * shortest;
    let mut marked = Vec::new();
    for extent in within.iter().flat_map(|extent| extent.pieces(piece)) {
        let runs = lane.block_status(extent).await?;
        marked.extend(
            runs.into_iter()
                .filter(|run| run.flags & flag != 0)
                .map(|run| run.extent),
        );
    }
    lane.disconnect().await;
    Ok(marked)
}
