//! Reads one volume of a backup completely, each block compared with its digest: what restore and verify share.
//!
//! What the host placed comes from the archive alone. What a provider claimed is asked of that provider's `image` of
//! the very backup in which it was claimed, run from the component that the archive keeps.

use super::component::{Component, ComponentError};
use super::event::{Event, Events};
use super::volume_run::{context_id, guest_limits};
use crate::archive::{
    self, BackupId, Manifest, Namespace, ObjectName, Run, RunContent, VolumeRecord,
};
use crate::channel::{Context, OpenImage};
use crate::digest;
use crate::extent::Extent;
use crate::grants::MAX_READ;
use crate::grants::account::Account;
use crate::grants::image::{Image, ImageError};
use crate::policy::{Denied, Restores};
use crate::sandbox::{Cache, Program};
use crate::volume::reader::PIECE;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

/// Runs of the block table that wait to be read.
const QUEUE: usize = 64;

/// Blocks whose claims wait until so many are known: they are then asked for backup by backup, so that each provider is
/// opened once for all of them. Their digests take 2 MiB.
const WAITING: u64 = 1 << 16;

/// Images open at once, each with a process and the memory that its provider may have. They share no budget as those of a
/// backup do: an image that is refused what another one holds would fail a restore that each alone lets succeed.
const IMAGES: usize = 4;

/// Findings that are listed one by one; a backup with more is as lost as one with these.
pub const FINDINGS: usize = 100;

/// What to read, and where to.
pub struct Order<'a> {
    /// The provider's part of the archive.
    pub namespace: &'a Arc<Namespace>,
    /// The backup.
    pub manifest: &'a Arc<Manifest>,
    /// Its volume.
    pub volume: &'a VolumeRecord,
    /// Where its bytes go; zero blocks are not written, so a file must be sparse and an image zeroed before.
    pub output: Option<Arc<File>>,
    /// Which providers may be asked for what they claimed.
    pub restores: &'a Restores<'a>,
    /// What the providers use.
    pub account: &'a Arc<Account>,
    /// Compiled components.
    pub cache: &'a Cache,
    /// What sandbox processes run.
    pub program: &'a Program,
    /// Where the job tells what it does.
    pub events: &'a Events,
    /// Ends it early.
    pub cancel: &'a CancellationToken,
    /// Whether to go on after a finding.
    pub all_findings: bool,
}

/// Something that is not as it was backed up.
#[derive(Debug, thiserror::Error)]
pub enum Finding {
    /// The archive does not give the bytes.
    #[error("{extent}: {source}")]
    Unreadable {
        /// Of the volume.
        extent: Extent,
        /// Why.
        source: archive::Error,
    },
    /// The bytes are not those that were backed up.
    #[error("{extent}: the bytes are not those that were backed up ({origin})")]
    Wrong {
        /// The block.
        extent: Extent,
        /// Where they came from.
        origin: String,
    },
    /// The provider does not give back what it claimed.
    #[error(
        "{extent}: the provider of backup {backup} does not give back what it claimed: {source}"
    )]
    NotGivenBack {
        /// Of the volume.
        extent: Extent,
        /// Where it was claimed.
        backup: BackupId,
        /// Why.
        source: ImageError,
    },
    /// The provider of a backup cannot be asked.
    #[error("the provider of backup {backup} cannot be asked for what it claimed: {source}")]
    NoProvider {
        /// Where ranges were claimed.
        backup: BackupId,
        /// Why.
        source: ProviderError,
    },
    /// The block table itself cannot be read.
    #[error("the block table: {0}")]
    Table(archive::Error),
}

/// Why a backup's own provider cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// Its manifest or component is not in the archive.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// The policy does not let it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The component does not compile.
    #[error(transparent)]
    Component(#[from] ComponentError),
    /// It does not open its image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The manifest does not hold the volume.
    #[error("its manifest does not hold the volume")]
    NoVolume,
}

/// Why reading ended early, findings aside.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The output cannot be written.
    #[error("writing failed: {0}")]
    Output(#[from] io::Error),
    /// A task of the job died.
    #[error("a task of the job died: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// A signal asked for the end.
    #[error("cancelled")]
    Cancelled,
}

/// Reads the volume; returns what was found wrong, at most [`FINDINGS`].
pub async fn replay(order: Order<'_>) -> Result<Vec<Finding>, ReplayError> {
    let (sender, mut runs) = mpsc::channel(QUEUE);
    let namespace = Arc::clone(order.namespace);
    let root = order.volume.root;
    let walk = spawn_blocking(move || walk(&namespace, root, &sender));
    let mut replay = Replay {
        order,
        images: VecDeque::new(),
        claimed: BTreeMap::new(),
        waiting: 0,
        findings: Vec::new(),
        placed: JoinSet::new(),
    };
    let result = replay.read(&mut runs).await;
    runs.close();
    replay.placed.shutdown().await;
    if let Err(error) = walk.await? {
        replay.findings.push(Finding::Table(error));
    }
    for (_, image) in replay.images {
        image.close().await;
    }
    result?;
    replay.findings.truncate(FINDINGS);
    Ok(replay.findings)
}

