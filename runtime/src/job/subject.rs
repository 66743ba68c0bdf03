//! The VM that a job is for: reached, looked at, and put back as it was.

use super::base::{self, BuiltOn, Choice, ChoiceError, Owner, Recorded};
use super::extra::Extra;
use super::journal::{Journal, JournalError};
use super::point_in_time::PointError;
use super::power::{self, Switch};
use super::recover::{self, Traces};
use super::selection::{self, Selected, Selection};
use super::signals::Signals;
use crate::archive::{Archive, BackupId, LeftOut, Namespace};
use crate::config::Vm;
use crate::contract::{BLOCK_SIZE, with_causes};
use crate::event::Events;
use crate::qemu::claim::{Claim, ClaimError};
use crate::qemu::machine::Standing;
use crate::qemu::{self, Address, Monitor, Schema, machine};
use crate::sandbox::Program;
use cap_std::fs::Dir;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// A VM, as a job is given it.
#[derive(Debug)]
pub struct VmAccess {
    /// Its name: part of its bitmaps' names and of the manifest.
    pub name: String,
    /// Its sockets and disks.
    pub config: Vm,
    /// Where its monitor is.
    pub monitor: Address,
    /// Further volumes.
    pub extra: Vec<Extra>,
}

/// Where the jobs on a VM keep what is theirs on this host. The caller opened them.
#[derive(Debug)]
pub struct Folders {
    /// The VM's folder in the state folder, and its path for errors.
    pub state: (Dir, PathBuf),
    /// Where fleecing images go, and its absolute path for QEMU.
    pub fleecing: (Dir, PathBuf),
}

impl Folders {
    /// The VM's journal, which is there for one job at a time.
    pub fn journal(&self) -> Result<Journal, JournalError> {
        let (folder, path) = &self.state;
        Journal::open(folder.try_clone()?, path.clone())
    }
}

/// The VM that a point in time is of, and where jobs on it leave their traces.
pub struct Subject<'a> {
    /// The VM.
    pub vm: &'a VmAccess,
    /// By whose word disks are taken or left out.
    pub selection: &'a Selection,
    /// Of the VM's jobs.
    pub folders: &'a Folders,
    /// Where it is recorded what can be built on.
    pub archive: &'a Archive,
    /// The part of it that is this job's.
    pub namespace: &'a Arc<Namespace>,
    /// Whose bitmaps are looked at.
    pub owner: &'a Owner,
    /// Read every disk in full.
    pub full: bool,
    /// What its watchdog's process runs.
    pub program: &'a Program,
    /// Where the job tells what it does.
    pub events: &'a Events,
    /// What signals ask of it.
    pub signals: &'a Signals,
}

impl<'a> Subject<'a> {
    /// Its disks, with what each builds on in a backup or export `id`, those that are left out, and what QEMU can do.
    pub async fn disks(
        &self,
        monitor: &Monitor,
        id: BackupId,
    ) -> Result<(Vec<(qemu::Disk, Choice)>, Vec<LeftOut>, Schema), PointError> {
        let selected = self.select(monitor).await?;
        let Self {
            owner, namespace, ..
        } = *self;
        let disks = choose(owner, namespace, self.full, selected.disks, id, self.events)?;
        Ok((disks, selected.left_out, selected.schema))
    }

    /// Its disks alone.
    pub async fn select(&self, monitor: &Monitor) -> Result<Selected, PointError> {
        let VmAccess { config, extra, .. } = self.vm;
        selection::select(config, self.selection, extra, monitor, self.events).await
    }

