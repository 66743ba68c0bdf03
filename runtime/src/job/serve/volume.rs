//! One volume, as an NBD export.

use super::super::read_back::Finding;
use super::asked::{Asked, Key};
use super::trouble::{Troubles, Unread};
use crate::access::{Allocation, Image, Kept, Piece, Placed};
use crate::archive::{BackupId, Frame, Namespace, RunContent};
use crate::contract::with_causes;
use crate::digest::{self, Digest};
use crate::extent::Extent;
use crate::nbd::StatusRun;
use crate::nbd::server::{ALLOCATION, Export, HOLE, Refused};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

/// A volume of the backup.
pub(super) struct Volume {
    /// Among those that are served.
    pub(super) index: usize,
    pub(super) name: String,
    pub(super) image: Arc<Image>,
    pub(super) shared: Arc<Shared>,
}

/// What all volumes have together.
pub(super) struct Shared {
    pub(super) namespace: Arc<Namespace>,
    pub(super) kept: Arc<Kept<Key>>,
    pub(super) asked: Arc<Asked>,
    pub(super) troubles: Arc<Troubles>,
    /// Reading, decoding and digesting at once: one for each processor.
    pub(super) readers: Arc<Semaphore>,
    /// Reads of copies of damaged frames.
    pub(super) copied: AtomicU64,
}

impl Export for Volume {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn preferred_block(&self) -> u32 {
        self.image.block_size()
    }

    fn can_trim(&self) -> bool {
        false
    }

    fn contexts(&self) -> Vec<String> {
        vec![ALLOCATION.into()]
    }

    async fn read(&self, extent: Extent) -> Result<Vec<u8>, Refused> {
        let read = self.put_together(extent).await;
        read.map_err(|unread| self.shared.troubles.refuse(unread))
    }

    async fn trim(&self, _: Extent) -> Result<(), Refused> {
        Ok(())
    }

    async fn status(
        &self,
        _: &str,
        extent: Extent,
        most: usize,
    ) -> Result<Vec<StatusRun>, Refused> {
        let image = Arc::clone(&self.image);
        let parts = self.working(move || image.allocation(extent, most)).await;
        let run = |part: Allocation| StatusRun {
            extent: part.extent,
            flags: if part.is_zero { HOLE } else { 0 },
        };
        match parts {
            Ok(parts) => Ok(parts.into_iter().map(run).collect()),
            Err(error) => {
                let unread = self.unread(extent, &Finding::Table(error));
                Err(self.shared.troubles.refuse(unread))
            }
        }
    }
}

impl Volume {
    async fn put_together(&self, extent: Extent) -> Result<Vec<u8>, Unread> {
        let image = Arc::clone(&self.image);
        let pieces = self.working(move || image.pieces(extent)).await;
        let pieces = pieces.map_err(|error| self.unread(extent, &Finding::Table(error)))?;
        let mut bytes = Vec::with_capacity(extent.len() as usize);
        for Piece {
            extent,
            run,
            blocks,
        } in pieces
        {
            match run.content {
                RunContent::Zero => bytes.resize(bytes.len() + extent.len() as usize, 0),
                RunContent::Placed {
                    frame,
                    skip,
                    digests,
                } => {
                    let placed = Placed {
                        extent: blocks,
                        skip,
                        digests,
                        block: self.image.block_size(),
                    };
                    bytes.extend(self.placed(placed, frame, extent).await?);
                }
                RunContent::Claimed { backup, digests } => {
                    let claimed = Claimed {
                        backup,
                        digests,
                        blocks,
                    };
                    self.claimed(claimed, extent, &mut bytes).await?;
                }
            }
        }
        Ok(bytes)
    }

