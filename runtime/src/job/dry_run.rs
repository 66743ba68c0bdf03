//! What a backup would do to each disk, by the very decisions that it takes, without anything being changed: QEMU is
//! only asked, and so is the archive.

use super::backup::BackupRequest;
use super::base::{self, Choice, Owner, Remedy};
use super::extra::{Extra, ExtraError, Source};
use super::fleecing;
use super::lineage;
use super::point_in_time::PointError;
use super::power::{self, PowerError};
use super::recover::{self, RecoverError};
use super::selection;
use super::subject::{self, Folders};
use crate::archive::{self, Archive, BackupId, LeftOut, Namespace};
use crate::contract::BLOCK_SIZE;
use crate::event::Events;
use crate::qemu::bitmap::{self, BitmapPlan};
use crate::qemu::{self, Monitor, claim, leftovers, machine};
use serde::Serialize;
use std::sync::Arc;
use time::OffsetDateTime;

/// Of which backup it is to be told.
pub struct DryRun<'a> {
    /// The backup.
    pub request: &'a BackupRequest,
    /// The archive; none where its folder is empty.
    pub archive: Option<&'a Archive>,
    /// Of the VM's jobs.
    pub folders: &'a Folders,
}

/// What would happen.
#[derive(Debug, Clone, Serialize)]
pub struct Forecast {
    /// The VM.
    pub vm: String,
    /// What would be done before, or keeps more from being told, each in one sentence.
    pub first: Vec<String>,
    /// The disks that would be backed up. Nothing where they cannot be told.
    pub disks: Option<Vec<DiskForecast>>,
    /// Drives that need not be backed up.
    pub skipped: Vec<SkippedForecast>,
    /// The VM's disks that would be in no volume.
    pub left_out: Vec<LeftOut>,
}

/// What would happen to a disk.
#[derive(Debug, Clone, Serialize)]
pub struct DiskForecast {
    /// Its name.
    pub name: String,
    /// Its block node; none of a file that the VM does not have.
    pub node: Option<String>,
    /// Its format.
    pub format: String,
    /// In bytes.
    pub size: u64,
    /// How much of it would be read.
    pub mode: Mode,
    /// The backup that it would build on.
    pub base: Option<BackupId>,
    /// Why it would not build on one.
    pub reason: Option<String>,
    /// Bytes to be covered, zeroes included, if it were backed up now.
    pub dirty_bytes: u64,
    /// The bitmap that says what to read; it would be removed once the backup is committed.
    pub bitmap_used: Option<String>,
    /// The bitmap that would be added, `BACKUP` standing for the backup's id.
    pub bitmap_added: Option<String>,
    /// Bitmaps that would be removed besides, once the backup is committed.
    pub bitmaps_removed: Vec<String>,
}

/// How much of a disk would be read, and whether its changes would be tracked from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// What changed since the base.
    Incremental,
    /// All, once.
    Full,
    /// All, each time.
    Untracked,
}

