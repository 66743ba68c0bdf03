//! Cleaning up after a run that died: what it left in QEMU, in the fleecing folder, in the archive, and its bitmaps.
//!
//! Runs under the VM's lock and a claim in QEMU, so that nothing found here belongs to a live job, whoever's.

use super::base::{self, Owner, Recorded, Remedy};
use super::fleecing::Fleecing;
use super::journal::{Journal, JournalError, Record};
use super::power::{self, PowerError, Switch};
use super::signals::Signals;
use super::storage::{Storage, Unanswered};
use crate::archive::{self, Archive, BackupId, Namespace, NamespaceName};
use crate::contract::with_causes;
use crate::event::Events;
use crate::qemu::bitmap::{self, Tracking};
use crate::qemu::claim::{Claim, ClaimError};
use crate::qemu::machine::{self, RunState};
use crate::qemu::removal::{self, RemovalError, ServerFate};
use crate::qemu::snapshot::Probe;
use crate::qemu::{Address, JobId, Monitor, MonitorError, leftovers};
use cap_std::fs::Dir;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why the rest of a dead run could not be cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Something of the dead run is still in QEMU.
    #[error("a job that died left something in QEMU that cannot be removed")]
    Left(#[from] RemovalError),
    /// The archive cannot say what it holds.
    #[error("the archive cannot say what it holds")]
    Archive(#[from] archive::Error),
    /// A fleecing image of the dead run cannot be removed.
    #[error("a fleecing image of a job that died cannot be removed")]
    Files(#[source] io::Error),
    /// The journal cannot be kept, or a live job has it.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Another job has the VM.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The VM cannot be reached.
    #[error(transparent)]
    Power(#[from] PowerError),
    /// It cannot be removed without stopping the VM.
    #[error(
        "what job {job} left in QEMU cannot be removed yet, because {unanswered}, and the VM would stand still until it does; the job's watchdog, or the next run, removes it then"
    )]
    Hangs {
        /// The dead job.
        job: JobId,
        /// Whose storage.
        unanswered: Unanswered,
    },
    /// A VM that a dead run started paused still runs.
    #[error("{0}")]
    StillRuns(String),
}

impl RecoverError {
    /// Whether the user can mend it.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::Power(error) if error.is_mistake())
    }
}

/// Where a dead run may have left something.
#[derive(Clone, Copy)]
pub struct Traces<'a> {
    /// The VM's monitor.
    pub monitor: &'a Monitor,
    /// The folder that this VM's jobs make their fleecing folders in.
    pub fleecing: &'a Dir,
    /// Socket of the NBD server, where jobs on this VM do not start it themselves.
    pub nbd: Option<&'a Path>,
    /// What signals ask of this run.
    pub signals: &'a Signals,
    /// The archive of this run.
    pub archive: &'a Archive,
    /// The provider's part of it.
    pub namespace: &'a Arc<Namespace>,
    /// Whose bitmaps are settled.
    pub owner: &'a Owner,
}

/// Cleans up after the run that `journal` records, and after those that QEMU still shows though no journal does.
pub async fn recover(
    traces: &Traces<'_>,
    journal: &mut Journal,
    events: &Events,
) -> Result<(), RecoverError> {
    if let Some(unreadable) = journal.take_unreadable() {
        events.warn(unreadable);
    }
    if let Some(dead) = journal.record() {
        warn_of(dead, events);
    }
    clean_up(traces, journal, events).await
}

/// The same without a word on whose traces they are: a job that lost its monitor does it for itself.
pub async fn clean_up(
    traces: &Traces<'_>,
    journal: &mut Journal,
    events: &Events,
) -> Result<(), RecoverError> {
    let dead = journal.record().cloned();
    let qemu = InQemu {
        monitor: traces.monitor,
        fleecing: traces.fleecing,
        nbd: traces.nbd,
        signals: traces.signals,
        only: None,
    };
    qemu.remove(dead.as_ref(), events).await?;
    settle_bitmaps(
        traces.monitor,
        traces.namespace,
        traces.owner,
        dead.as_ref(),
        events,
    )
    .await?;
    if let Some(dead) = dead {
        discard_backup(&[traces.archive], &dead, events)?;
        journal.clear()?;
    }
    Ok(())
}

