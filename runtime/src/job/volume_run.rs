//! One volume of a backup: from its export to covered blocks.

use super::base::Base;
use super::claims::context_id;
use super::means::{Maker, Means};
use crate::archive::{
    self, BackupId, BackupWriter, BlockTable, DiskRecord, Entry, Namespace, RunContent, TableRoot,
};
use crate::channel::{Order, Run};
use crate::config::Limits;
use crate::contract::{BitmapMode, Context, GuestLimits, MAX_READ, MAX_WRITE, VolumeInfo, World};
use crate::digest::Digest;
use crate::event::Event;
use crate::extent::{Extent, ExtentSet};
use crate::grants;
use crate::grants::farewell::Farewells;
use crate::grants::run::{RunError, Terms};
use crate::grants::target::{HostFailure, Target};
use crate::nbd;
use crate::sandbox::{self, Process};
use crate::volume::canary::Canary;
use crate::volume::frozen::Frozen;
use crate::volume::source::Source;
use crate::volume::{discard, open, sample};
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::contract::BLOCK_SIZE;

/// A volume before its run.
#[derive(Debug, Clone)]
pub struct Uncovered {
    /// Its bytes.
    pub source: Source,
    /// What it builds on, where its source tells what changed since.
    pub base: Option<Base>,
    /// Why it builds on nothing, where it could.
    pub reason: Option<String>,
    /// For the manifest: the disk.
    pub disk: DiskRecord,
    /// For the manifest: the bitmap that starts at this point in time.
    pub bitmap: Option<String>,
}

/// The run of a provider on one volume.
pub struct VolumeRun<'a> {
    /// The volume.
    pub volume: &'a Uncovered,
    /// How many are read side by side.
    pub disks: usize,
    /// Who runs.
    pub maker: Maker<'a>,
    /// The provider's part of the archive.
    pub namespace: &'a Arc<Namespace>,
    /// The backup that is being made.
    pub writer: &'a Arc<BackupWriter>,
    /// Its id.
    pub backup: BackupId,
    /// Handed to the provider.
    pub attachments: &'a Arc<BTreeMap<String, Vec<u8>>>,
    /// The volume's number, where the names of its objects are its own.
    pub own_names: Option<usize>,
    /// The job's, or this volume's of it.
    pub means: Means,
    /// Where the provider goes when it is cancelled.
    pub farewells: &'a Farewells,
}

/// A volume whose every dirty block is covered.
#[derive(Debug)]
pub struct Covered {
    /// Its name.
    pub name: String,
    /// How it was tracked.
    pub mode: BitmapMode,
    /// The backup that it builds on.
    pub base: Option<BackupId>,
    /// Why it was read in full although there was something to build on.
    pub reason: Option<String>,
    /// What the provider returned.
    pub receipt: Vec<u8>,
    /// The block table.
    pub root: TableRoot,
    /// What the provider holds in bytes of its own making, zero blocks left out: to be proven.
    pub claimed: ExtentSet,
    /// Bytes that the backup covers.
    pub dirty_bytes: u64,
    /// Bytes of these that are zero.
    pub zero_bytes: u64,
}

