//! Gives ranges back to the fleecing image, so that the guest's writes to them are no longer copied.

use super::canary::Canary;
use super::coverage::Coverage;
use super::frozen::Frozen;
use super::plan::Plan;
use crate::extent::Extent;
use crate::nbd;

/// Finished ranges are given back in aligned spans of this length, in bytes: a trim costs QEMU's main loop as much as
/// a read, so it should free as much as several.
const SPAN: u64 = 32 << 20;

/// Bytes in one trim of clean ranges. A larger one would keep QEMU busy for longer than a guest should wait.
const CLEAN_PIECE: u64 = 1 << 30;

/// Trims every clean range of an incremental. Nothing of it will be read.
pub async fn clean(frozen: &Frozen, canary: Canary) -> Result<(), nbd::Error> {
    for clean in frozen.plan.clean() {
        for part in canary.spared(clean) {
            for piece in part.pieces(CLEAN_PIECE) {
                frozen.reader.trim(piece).await?;
            }
        }
    }
    Ok(())
}

/// The whole spans around `done` that became final with it, now marked as discarded in the books.
///
/// What is returned is to be trimmed; its reads have all ended, since a range is final only once its bytes are stored.
pub fn ripe(books: &mut Coverage, plan: &Plan, done: Extent) -> Vec<Extent> {
    let Some(around) = Extent::between(
        done.start() & !(SPAN - 1),
        (done.end() | (SPAN - 1)).saturating_add(1).min(plan.size()),
    ) else {
        return Vec::new();
    };
    let mut ripe = Vec::new();
    for span in around.pieces(SPAN) {
        let dirty: Vec<Extent> = plan.dirty().within(span).collect();
        let fresh = dirty.iter().any(|&part| !books.is_all_discarded(part));
        // All or nothing, so that the books are asked before any part is marked.
        if fresh && dirty.iter().all(|&part| books.is_final(plan, part)) {
            for part in dirty {
                ripe.extend(books.begin_discard(plan, part).unwrap_or_default());
            }
        }
    }
    ripe
}

/// Trims `extent` but for the canary.
pub async fn trim(frozen: &Frozen, canary: Canary, extent: Extent) -> Result<(), nbd::Error> {
    for part in canary.spared(extent) {
        frozen.reader.trim(part).await?;
    }
    Ok(())
}