/// Sends the runs that hold data, cut to what is read at once.
/// Compares what the provider wrote of each object with its digest: also bytes that no volume's blocks lead to. Returns
/// what is not as it was, with the object's name.
pub async fn check_objects(
    namespace: &Namespace,
    manifest: &Manifest,
    cancel: &CancellationToken,
) -> Result<Vec<(ObjectName, archive::Error)>, ReplayError> {
    let objects = Arc::new(namespace.objects(manifest));
    let mut found = Vec::new();
    for info in &manifest.objects {
        if cancel.is_cancelled() {
            return Err(ReplayError::Cancelled);
        }
        let (objects, name) = (Arc::clone(&objects), info.name.clone());
        if let Err(error) = spawn_blocking(move || objects.verify(&name)).await? {
            found.push((info.name.clone(), error));
        }
    }
    Ok(found)
}

fn walk(
    namespace: &Namespace,
    root: archive::TableRoot,
    runs: &mpsc::Sender<Run>,
) -> Result<(), archive::Error> {
    let table = namespace.table(root);
    for run in table.entries(0..root.blocks())? {
        let run = run?;
        if !matches!(run.content, RunContent::Zero) && runs.blocking_send(run).is_err() {
            // Nobody reads any more.
            break;
        }
    }
    Ok(())
}

struct Replay<'a> {
    order: Order<'a>,
    /// The one that was used last comes last.
    images: VecDeque<(BackupId, Image)>,
    /// Runs that wait to be asked for, by where they were claimed.
    claimed: BTreeMap<BackupId, Vec<Run>>,
    /// Blocks in these.
    waiting: u64,
    findings: Vec<Finding>,
    placed: JoinSet<Result<Result<u64, Finding>, io::Error>>,
}

