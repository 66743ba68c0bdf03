//! `archive.output-stream`: one object under construction, filled in order by a task of its own.
//!
//! Spliced ranges are read ahead and appended in turn, so that a call returns before its copy is done. Dropping a
//! stream waits for its task: a late entry in the block table must not follow what another cover wrote there.

use super::target::{HostFailure, Target};
use crate::archive::{FRAME_LIMIT, ObjectInfo, ObjectWriter};
use crate::digest;
use crate::extent::Extent;
use crate::volume::frozen::Held;
use crate::volume::reader::PIECE;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Operations waiting for their turn in one stream.
const QUEUE: usize = 32;

#[derive(Debug)]
enum Operation {
    Write(Vec<u8>),
    Splice(Extent, JoinHandle<Result<Held, HostFailure>>),
    Finish,
}

/// The host's end of one stream.
pub(super) struct Stream {
    target: Arc<Target>,
    operations: mpsc::Sender<Operation>,
    task: JoinHandle<Option<ObjectInfo>>,
}

/// The stream failed; why is with the [`Target`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failed;

impl Stream {
    /// Starts the task that fills `writer`.
    pub(super) fn start(target: Arc<Target>, writer: ObjectWriter) -> Self {
        let (operations, queue) = mpsc::channel(QUEUE);
        let task = target.tasks.spawn(fill(Arc::clone(&target), writer, queue));
        Self {
            target,
            operations,
            task,
        }
    }

    /// Appends bytes of the provider's own making.
    pub(super) async fn write(&self, bytes: Vec<u8>) -> Result<(), Failed> {
        self.queue(Operation::Write(bytes)).await
    }

    /// Appends a range of the volume, piece by piece as memory for it is free.
    pub(super) async fn splice(&self, extent: Extent) -> Result<(), Failed> {
        for piece in extent.pieces(PIECE) {
            let permit = self.target.frozen.reader.permit(piece.len()).await;
            let frozen = Arc::clone(&self.target.frozen);
            let read = self
                .target
                .tasks
                .spawn(async move { Ok(frozen.bytes_with(permit, piece).await?) });
            self.queue(Operation::Splice(piece, read)).await?;
        }
        Ok(())
    }

    /// Ends the object; it is complete when this returns.
    pub(super) async fn finish(self) -> Result<ObjectInfo, Failed> {
        self.queue(Operation::Finish).await?;
        drop(self.operations);
        self.task.await.ok().flatten().ok_or(Failed)
    }

    /// Removes the object and waits until nothing of it is under way.
    pub(super) async fn discard(self) {
        drop(self.operations);
        let _ = self.task.await;
    }

    async fn queue(&self, operation: Operation) -> Result<(), Failed> {
        self.operations.send(operation).await.map_err(|_| Failed)
    }
}

async fn fill(
    target: Arc<Target>,
    writer: ObjectWriter,
    queue: mpsc::Receiver<Operation>,
) -> Option<ObjectInfo> {
    match apply(&target, writer, queue).await {
        Ok(info) => info,
        Err(failure) => {
            target.fail(failure);
            None
        }
    }
}

/// Nothing is returned, and the object is gone, where the queue ends without a finish.
async fn apply(
    target: &Arc<Target>,
    mut writer: ObjectWriter,
    mut queue: mpsc::Receiver<Operation>,
) -> Result<Option<ObjectInfo>, HostFailure> {
    while let Some(operation) = queue.recv().await {
        match operation {
            Operation::Write(bytes) => {
                writer = target
                    .encode(move |_| {
                        writer.write(&bytes)?;
                        Ok(writer)
                    })
                    .await?;
            }
            Operation::Splice(extent, read) => {
                let held = read.await??;
                writer = target
                    .encode(move |target| {
                        let digests = digest::of_blocks(&held.bytes, target.frozen.plan.block());
                        let block = target.frozen.plan.block();
                        let per_frame = (FRAME_LIMIT / block) as usize;
                        let frames = writer.append(&held.bytes)?;
                        for ((part, digests), frame) in extent
                            .pieces(FRAME_LIMIT.into())
                            .zip(digests.chunks(per_frame))
                            .zip(&frames)
                        {
                            target.place(part, digests, frame)?;
                        }
                        target.advance(extent);
                        Ok(writer)
                    })
                    .await?;
            }
            Operation::Finish => {
                return target.encode(move |_| Ok(Some(writer.finish()?))).await;
            }
        }
    }
    Ok(None)
}