/// Why a volume was not covered.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The export cannot be read.
    #[error("reading the snapshot failed")]
    Snapshot(#[from] nbd::Error),
    /// The archive failed.
    #[error("the archive")]
    Archive(#[from] archive::Error),
    /// The sandbox cannot be started.
    #[error("the provider's sandbox")]
    Sandbox(#[from] sandbox::Error),
    /// The provider did not do it.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The canary does not read as it did: the snapshot broke.
    #[error("the snapshot changed while it was read (block at {block} differs)")]
    SnapshotChanged {
        /// The canary.
        block: Extent,
    },
}

impl VolumeError {
    /// Whether it only ended because it was told to.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Run(RunError::Cancelled))
    }
}

/// Runs the provider on one volume and checks that the snapshot was intact to the end. `made_room` is awaited once what
/// is clean has been given back.
pub async fn run(
    given: VolumeRun<'_>,
    made_room: impl Future<Output = ()>,
) -> Result<Covered, VolumeError> {
    let disk = &given.volume.source;
    let prepare = async {
        let opened = open_volume(&given).await?;
        let canary = Canary::choose(&opened.frozen.plan);
        let before = canary.read(&opened.frozen.reader).await?;
        discard::clean(&opened.frozen, canary).await?;
        made_room.await;
        Ok::<_, VolumeError>((opened, canary, before))
    };
    let (opened, canary, before) = tokio::select! {
        prepared = prepare => prepared?,
        () = given.means.cancel.cancelled() => return Err(RunError::Cancelled.into()),
    };
    let frozen = Arc::new(opened.frozen);
    given.means.events.send(Event::Total {
        volume: disk.name.clone(),
        bytes: frozen.plan.data_bytes(),
    });

    let (writer, plan) = (Arc::clone(given.writer), Arc::clone(&frozen));
    let (size, base) = (disk.size, opened.base);
    let manifest = given.volume.base.as_ref();
    let manifest = manifest.map(|base| Arc::clone(&base.manifest));
    let table = file_work(&given, move || {
        if let Some(manifest) = manifest {
            writer.build_on(&manifest);
        }
        let table = writer.block_table(size, BLOCK_SIZE, base)?;
        if base.is_some() {
            for zero in plan.plan.zero().iter() {
                let block = u64::from(BLOCK_SIZE);
                table.set_zero(zero.start() / block..zero.end().div_ceil(block))?;
            }
        }
        Ok(table)
    })
    .await?;
    let target = Arc::new(Target::new(
        disk.name.clone(),
        Arc::clone(&frozen),
        canary,
        Arc::clone(given.writer),
        given.backup,
        table,
        Arc::clone(&given.means.encoders),
        given.maker.provider.grant.trim_finished,
        given.means.events.clone(),
    ));
    let process = start(&given, opened.mode).await?;
    let terms = Terms {
        world: given.maker.component.world,
        reader: given.maker.provider.grant.read,
        discarder: given.maker.provider.grant.discard,
        own_names: given.own_names,
        account: Arc::clone(&given.means.account),
        attachments: Arc::clone(given.attachments),
        farewells: given.farewells.clone(),
    };
    let receipt =
        grants::run::run(process, Arc::clone(&target), terms, &given.means.cancel).await?;
    let after = tokio::select! {
        after = canary.read(&frozen.reader) => after?,
        () = given.means.cancel.cancelled() => return Err(RunError::Cancelled.into()),
    };
    if after != before {
        let block = before.map_or_else(|| disk_extent(disk.size), |(extent, _)| extent);
        return Err(VolumeError::SnapshotChanged { block });
    }

    // Every task of the run has ended, so this is the last holder.
    let target = Arc::try_unwrap(target).map_err(|_| RunError::Protocol)?;
    let (_, table, books) = target.into_parts();
    let root = file_work(&given, move || table.finish()).await?;
    let claimed = books
        .claimed()
        .iter()
        .flat_map(|claim| frozen.plan.zero().gaps(claim).collect::<Vec<_>>())
        .collect();
    Ok(Covered {
        name: disk.name.clone(),
        mode: opened.mode,
        base: given
            .volume
            .base
            .as_ref()
            .filter(|_| opened.base.is_some())
            .map(|base| base.manifest.backup),
        reason: opened.reason,
        receipt,
        root,
        claimed,
        dirty_bytes: frozen.plan.dirty().bytes(),
        zero_bytes: frozen.plan.zero().bytes(),
    })
}

/// Work on the archive's files, on a thread of its own. It is given up when the job is told to stop: an archive that
/// hangs must not keep the VM's snapshot.
async fn file_work<T: Send + 'static>(
    given: &VolumeRun<'_>,
    work: impl FnOnce() -> Result<T, archive::Error> + Send + 'static,
) -> Result<T, VolumeError> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => {
            Ok(done.map_err(HostFailure::from).map_err(RunError::from)??)
        }
        () = given.means.cancel.cancelled() => Err(RunError::Cancelled.into()),
    }
}