    /// What is looked at to clean up after a job, over `monitor`.
    pub fn traces(&self, monitor: &'a Monitor) -> Traces<'a> {
        Traces {
            monitor,
            fleecing: &self.folders.fleecing.0,
            nbd: self.vm.config.nbd.as_deref(),
            signals: self.signals,
            archive: self.archive,
            namespace: self.namespace,
            owner: self.owner,
        }
    }
}

/// Does `job` on a VM that is started for it where it does not run, and put back as it was. What `job` could not clean
/// up is done over a new connection where only the monitor was lost; the rest is returned along with what it came to.
pub async fn on_vm<T, E: From<PointError>>(
    subject: &Subject<'_>,
    journal: &mut Journal,
    job: impl AsyncFnOnce(&Monitor, &mut Journal) -> Result<(T, Vec<String>), E>,
) -> Result<(T, Vec<String>), E> {
    let events = subject.events;
    let Vm { start, stop, .. } = &subject.vm.config;
    let switch = Switch {
        start,
        stop,
        may_start: true,
    };
    let reached = power::reach(
        &subject.vm.monitor,
        switch,
        journal,
        events,
        &subject.signals.end,
    )
    .await;
    let mut reached = reached.map_err(PointError::from)?;
    let claim = Claim::make(&reached.monitor, &subject.folders.fleecing.1).await;
    let claim = match claim {
        Ok(claim) => claim,
        Err(error) => {
            // Not in the midst of another's job.
            if !matches!(error, ClaimError::Busy { .. })
                && let Err(still) = reached.put_back(journal, events).await
            {
                events.warn(still);
            }
            return Err(PointError::from(error).into());
        }
    };
    if claim.is_none() {
        events.warn(
            "this QEMU takes no claim, so a job that works with another state folder cannot see this one",
        );
    }
    let mut done = job(&reached.monitor, journal).await;
    if reached.monitor.is_lost()
        && let Ok(monitor) = Monitor::reach(&subject.vm.monitor).await
    {
        // QEMU runs on, with all in it that the job could not take down.
        events.note("the monitor was lost and answers again; cleaning up over a new connection");
        match (
            recover::clean_up(&subject.traces(&monitor), journal, events).await,
            &mut done,
        ) {
            (Ok(()), Ok((_, left))) => left.clear(),
            (Ok(()), Err(_)) => {}
            (Err(error), _) => events.warn(with_causes(&error)),
        }
        reached.monitor = monitor;
    }
    if let Some(claim) = claim {
        claim.release(&reached.monitor).await;
    }
    if let Err(still) = reached.put_back(journal, events).await {
        match &mut done {
            Ok((_, left)) => left.push(still),
            Err(_) => events.warn(still),
        }
    }
    done
}

/// Whether the guest runs; a storage daemon, which has none, never stands still.
pub async fn standing(subject: &Subject<'_>, monitor: &Monitor) -> Result<Standing, PointError> {
    let Some(state) = machine::run_state(monitor).await? else {
        return Ok(Standing::Runs);
    };
    let standing = state.standing()?;
    if standing == Standing::Still {
        let agent = match &subject.vm.config.agent {
            Some(_) => ", without asking its agent",
            None => "",
        };
        subject.events.note(format!(
            "the VM does not run (it is {}); its disks are taken as they are{agent}",
            state.status
        ));
    }
    Ok(standing)
}

/// What each disk builds on, in a backup or export `id`; nothing where all is to be read in `full`.
pub fn choose(
    owner: &Owner,
    namespace: &Namespace,
    full: bool,
    found: Vec<qemu::Disk>,
    id: BackupId,
    events: &Events,
) -> Result<Vec<(qemu::Disk, Choice)>, PointError> {
    // The disks of one backup mostly share their base.
    let mut known = BTreeMap::new();
    let mut disks = Vec::new();
    for disk in found {
        let choice = if disk.read_only {
            Choice::untracked("it is read-only and has no bitmap")
        } else {
            let choice = base::choose(owner, &disk, id, BLOCK_SIZE, |id| {
                if let Some(known) = known.get(&id) {
                    return Ok(Recorded::clone(known));
                }
                let found = recover::recorded(namespace, id)?;
                known.insert(id, found.clone());
                Ok(found)
            })?;
            if full {
                choice
                    .in_full(owner, &disk, id)
                    .map_err(ChoiceError::from)?
            } else {
                unless_lacking(owner, namespace, choice, &disk, id, events)?
            }
        };
        tell_choice(events, &disk, &choice);
        disks.push((disk, choice));
    }
    tell_missing(events, &disks);
    Ok(disks)
}

/// The choice, or the disk read in full where its base lacks something: afterwards there would be nothing left to read.
fn unless_lacking(
    owner: &Owner,
    namespace: &Namespace,
    choice: Choice,
    disk: &qemu::Disk,
    id: BackupId,
    events: &Events,
) -> Result<Choice, ChoiceError> {
    let Some(base) = choice.base.as_ref().and_then(BuiltOn::backup) else {
        return Ok(choice);
    };
    let Some(lack) = namespace.lack_of(&base.manifest, &disk.name)? else {
        return Ok(choice);
    };
    let backup = base.manifest.backup;
    let reason = format!(
        "the base {backup} cannot be restored any more ({})",
        lack.why
    );
    let mut miss: Vec<_> = namespace.who_needs(&lack.file)?;
    miss.sort_unstable_by(|a, b| b.cmp(a));
    events.warn(format!(
        "{}: {reason}; it is read in full. Backups that refer to {}: {}",
        disk.name,
        lack.file,
        named(&miss)
    ));
    Ok(choice.without_base(owner, disk, id, reason)?)
}

/// The latest of them by name, the others by number.
fn named(backups: &[BackupId]) -> String {
    /// As many as fit a line or two.
    const NAMED: usize = 8;
    let (first, rest) = backups.split_at(backups.len().min(NAMED));
    let mut names: Vec<_> = first.iter().map(ToString::to_string).collect();
    if !rest.is_empty() {
        names.push(format!("{} older ones", rest.len()));
    }
    match names.is_empty() {
        true => "none that can be read".into(),
        false => names.join(", "),
    }
}

pub(super) fn tell_choice(events: &Events, disk: &qemu::Disk, choice: &Choice) {
    events.note(format!(
        "{} ({}, {} bytes): {}",
        disk.name,
        disk.format,
        disk.size,
        in_words(disk, choice)
    ));
}

/// What was chosen for `disk`, and why.
fn in_words(disk: &qemu::Disk, choice: &Choice) -> String {
    match (&choice.base, &choice.reason) {
        (Some(base), _) => format!("incremental since {}", base.id()),
        (None, Some(reason)) => format!("read in full: {reason}"),
        (None, None) if disk.can_persist => {
            "read in full: it has no bitmap of this archive (it is new here, or QEMU ended without storing it)".into()
        }
        (None, None) => {
            "read in full: it has no bitmap of this archive (its image keeps none when QEMU ends)"
                .into()
        }
    }
}

/// Says which volumes of the bases are no more: removed from the VM, or not chosen this time.
fn tell_missing(events: &Events, disks: &[(qemu::Disk, Choice)]) {
    let mut missing = BTreeMap::new();
    for base in disks.iter().filter_map(|(_, choice)| choice.base.as_ref()) {
        for volume in base.volumes() {
            if !disks.iter().any(|(disk, _)| disk.name == volume) {
                missing.insert(volume, base.id());
            }
        }
    }
    for (volume, base) in missing {
        events.note(format!("{volume} was in {base} and is not in this backup"));
    }
}