impl Replay<'_> {
    async fn read(&mut self, runs: &mut mpsc::Receiver<Run>) -> Result<(), ReplayError> {
        let at_once = std::thread::available_parallelism().map_or(2, std::num::NonZero::get) * 2;
        while let Some(run) = runs.recv().await {
            if self.order.cancel.is_cancelled() {
                return Err(ReplayError::Cancelled);
            }
            match run.content {
                RunContent::Zero => {}
                RunContent::Placed { .. } => {
                    self.start_placed(run);
                    while self.placed.len() >= at_once {
                        self.next_placed().await?;
                    }
                }
                RunContent::Claimed { backup, .. } => {
                    self.waiting += run.blocks.end - run.blocks.start;
                    self.claimed.entry(backup).or_default().push(run);
                    if self.waiting >= WAITING {
                        self.ask_for_claims().await?;
                    }
                }
            }
            if self.enough() {
                return Ok(());
            }
        }
        while !self.placed.is_empty() && !self.enough() {
            self.next_placed().await?;
        }
        self.ask_for_claims().await
    }

    /// Asks for all claims that wait.
    async fn ask_for_claims(&mut self) -> Result<(), ReplayError> {
        self.waiting = 0;
        for (backup, runs) in std::mem::take(&mut self.claimed) {
            let mut image = match self.image(backup).await {
                Ok(image) => image,
                Err(source) => {
                    self.findings.push(Finding::NoProvider { backup, source });
                    continue;
                }
            };
            let mut of_use = true;
            for run in runs {
                if self.order.cancel.is_cancelled() {
                    return Err(ReplayError::Cancelled);
                }
                if self.enough() || !of_use {
                    break;
                }
                of_use = self.ask_for(backup, &mut image, &run).await?;
            }
            // Whatever made it fail, such an instance is of no more use.
            if of_use {
                self.images.push_back((backup, image));
            }
            if self.enough() {
                break;
            }
        }
        Ok(())
    }

    /// The opened image of a backup, taken from those that are kept.
    async fn image(&mut self, backup: BackupId) -> Result<Image, ProviderError> {
        if let Some(at) = self.images.iter().position(|(of, _)| *of == backup)
            && let Some((_, image)) = self.images.remove(at)
        {
            return Ok(image);
        }
        while self.images.len() >= IMAGES
            && let Some((_, image)) = self.images.pop_front()
        {
            image.close().await;
        }
        self.open(backup).await
    }

    fn enough(&self) -> bool {
        self.findings.len() >= if self.order.all_findings { FINDINGS } else { 1 }
    }

    fn extent(&self, run: &Run) -> Extent {
        let block = u64::from(self.order.volume.root.block_size());
        let size = self.order.volume.root.size();
        Extent::between(run.blocks.start * block, (run.blocks.end * block).min(size))
            .expect("a run is not empty")
    }

    fn start_placed(&mut self, run: Run) {
        let extent = self.extent(&run);
        let namespace = Arc::clone(self.order.namespace);
        let output = self.order.output.clone();
        let block = self.order.volume.root.block_size();
        self.placed.spawn_blocking(move || {
            let RunContent::Placed {
                frame,
                skip,
                digests,
            } = run.content
            else {
                return Ok(Ok(0));
            };
            let bytes = match namespace.read_frame(&frame) {
                Ok(bytes) => bytes,
                Err(source) => return Ok(Err(Finding::Unreadable { extent, source })),
            };
            let range = skip as usize..skip as usize + extent.len() as usize;
            let origin = || frame.object().to_string();
            let Some(bytes) = bytes.get(range) else {
                return Ok(Err(Finding::Wrong {
                    extent,
                    origin: origin(),
                }));
            };
            if let Some(extent) = first_wrong(bytes, extent, block, &digests) {
                return Ok(Err(Finding::Wrong {
                    extent,
                    origin: origin(),
                }));
            }
            if let Some(output) = output {
                output.write_all_at(bytes, extent.start())?;
            }
            Ok(Ok(extent.len()))
        });
    }

    async fn next_placed(&mut self) -> Result<(), ReplayError> {
        if let Some(done) = self.placed.join_next().await {
            match done?? {
                Ok(bytes) => self.order.events.send(Event::Advance { bytes }),
                Err(finding) => self.findings.push(finding),
            }
        }
        Ok(())
    }

    /// Asks for one run. Returns whether the image can be asked again.
    async fn ask_for(
        &mut self,
        backup: BackupId,
        image: &mut Image,
        run: &Run,
    ) -> Result<bool, ReplayError> {
        let RunContent::Claimed { digests, .. } = &run.content else {
            return Ok(true);
        };
        let extent = self.extent(run);
        let block = self.order.volume.root.block_size();
        let per_piece = (PIECE / u64::from(block)) as usize;
        for (piece, digests) in extent.pieces(PIECE).zip(digests.chunks(per_piece)) {
            let read = self.order.cancel.run_until_cancelled(image.read(piece));
            let bytes = match read.await.ok_or(ReplayError::Cancelled)? {
                Ok(bytes) => bytes,
                Err(source) => {
                    self.findings.push(Finding::NotGivenBack {
                        extent: piece,
                        backup,
                        source,
                    });
                    return Ok(false);
                }
            };
            if let Some(extent) = first_wrong(&bytes, piece, block, digests) {
                self.findings.push(Finding::Wrong {
                    extent,
                    origin: format!("the provider of backup {backup}"),
                });
                return Ok(true);
            }
            if let Some(output) = self.order.output.clone() {
                spawn_blocking(move || output.write_all_at(&bytes, piece.start())).await??;
            }
            self.order
                .events
                .send(Event::Advance { bytes: piece.len() });
        }
        Ok(true)
    }

    async fn open(&self, backup: BackupId) -> Result<Image, ProviderError> {
        let own = backup == self.order.manifest.backup;
        let manifest = if own {
            Arc::clone(self.order.manifest)
        } else {
            Arc::new(self.order.namespace.manifest(backup)?)
        };
        let name = &self.order.volume.name;
        let volume = manifest
            .record
            .volumes
            .iter()
            .find(|volume| volume.name == *name)
            .ok_or(ProviderError::NoVolume)?;
        let provider = &manifest.record.provider;
        let limits = self
            .order
            .restores
            .limits(&manifest.record.vm, &provider.name)?;
        let bytes = self
            .order
            .namespace
            .component(manifest.record.provider.component)?;
        let component = Component::load(
            bytes.into(),
            self.order.program,
            self.order.cache,
            self.order
                .restores
                .wasi(&manifest.record.vm, &provider.name),
            self.order.events,
        )
        .await?;
        let open = OpenImage {
            wasi: component.wasi,
            limits: limits.map_or(provider.limits, |limits| guest_limits(&limits)),
            context: Context {
                id: context_id(backup),
                settings: manifest.record.provider.settings.clone(),
            },
            receipt: volume.receipt.clone(),
            max_read: MAX_READ,
        };
        let objects = self.order.namespace.objects(&manifest);
        Ok(Image::open(
            self.order.program,
            open,
            &component.compiled,
            objects,
            self.order.account,
            name,
            self.order.events,
        )
        .await?)
    }
}

/// The first block of `bytes`, which lie at `extent`, that has another digest.
fn first_wrong(
    bytes: &[u8],
    extent: Extent,
    block: u32,
    digests: &[archive::Digest],
) -> Option<Extent> {
    let found = digest::of_blocks(bytes, block);
    if found.len() != digests.len() {
        return Some(extent);
    }
    extent
        .pieces(block.into())
        .zip(found.iter().zip(digests))
        .find(|(_, (found, expected))| found != expected)
        .map(|(extent, _)| extent)
}
