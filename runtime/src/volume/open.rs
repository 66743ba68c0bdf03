//! From an NBD export to a frozen disk: asks what is dirty and what is zero, on connections of their own.

use super::bandwidth::Bandwidth;
use super::frozen::Frozen;
use super::lane::REPLY;
use super::plan::Plan;
use super::reader::{self, Reader};
use super::source::Source;
use crate::extent::Extent;
use crate::nbd;
use futures_util::stream::{self, StreamExt, TryStreamExt};
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

/// Connects to the export. With a meta context (`qemu:dirty-bitmap:NAME`) only what that bitmap holds is covered,
/// otherwise everything is. `disks` is how many are read side by side.
pub async fn open(
    source: &Source,
    block: u32,
    disks: usize,
    bandwidth: Option<Arc<Bandwidth>>,
) -> Result<Frozen, nbd::Error> {
    let (socket, export) = (&*source.socket, &*source.export);
    let reader = Reader::connect(socket, export, disks, bandwidth).await?;
    let Ok(all) = Extent::new(0, reader.size()) else {
        return Ok(Frozen {
            plan: Plan::new(0, block, [], []),
            reader,
        });
    };
    let ask = Ask {
        socket,
        export,
        connections: reader::asking(disks),
    };
    let dirty = match source.dirty_context.as_deref() {
        Some(context) => ask.ranges((context, block.into(), DIRTY), &[all]).await?,
        None => vec![all],
    };
    let allocation = (ALLOCATION, SHORTEST_RUN, STATE_ZERO);
    let zero = ask.ranges(allocation, &dirty).await?;
    Ok(Frozen {
        plan: Plan::new(all.len(), block, dirty, zero),
        reader,
    })
}

/// Whom to ask, by how many connections side by side: over a large disk it is the round trips that take the time.
struct Ask<'a> {
    socket: &'a Path,
    export: &'a str,
    connections: usize,
}

impl Ask<'_> {
    /// The parts of `within` that a context marks with a flag. No run of it is shorter than the length that is given
    /// with it, so that the answers are not longer than [`REPLY`].
    async fn ranges(
        &self,
        (context, shortest, flag): (&str, u64, u64),
        within: &[Extent],
    ) -> Result<Vec<Extent>, nbd::Error> {
        let longest = REPLY / RUN_BYTES * shortest;
        let pieces = within.iter().flat_map(|extent| extent.pieces(longest));
        let pieces: Vec<Extent> = pieces.collect();
        let mut lanes = Vec::new();
        while lanes.len() < self.connections.min(pieces.len()) {
            lanes.push(reader::connect(self.socket, self.export, Some(context)).await?);
        }
        let asked = pieces.iter().zip(lanes.iter().cycle());
        let mut answers = stream::iter(asked)
            .map(|(&piece, lane)| lane.block_status(piece))
            .buffered(lanes.len().max(1));
        let mut marked = Vec::new();
        while let Some(runs) = answers.try_next().await? {
            let with_flag = runs.into_iter().filter(|run| run.flags & flag != 0);
            marked.extend(with_flag.map(|run| run.extent));
        }
        drop(answers);
        for lane in lanes {
            lane.disconnect().await;
        }
        Ok(marked)
    }
}