/// A VM that is to be cleaned up and not backed up.
pub struct Patient<'a> {
    /// Its name.
    pub vm: &'a str,
    /// Where its monitor is.
    pub monitor: &'a Address,
    /// Where its journal is, and the path of that.
    pub state: (Dir, PathBuf),
    /// As in [`Traces`].
    pub fleecing: &'a Dir,
    /// Its path.
    pub fleecing_path: &'a Path,
    /// As in [`Traces`].
    pub nbd: Option<&'a Path>,
    /// The command that ends a VM that a job started, where there is one.
    pub stop: &'a [String],
    /// Whose bitmaps are settled, those of all their namespaces: the backups' archive, and the records of exports.
    pub archives: &'a [&'a Archive],
}

/// What [`recover_vm`] found.
#[derive(Debug)]
pub struct Recovered {
    /// Whether there was anything of a dead run.
    pub found: bool,
    /// Namespaces that cannot be looked into, each with why: bitmaps of theirs stay as they are.
    pub unsettled: Vec<String>,
}

/// `fleecebox recover`.
///
/// # Errors
/// Any [`RecoverError`]; what is not cleaned up then is left to the next try.
pub async fn recover_vm(
    patient: Patient<'_>,
    events: &Events,
    signals: &Signals,
) -> Result<Recovered, RecoverError> {
    let Patient {
        vm,
        monitor,
        state: (state, path),
        fleecing,
        fleecing_path,
        nbd,
        stop,
        archives,
    } = patient;
    let mut journal = Journal::open(state, path)?;
    if let Some(unreadable) = journal.take_unreadable() {
        events.warn(unreadable);
    }
    let dead = journal.record().cloned();
    if let Some(dead) = &dead {
        warn_of(dead, events);
    }
    let switch = Switch {
        start: &[],
        stop,
        may_start: false,
    };
    let reached = match power::reach(monitor, switch, &journal, events, &signals.end).await {
        Err(PowerError::Off(_)) => {
            if let Some(dead) = &dead {
                remove_folder(fleecing, &dead.fleecing, events)?;
                discard_backup(archives, dead, events)?;
                // The journal stays until the disks' bitmaps can be seen.
                events.note("the VM does not run; its next backup settles its bitmaps");
            }
            return Ok(Recovered {
                found: dead.is_some(),
                unsettled: Vec::new(),
            });
        }
        reached => reached?,
    };
    let monitor = &reached.monitor;
    let claim = Claim::make(monitor, fleecing_path).await?;
    let qemu = InQemu {
        monitor,
        fleecing,
        nbd,
        signals,
        only: None,
    };
    let settled = qemu.settle(archives, vm, dead.as_ref(), events).await;
    if let Some(claim) = claim {
        claim.release(monitor).await;
    }
    let Recovered { found, unsettled } = settled?;
    if let Some(dead) = &dead {
        discard_backup(archives, dead, events)?;
        journal.clear()?;
    }
    let put_back = reached.put_back(&journal, events).await;
    put_back.map_err(RecoverError::StillRuns)?;
    Ok(Recovered {
        found: found || dead.is_some(),
        unsettled,
    })
}

fn owner(archive: &Archive, namespace: NamespaceName, vm: &str) -> Owner {
    Owner {
        archive: archive.id(),
        namespace,
        vm: vm.into(),
    }
}

fn warn_of(dead: &Record, events: &Events) {
    events.warn(format!(
        "the last job on this VM ({}, backup {}) {}; cleaning up after it",
        dead.job,
        dead.backup,
        how_it_ended(dead)
    ));
}