    /// What is wanted of blocks that the host placed, from the frame or a copy of it.
    async fn placed(
        &self,
        placed: Placed,
        frame: Frame,
        wanted: Extent,
    ) -> Result<Vec<u8>, Unread> {
        let shared = Arc::clone(&self.shared);
        let blocks = placed.extent;
        let read = self.working(move || {
            let (namespace, kept) = (&shared.namespace, &shared.kept);
            let key = Key::Frame(frame.object().clone(), frame.offset());
            let of_frame = || {
                let decoded = match kept.find(&key) {
                    Some(decoded) => decoded,
                    None => Arc::new(placed.decoded(namespace, &frame)?),
                };
                let range = placed.compare(namespace, &frame, &decoded)?;
                let part = part(&decoded[range], placed.extent, wanted).to_vec();
                kept.keep(key.clone(), decoded);
                Ok(part)
            };
            of_frame().or_else(|error| match placed.of_a_copy(namespace, &frame) {
                Some(bytes) => {
                    shared.copied.fetch_add(1, Ordering::Relaxed);
                    Ok(part(&bytes, placed.extent, wanted).to_vec())
                }
                None => Err(Finding::Placed(error)),
            })
        });
        read.await.map_err(|finding| {
            let extent = finding.extent().unwrap_or(blocks);
            self.unread(extent, &finding)
        })
    }

    /// Appends what is wanted of blocks that a provider claimed.
    async fn claimed(
        &self,
        claimed: Claimed,
        wanted: Extent,
        bytes: &mut Vec<u8>,
    ) -> Result<(), Unread> {
        let block = self.image.block_size();
        let mut at = claimed.blocks.start();
        while at < claimed.blocks.end() {
            let answer = self.shared.asked.answer(self.index, claimed.backup, at);
            let answer = answer.await.map_err(|not_asked| Unread {
                volume: self.name.clone(),
                extent: claimed.blocks,
                reason: format!("{}: {}", claimed.blocks, not_asked.reason),
                is_denied: not_asked.is_denied,
            })?;
            // It holds the byte that it was asked for.
            let end = answer.extent.end().min(claimed.blocks.end());
            let Some(extent) = Extent::between(at, end) else {
                break;
            };
            let first = ((at - claimed.blocks.start()) / u64::from(block)) as usize;
            let count = extent.len().div_ceil(block.into()) as usize;
            let digests: Vec<Digest> = claimed.digests[first..first + count].to_vec();
            let compared = self.working(move || {
                let part = part(&answer.bytes, answer.extent, extent);
                match digest::first_wrong(part, extent, block, &digests) {
                    Some(wrong) => Err(wrong),
                    None => Ok(extent
                        .intersection(wanted)
                        .map(|wanted| self::part(part, extent, wanted).to_vec())),
                }
            });
            match compared.await {
                Ok(part) => bytes.extend(part.into_iter().flatten()),
                Err(wrong) => {
                    let origin = format!("the provider of backup {}", claimed.backup);
                    let finding = Finding::Wrong {
                        extent: wrong,
                        origin,
                    };
                    return Err(self.unread(wrong, &finding));
                }
            }
            at = extent.end();
        }
        Ok(())
    }

    /// Work that waits for the archive, or for the processor. Clients that leave do not make it more than is bounded.
    async fn working<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let readers = Arc::clone(&self.shared.readers);
        let turn = readers.acquire_owned().await;
        let worked = spawn_blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        match worked.await {
            Ok(done) => done,
            // The program ends; or it is a fault of this program, which is told as one and ends this request's task alone.
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await,
            },
        }
    }

    fn unread(&self, extent: Extent, finding: &Finding) -> Unread {
        let reason = match finding {
            Finding::Table(_) => format!("{extent}: {}", with_causes(finding)),
            finding => with_causes(finding),
        };
        Unread {
            volume: self.name.clone(),
            extent,
            reason,
            is_denied: false,
        }
    }
}

/// Neighbouring blocks that were claimed in one backup.
struct Claimed {
    backup: BackupId,
    digests: Vec<Digest>,
    /// Where they lie.
    blocks: Extent,
}

/// Those of `bytes`, which lie at `extent`, that lie at `wanted`.
fn part(bytes: &[u8], extent: Extent, wanted: Extent) -> &[u8] {
    let skip = (wanted.start() - extent.start()) as usize;
    &bytes[skip..skip + wanted.len() as usize]
}