struct Opened {
    frozen: Frozen,
    mode: BitmapMode,
    base: Option<TableRoot>,
    reason: Option<String>,
}

/// Opens the export; an incremental whose sample of clean blocks differs from its base becomes a full read.
async fn open_volume(given: &VolumeRun<'_>) -> Result<Opened, VolumeError> {
    let Uncovered { source, base, .. } = given.volume;
    let in_full = source.clone().in_full();
    let open = |source| {
        let bandwidth = given.means.bandwidth.clone();
        open::open(source, BLOCK_SIZE, given.disks, bandwidth)
    };
    if let (Some(base), Some(_)) = (base, &source.dirty_context) {
        let mut frozen = open(source).await?;
        match distrusted(given.namespace, base, &mut frozen).await? {
            None => {
                return Ok(Opened {
                    frozen,
                    mode: BitmapMode::Reuse,
                    base: Some(base.volume.root),
                    reason: None,
                });
            }
            Some(reason) => {
                given
                    .means
                    .events
                    .warn(format!("{}: {reason}; it is read in full", source.name));
                let frozen = open(&in_full).await?;
                return Ok(Opened {
                    frozen,
                    mode: BitmapMode::New,
                    base: None,
                    reason: Some(reason),
                });
            }
        }
    }
    let frozen = open(&in_full).await?;
    Ok(Opened {
        frozen,
        mode: BitmapMode::New,
        base: None,
        reason: given.volume.reason.clone(),
    })
}

/// Why the bitmap cannot hold all that changed since `base`, as far as a few blocks tell. The block of its mark is left
/// out of the plan where nobody wrote it.
async fn distrusted(
    namespace: &Arc<Namespace>,
    base: &Base,
    frozen: &mut Frozen,
) -> Result<Option<String>, VolumeError> {
    let (root, id) = (base.volume.root, base.manifest.backup);
    if let Some(block) = missed_change(namespace, root, frozen).await? {
        return Ok(Some(format!(
            "the block at {block} differs from the base {id} although no bitmap says so"
        )));
    }
    let mark = base.volume.disk.mark.and_then(|start| {
        let end = start.saturating_add(root.block_size().into());
        Extent::between(start, end.min(root.size()))
    });
    let Some(mark) = mark else {
        return Ok(None);
    };
    if !frozen.plan.dirty().contains(mark) {
        return Ok(Some(format!(
            "its bitmap since the base {id} was cleared, or another took its name, or the disk was made smaller meanwhile"
        )));
    }
    let now = Digest::of(&frozen.reader.read(mark).await?);
    if first_other(namespace, root, vec![(mark, now)])
        .await?
        .is_none()
    {
        frozen.plan.leave(mark);
    }
    Ok(None)
}

/// The first clean block, of a sample and the last one that is not zero in the base, that is not what the base holds.
///
/// A disk that was shrunk and grown again reads as zeroes from some block on, and no bitmap says so. If one of these
/// blocks is not zero in the base, then neither is the last of them, which is therefore always looked at.
async fn missed_change(
    namespace: &Arc<Namespace>,
    root: TableRoot,
    frozen: &Frozen,
) -> Result<Option<Extent>, VolumeError> {
    let clean: Vec<Extent> = frozen.plan.clean().collect();
    let archive = Arc::clone(namespace);
    let last = tokio::task::spawn_blocking(move || last_kept(&archive.table(root), &clean));
    let last = last
        .await
        .map_err(HostFailure::from)
        .map_err(RunError::from)??;
    let mut sample = sample::take(frozen).await?;
    if let Some(extent) = last {
        sample.push((extent, Digest::of(&frozen.reader.read(extent).await?)));
    }
    first_other(namespace, root, sample).await
}