/// What became of a job that left its journal.
pub(super) fn how_it_ended(dead: &Record) -> String {
    match dead.ended {
        true => "could not take back all that it had made".into(),
        false => format!("died at step '{}'", dead.step.name()),
    }
}

/// What jobs make inside QEMU and for it.
pub(super) struct InQemu<'a> {
    pub(super) monitor: &'a Monitor,
    pub(super) fleecing: &'a Dir,
    pub(super) nbd: Option<&'a Path>,
    pub(super) signals: &'a Signals,
    /// What others left, or hold, is not touched.
    pub(super) only: Option<JobId>,
}

impl InQemu<'_> {
    /// As [`InQemu::remove`], and settles the bitmaps of all `archives`.
    async fn settle(
        &self,
        archives: &[&Archive],
        vm: &str,
        dead: Option<&Record>,
        events: &Events,
    ) -> Result<Recovered, RecoverError> {
        let found = self.remove(dead, events).await?;
        let mut unsettled = Vec::new();
        for archive in archives {
            for name in archive.namespaces()? {
                // One that is bad must not keep the others' bitmaps from being settled.
                let namespace = match archive.namespace(&name) {
                    Ok(namespace) => Arc::new(namespace),
                    Err(error) => {
                        unsettled.push(format!("namespace {name}: {}", with_causes(&error)));
                        continue;
                    }
                };
                let owner = owner(archive, name, vm);
                settle_bitmaps(self.monitor, &namespace, &owner, dead, events).await?;
            }
        }
        Ok(Recovered { found, unsettled })
    }

    /// Removes what the dead run and others left. Returns whether QEMU showed anything.
    pub(super) async fn remove(
        &self,
        dead: Option<&Record>,
        events: &Events,
    ) -> Result<bool, RecoverError> {
        let mut folders: BTreeSet<String> = dead.iter().map(|dead| dead.fleecing.clone()).collect();
        // Without nodes and exports the server may still be there: it is what a job stops last.
        let mut server_started = dead.is_some_and(|dead| dead.nbd_server);
        let mut found = leftovers::find(self.monitor).await?;
        found.retain(|job, _| self.only.is_none_or(|only| only == *job));
        let any = !found.is_empty();
        // A fleecing image that nobody watched any more may have filled up and failed the guest's writes.
        let stopped = any
            && machine::run_state(self.monitor)
                .await?
                .as_ref()
                .is_some_and(RunState::is_io_error);
        for (job, leftover) in found {
            if dead.is_some_and(|dead| dead.job == job.to_string()) {
                events.note(format!("removing what job {job} left in QEMU"));
            } else {
                events.warn(format!(
                    "a job that no journal tells of ({job}) left something in QEMU; removing it"
                ));
                folders.insert(Fleecing::name(job));
                server_started |= self.nbd.is_none();
            }
            let storage = storage(self.fleecing, self.nbd, job, leftover.probes.clone());
            let answers = storage.wait(events, self.signals).await;
            answers.map_err(|unanswered| RecoverError::Hangs { job, unanswered })?;
            let errors = leftovers::remove(self.monitor, &leftover, ServerFate::Keep).await;
            if let Some(error) = errors.into_iter().next() {
                return Err(error.into());
            }
        }
        if stopped {
            events.warn(
                "an I/O error stopped the VM while a dead job's snapshot was in it; it is continued",
            );
            self.monitor.execute(qapi::qmp::cont {}).await?;
        }
        if server_started {
            removal::stop_unused_server(self.monitor).await?;
        }
        for folder in folders {
            remove_folder(self.fleecing, &folder, events)?;
        }
        Ok(any)
    }
}

/// That of the disks of a dead `job`, by the server that it started in its folder, or by `nbd`.
pub(super) fn storage(
    fleecing: &Dir,
    nbd: Option<&Path>,
    job: JobId,
    probes: Vec<Probe>,
) -> Storage {
    let own = || {
        let folder = PathBuf::from(format!("/proc/self/fd/{}", fleecing.as_raw_fd()));
        folder.join(job.folder()).join(super::fleecing::SOCKET)
    };
    Storage::new(&nbd.map_or_else(own, Path::to_owned), probes)
}