/// A disk that would be left out.
#[derive(Debug, Clone, Serialize)]
pub struct SkippedForecast {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Tells what a backup would do.
///
/// # Errors
/// Those of the backup itself, as far as they can be foreseen.
pub async fn dry_run(wanted: DryRun<'_>) -> Result<Forecast, PointError> {
    let BackupRequest {
        vm,
        selection,
        namespace: namespace_name,
        ..
    } = wanted.request;
    let mut forecast = Forecast {
        vm: vm.name.clone(),
        first: Vec::new(),
        disks: None,
        skipped: Vec::new(),
        left_out: Vec::new(),
    };
    // A job that runs has the monitor, which would keep us waiting.
    let journal = wanted.folders.journal()?;
    let dead = journal.record();
    if let Some(dead) = dead {
        forecast.first.push(format!(
            "the last job on this VM ({}, backup {}) {}; it would be cleaned up after it",
            dead.job,
            dead.backup,
            recover::how_it_ended(dead)
        ));
    }
    let monitor = match Monitor::reach(&vm.monitor).await {
        Ok(monitor) => monitor,
        Err(error) if error.is_nobody() => {
            let program = match (vm.monitor.libvirt(), vm.config.start.first()) {
                (Some(domain), _) => {
                    power::refuse_saved(domain).await?;
                    "libvirt"
                }
                (None, Some(program)) => program,
                (None, None) => return Err(PowerError::Stopped(error).into()),
            };
            forecast.first.push(format!(
                "the VM does not run; it would be started paused by {program}, which is when its disks can be told"
            ));
            return Ok(forecast);
        }
        Err(error) => return Err(error.into()),
    };
    claim::refuse_claimed(&monitor).await?;
    if let Some(state) = machine::run_state(&monitor).await? {
        state.standing()?;
    }
    // What a dead job left above a disk would be taken for the disk.
    let left = leftovers::find(&monitor).await?;
    for job in left.keys() {
        forecast.first.push(format!(
            "job {job}, which died, left something in QEMU; it would be removed, and the disks can be told after that"
        ));
    }
    if !left.is_empty() {
        return Ok(forecast);
    }
    // Its notes are what is returned.
    let (silent, _) = Events::channel();
    let found = selection::select(&vm.config, selection, &vm.extra, &monitor, &silent).await?;
    forecast.left_out = found.left_out;
    for skipped in found.skipped {
        forecast.skipped.push(SkippedForecast {
            name: skipped.name,
            reason: skipped.reason.to_string(),
        });
    }
    let namespace = wanted
        .archive
        .map(|archive| archive.namespace(namespace_name));
    let namespace = match namespace {
        None | Some(Err(archive::Error::NotFound { .. } | archive::Error::HalfMade { .. })) => None,
        Some(opened) => Some(Arc::new(opened.map_err(RecoverError::Archive)?)),
    };
    let mut disks: Vec<_> = match (wanted.archive, namespace) {
        (Some(archive), Some(namespace)) => {
            let owner = Owner {
                archive: archive.id(),
                namespace: namespace_name.clone(),
                vm: vm.name.clone(),
            };
            let dead = dead.map(|dead| &*dead.backup);
            let settled = settled_first(&monitor, &owner, &namespace, dead).await?;
            forecast.first.extend(settled);
            let id = BackupId::random(OffsetDateTime::now_utc()).map_err(RecoverError::Archive)?;
            let chosen = subject::choose(
                &owner,
                &namespace,
                wanted.request.full,
                found.disks,
                id,
                &silent,
            )?;
            let of = |(disk, choice)| tracked(&disk, choice, id);
            chosen.into_iter().map(of).collect()
        }
        _ => found.disks.iter().map(first_of_its_archive).collect(),
    };
    for extra in &vm.extra {
        disks.extend(attached(extra)?);
    }
    let mut room = 0u64;
    for disk in &disks {
        let held = match (&disk.bitmap_used, &disk.node) {
            (None, Some(node)) => machine::held(&monitor, node).await?.unwrap_or(disk.size),
            _ => disk.dirty_bytes,
        };
        room = room.saturating_add(fleecing::room(disk.size, held));
    }
    let (folder, path) = &wanted.folders.fleecing;
    fleecing::check_room(folder, path, room)?;
    forecast.disks = Some(disks);
    Ok(forecast)
}

/// What would become of the bitmaps of a job that died, before the disks are chosen for.
async fn settled_first(
    monitor: &Monitor,
    owner: &Owner,
    namespace: &Namespace,
    dead: Option<&str>,
) -> Result<Vec<String>, PointError> {
    let found = bitmap::find(monitor).await?;
    let remedies = base::remedies(owner, &found, dead, |id| recover::recorded(namespace, id));
    let said = |remedy| {
        let (Remedy::Accept { node, .. } | Remedy::BackOut { node, .. }) = remedy;
        format!(
            "{node}: a job that died left its bitmaps; they would be settled, after which the disk may be incremental"
        )
    };
    let remedies = remedies.map_err(RecoverError::Archive)?;
    Ok(remedies.into_iter().map(said).collect())
}

fn tracked(disk: &qemu::Disk, choice: Choice, id: BackupId) -> DiskForecast {
    let used = choice.bitmap.old().map(ToString::to_string);
    let dirty = used.as_deref().and_then(|used| disk.dirty(used));
    // A backup looks at the mark first, and leaves it out where nobody wrote it.
    let marked = choice.base.as_ref().and_then(|base| base.disk().mark);
    let mark = marked.map_or(0, |_| u64::from(BLOCK_SIZE));
    let id = id.to_string();
    let added = choice.bitmap.new_bitmap().map(ToString::to_string);
    DiskForecast {
        mode: match choice.bitmap {
            BitmapPlan::None => Mode::Untracked,
            BitmapPlan::New { .. } => Mode::Full,
            BitmapPlan::Reuse { .. } => Mode::Incremental,
        },
        base: choice.base.map(|base| base.id()),
        dirty_bytes: dirty.map_or(disk.size, |dirty| dirty - mark.min(dirty)),
        bitmap_added: added.map(|added| added.replace(&id, "BACKUP")),
        bitmaps_removed: choice.stale.iter().map(ToString::to_string).collect(),
        bitmap_used: used,
        reason: choice.reason,
        ..untracked(disk)
    }
}

/// One that the archive knows nothing of, being empty itself.
fn first_of_its_archive(disk: &qemu::Disk) -> DiskForecast {
    match lineage::written_unseen(disk) {
        _ if disk.read_only => untracked(disk),
        Some(reason) => DiskForecast {
            reason: Some(reason),
            ..untracked(disk)
        },
        None => DiskForecast {
            mode: Mode::Full,
            reason: Some("the archive holds nothing of this provider's".into()),
            ..untracked(disk)
        },
    }
}

fn untracked(disk: &qemu::Disk) -> DiskForecast {
    DiskForecast {
        name: disk.name.clone(),
        node: Some(disk.node.clone()),
        format: disk.format.clone(),
        size: disk.size,
        mode: Mode::Untracked,
        base: None,
        reason: disk.read_only.then(|| "it is read-only".into()),
        dirty_bytes: disk.size,
        bitmap_used: None,
        bitmap_added: None,
        bitmaps_removed: Vec::new(),
    }
}

/// A file of the host that would be attached.
fn attached(extra: &Extra) -> Result<Option<DiskForecast>, PointError> {
    let Source::File { opened, .. } = &extra.source else {
        return Ok(None);
    };
    // A whole number of sectors, as it is attached.
    let looked = opened.metadata().map_err(|source| ExtraError::Look {
        name: extra.name.clone(),
        source,
    });
    let size = looked?.len().next_multiple_of(512);
    Ok(Some(DiskForecast {
        name: extra.name.clone(),
        node: None,
        format: "raw".into(),
        size,
        mode: Mode::Untracked,
        base: None,
        reason: Some("it is a file that the VM does not have".into()),
        dirty_bytes: size,
        bitmap_used: None,
        bitmap_added: None,
        bitmaps_removed: Vec::new(),
    }))
}
