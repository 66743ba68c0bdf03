//! `archive.writer.put`: reading, digesting, encoding and packing of many chunks side by side.

use super::target::{HostFailure, Target};
use crate::archive::FRAME_LIMIT;
use crate::contract::{Encoding, MAX_PUT};
use crate::digest;
use crate::extent::Extent;
use crate::volume::reader::Permit;
use std::sync::Arc;

// One chunk is one frame.
const _: () = assert!(MAX_PUT == FRAME_LIMIT as u64);

/// Starts storing `extent`, which the books hold as pending, as soon as memory for it is free.
pub(super) async fn start(target: &Arc<Target>, extent: Extent, encoding: Encoding) {
    let permit = target.frozen.reader.permit(extent.len()).await;
    let task = Arc::clone(target);
    target.tasks.spawn(async move {
        if let Err(failure) = store(&task, permit, extent, encoding).await {
            task.fail(failure);
        }
        task.put_ended.notify_waiters();
    });
}

/// Waits until no put of any part of `extent` is under way, or one has failed.
pub(super) async fn ended(target: &Target, extent: Extent) {
    loop {
        let next = target.put_ended.notified();
        if target.has_failed() || !target.books().is_being_put(extent) {
            return;
        }
        next.await;
    }
}

async fn store(
    target: &Arc<Target>,
    permit: Permit,
    extent: Extent,
    encoding: Encoding,
) -> Result<(), HostFailure> {
    // What is all zero is in the table already.
    if !target.frozen.plan.zero().contains(extent) {
        let held = target.frozen.bytes_with(permit, extent).await?;
        target
            .encode(move |target| {
                let digests = digest::of_blocks(&held.bytes, target.frozen.plan.block());
                let frame = target.archive.put(&held.bytes, &digests, encoding)?;
                target.place(extent, &digests, &frame)
            })
            .await?;
    }
    target.books().put_done(extent);
    target.advance(extent);
    target.finished(extent).await
}