fn remove_folder(fleecing: &Dir, folder: &str, events: &Events) -> Result<(), RecoverError> {
    match super::fleecing::remove_folder(fleecing, folder) {
        Ok(true) => events.note("removed its fleecing images"),
        Ok(false) => {}
        Err(error) => return Err(RecoverError::Files(error)),
    }
    Ok(())
}

async fn settle_bitmaps(
    monitor: &Monitor,
    namespace: &Arc<Namespace>,
    owner: &Owner,
    dead: Option<&Record>,
    events: &Events,
) -> Result<(), RecoverError> {
    let found = bitmap::find(monitor).await?;
    let dead = dead.map(|dead| dead.backup.as_str());
    for remedy in base::remedies(owner, &found, dead, |id| recorded(namespace, id))? {
        match remedy {
            Remedy::Accept { node, plan } => {
                events.note(format!(
                    "{node}: the last backup is committed; its old bitmap is removed"
                ));
                bitmap::accept(monitor, &node, &plan).await?;
            }
            Remedy::BackOut { node, plan } => {
                let what = match plan.old() {
                    Some(_) => "its changes are merged back",
                    None => "its bitmap is removed",
                };
                events.note(format!(
                    "{node}: nothing can be built on the last backup; {what}"
                ));
                if bitmap::back_out(monitor, &node, &plan).await? == Tracking::Lost {
                    events.warn(format!(
                        "{node}: its bitmap could not be made whole; it will be read in full"
                    ));
                }
            }
        }
    }
    Ok(())
}

fn discard_backup(
    archives: &[&Archive],
    dead: &Record,
    events: &Events,
) -> Result<(), RecoverError> {
    let (Ok(id), Ok(name)) = (dead.backup.parse(), dead.namespace.parse()) else {
        return Ok(());
    };
    let mut archives = archives.iter();
    let Some(archive) = archives.find(|archive| archive.id().to_string() == dead.archive) else {
        events.warn(format!(
            "backup {id} was for another archive ({}); if it did not commit, what it stored there stays",
            dead.archive
        ));
        return Ok(());
    };
    let namespace = match archive.namespace(&name) {
        Err(archive::Error::NotFound { .. } | archive::Error::HalfMade { .. }) => return Ok(()),
        namespace => namespace?,
    };
    match recorded(&namespace, id)? {
        Recorded::Absent => {
            namespace.discard_uncommitted(id)?;
            events.note(format!(
                "removed what backup {id}, which never committed, left in the archive"
            ));
        }
        Recorded::Committed(_) => events.note(format!("backup {id} is committed and stays")),
        Recorded::Exported(_) => events.note(format!("export {id} is recorded and stays")),
        Recorded::Damaged { reason } => events.warn(format!(
            "backup {id} is committed and stays, but it is damaged: {reason}"
        )),
    }
    Ok(())
}

/// What the archive says of backup or export `id`, and will still say after a loss of power. Before exports had records of
/// their own, each was recorded as a backup without bytes: such a one is read and judged as a backup.
pub fn recorded(namespace: &Namespace, id: BackupId) -> Result<Recorded, archive::Error> {
    let backup = namespace.durable_manifest(id);
    let found = match backup.map(|manifest| Recorded::Committed(Arc::new(manifest))) {
        Err(archive::Error::NotFound { .. }) => {
            let export = namespace.durable_export(id);
            export.map(|record| Recorded::Exported(Arc::new(record)))
        }
        found => found,
    };
    match found {
        Err(archive::Error::NotFound { .. }) => Ok(Recorded::Absent),
        Err(error @ archive::Error::Damaged { .. }) => Ok(Recorded::Damaged {
            reason: with_causes(&error),
        }),
        found => found,
    }
}