/// The first of some blocks that is not what the base holds.
async fn first_other(
    namespace: &Arc<Namespace>,
    root: TableRoot,
    blocks: Vec<(Extent, Digest)>,
) -> Result<Option<Extent>, VolumeError> {
    let namespace = Arc::clone(namespace);
    let compared = tokio::task::spawn_blocking(move || {
        let table = namespace.table(root);
        for (extent, digest) in blocks {
            let expected = match table.get(extent.start() / u64::from(root.block_size()))? {
                Entry::Zero => Digest::of(&vec![0; extent.len() as usize]),
                Entry::Placed { digest, .. } | Entry::Claimed { digest, .. } => digest,
            };
            if digest != expected {
                return Ok(Some(extent));
            }
        }
        Ok(None)
    });
    compared
        .await
        .map_err(HostFailure::from)
        .map_err(RunError::from)?
}

/// The last block within `clean`, which is in ascending order, that the table does not call zero.
fn last_kept(table: &BlockTable, clean: &[Extent]) -> Result<Option<Extent>, archive::Error> {
    /// Looked through at once, from the end of the volume on: a few leaves, or any length of zeroes.
    const WINDOW: u64 = 1 << 16;
    let (block, size) = (u64::from(table.root().block_size()), table.root().size());
    for extent in clean.iter().rev() {
        let first = extent.start() / block;
        let mut end = extent.end().div_ceil(block);
        while end > first {
            let start = end.saturating_sub(WINDOW).max(first);
            let mut last = None;
            for run in table.entries(start..end)? {
                let run = run?;
                if !matches!(run.content, RunContent::Zero) {
                    last = run.blocks.end.checked_sub(1);
                }
            }
            if let Some(last) = last {
                let at = last * block;
                return Ok(Extent::between(at, (at + block).min(size)));
            }
            end = start;
        }
    }
    Ok(None)
}

async fn start(given: &VolumeRun<'_>, mode: BitmapMode) -> Result<Process, VolumeError> {
    let disk = &given.volume.source;
    let world = given.maker.component.world;
    let run = Run {
        world,
        wasi: given.maker.component.wasi.clone(),
        limits: guest_limits(given.means.account.limits()),
        context: Context {
            id: context_id(given.backup),
            settings: given.maker.provider.settings.to_string(),
        },
        volume: VolumeInfo {
            name: plain(&disk.name),
            size: disk.size,
            block_size: BLOCK_SIZE,
            mode,
        },
        reader: world == World::Provider && given.maker.provider.grant.read,
        discarder: given.maker.provider.grant.discard,
        base: base_receipt(given, mode),
        max_read: MAX_READ,
        max_write: MAX_WRITE,
    };
    let process = Process::start(
        &given.means.program,
        &Order::Run(run),
        &given.maker.component.compiled.file,
    )
    .await?;
    given.means.events.confinement(process.missing());
    Ok(process)
}

/// A disk's name as the contract allows names, for providers that name objects after it: others come from QEMU's own
/// ids, such as `#block123`.
fn plain(name: &str) -> String {
    let plain: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .take(archive::NAME_LIMIT)
        .collect();
    if plain.starts_with('.') || plain.is_empty() {
        format!("_{}", &plain[plain.len().min(1)..])
    } else {
        plain
    }
}

/// What this very provider returned for this volume in the base; another provider's receipt says nothing to it.
fn base_receipt(given: &VolumeRun<'_>, mode: BitmapMode) -> Option<Vec<u8>> {
    let base = given
        .volume
        .base
        .as_ref()
        .filter(|_| mode == BitmapMode::Reuse)?;
    (base.manifest.record.provider.name == given.maker.name).then(|| base.volume.receipt.clone())
}

/// What the sandbox process enforces by itself.
pub fn guest_limits(limits: &Limits) -> GuestLimits {
    GuestLimits {
        memory: limits.memory,
        cpu_ms: limits.cpu_seconds.saturating_mul(1000),
    }
}

fn disk_extent(size: u64) -> Extent {
    Extent::between(0, size.max(1)).expect("0..1 is a range")
}
