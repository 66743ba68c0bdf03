//! `archive.output-stream`: one object under construction, filled in order by a task of its own.
//!
//! Spliced ranges are read, digested and encoded side by side and appended in turn, so that a call returns before its
//! copy is done. Dropping a stream waits for its task: a late entry in the block table must not follow what another cover wrote there.

use super::target::{HostFailure, Target};
use crate::archive::{EncodedFrame, FRAME_LIMIT, FrameEncoder, ObjectInfo, ObjectWriter};
use crate::digest::{self, Digest};
use crate::extent::Extent;
use crate::volume::reader::{PIECE, Permit};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Operations waiting for their turn in one stream.
const QUEUE: usize = 32;

/// A piece of the volume is one frame.
const _: () = assert!(PIECE <= FRAME_LIMIT as u64);

enum Operation {
    Write(Vec<u8>, Permit),
    Splice(Extent, JoinHandle<Result<Piece, HostFailure>>),
    Finish,
}

/// A piece of the volume that only lacks its place in the object.
struct Piece {
    digests: Vec<Digest>,
    frame: EncodedFrame,
    _permit: Permit,
}

/// The host's end of one stream.
pub(super) struct Stream {
    target: Arc<Target>,
    encoder: FrameEncoder,
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
        let encoder = writer.encoder();
        let task = target.tasks.spawn(fill(Arc::clone(&target), writer, queue));
        Self {
            target,
            encoder,
            operations,
            task,
        }
    }

    /// Appends bytes of the provider's own making, as soon as memory for them is free.
    pub(super) async fn write(&self, bytes: Vec<u8>) -> Result<(), Failed> {
        let permit = self.target.frozen.reader.permit(bytes.len() as u64).await;
        self.queue(Operation::Write(bytes, permit)).await
    }

    /// Appends a range of the volume, piece by piece as memory for it is free.
    pub(super) async fn splice(&self, extent: Extent) -> Result<(), Failed> {
        for piece in extent.pieces(PIECE) {
            let permit = self.target.frozen.reader.permit(piece.len()).await;
            let target = Arc::clone(&self.target);
            let made = make(target, self.encoder.clone(), permit, piece);
            let made = self.target.tasks.spawn(made);
            self.queue(Operation::Splice(piece, made)).await?;
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

/// All of a splice that can be done out of turn.
async fn make(
    target: Arc<Target>,
    encoder: FrameEncoder,
    permit: Permit,
    extent: Extent,
) -> Result<Piece, HostFailure> {
    let held = target.frozen.bytes_with(permit, extent).await?;
    target
        .encode(move |target| {
            let digests = digest::of_blocks(&held.bytes, target.frozen.plan.block());
            let (bytes, permit) = held.into_parts();
            Ok(Piece {
                digests,
                frame: encoder.encode(bytes)?,
                _permit: permit,
            })
        })
        .await
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
            Operation::Write(bytes, permit) => {
                writer = target
                    .encode(move |_| {
                        writer.write(&bytes)?;
                        drop((bytes, permit));
                        Ok(writer)
                    })
                    .await?;
            }
            Operation::Splice(extent, made) => {
                let piece = made.await??;
                writer = target
                    .encode(move |target| {
                        let frame = writer.append(&piece.frame)?;
                        target.place(extent, &piece.digests, &frame)?;
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
