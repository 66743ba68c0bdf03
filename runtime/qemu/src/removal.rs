//! Taking down what a job made inside QEMU, by ids, in the one order that works:
//! exports, snapshot-access nodes, filters, jobs (and with them their own filters), fleecing nodes, NBD server.
//!
//! Each step asks QEMU first what is there, so a thing that is gone already is no error, and goes on
//! after a failure, so that as little as possible stays. But not after one that waits for storage: an export that does
//! not go, or a command that is not answered. What would come next drains the disks, which stops the VM for as long.
//! Whoever calls this has asked the storage first.

use super::backup_access;
use super::filter;
use super::monitor::{Monitor, MonitorError};
use super::present;
use qapi::qmp::{
    BlockExportRemoveMode, block_export_del, block_job_cancel, blockdev_del, job_dismiss,
    nbd_server_stop,
};
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// How long one thing may take to go. A job that is cancelled first finishes the writes that it holds.
const LIMIT: Duration = Duration::from_secs(30);

/// Pause between two looks, where no event comes earlier.
const PAUSE: Duration = Duration::from_millis(50);

/// Ids of things inside QEMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remains {
    /// Exports of the point in time.
    pub exports: Vec<String>,
    /// The disks' own NBD exports.
    pub probes: Vec<String>,
    /// What Proxmox's QEMU was asked to set up.
    pub backup_access: Option<backup_access::Held>,
    /// Snapshot-access nodes.
    pub access: Vec<String>,
    /// Filters that belong to no job.
    pub filters: Vec<String>,
    /// Block jobs.
    pub jobs: Vec<String>,
    /// Fleecing nodes.
    pub fleecing: Vec<String>,
    /// Files below fleecing nodes.
    pub images: Vec<String>,
    /// Nodes of files that the VM does not have.
    pub extra: Vec<String>,
}

/// What becomes of the NBD server. QEMU has one per process and cannot say who started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerFate {
    /// It is not ours.
    Keep,
    /// We started it: it is stopped, unless an export that is not ours is on it by now.
    StopIfUnused,
}

/// A step that failed; others were tried all the same.
#[derive(Debug, thiserror::Error)]
#[error("could not remove {what}")]
pub struct RemovalError {
    /// What is still there, or may be.
    pub what: Thing,
    /// Why.
    #[source]
    pub reason: Reason,
}

/// A thing that a job makes inside QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thing {
    /// An NBD export.
    Export(String),
    /// What Proxmox's QEMU set up, by its target.
    BackupAccess(String),
    /// A block node.
    Node(String),
    /// A block job and its filter.
    Job(String),
    /// The NBD server.
    Server,
    /// All that is left, where QEMU cannot be told any more.
    Everything,
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Export(id) => write!(f, "export {id}"),
            Self::BackupAccess(target) => write!(f, "backup access {target}"),
            Self::Node(id) => write!(f, "block node {id}"),
            Self::Job(id) => write!(f, "block job {id}"),
            Self::Server => f.write_str("the NBD server"),
            Self::Everything => f.write_str("what the job made inside QEMU"),
        }
    }
}

impl RemovalError {
    /// Whether QEMU cannot be told anything any more.
    pub(super) fn is_lost(&self) -> bool {
        matches!(&self.reason, Reason::Monitor(error) if error.is_lost())
    }
}

/// Why a thing could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The monitor failed or QEMU refused.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// To remove it would end the VM.
    #[error("{0}")]
    Unsafe(String),
    /// It was told to go and did not.
    #[error("it is still there after {} s", .limit.as_secs())]
    StillThere {
        /// The limit.
        limit: Duration,
    },
}

impl Reason {
    /// Whether QEMU, or what it has in flight, may wait for storage.
    fn waits(&self) -> bool {
        matches!(
            self,
            Self::StillThere { .. } | Self::Monitor(MonitorError::TimedOut { .. })
        )
    }
}

/// Removes all that exists of `remains`; returns what could not be removed.
pub(super) async fn remove(
    monitor: &Monitor,
    remains: &Remains,
    server: ServerFate,
) -> Vec<RemovalError> {
    let mut errors = Vec::new();
    let mut note = |what: Thing, result: Result<(), Reason>| {
        if let Err(reason) = result {
            errors.push(RemovalError { what, reason });
        }
    };
    for id in remains.exports.iter().chain(&remains.probes) {
        let result = export(monitor, id).await;
        let waits = result.as_ref().is_err_and(Reason::waits);
        note(Thing::Export(id.clone()), result);
        if waits {
            return errors;
        }
    }
    if let Some(held) = &remains.backup_access {
        let torn_down = backup_access::tear_down(monitor, held).await;
        note(Thing::BackupAccess(held.target.clone()), torn_down);
    }
    for id in &remains.access {
        note(Thing::Node(id.clone()), node(monitor, id).await);
    }
    for id in &remains.filters {
        let withdrawn = filter::withdraw(monitor, id).await;
        note(Thing::Node(id.clone()), withdrawn.map_err(Reason::from));
    }
    for id in &remains.jobs {
        note(Thing::Job(id.clone()), job(monitor, id).await);
    }
    for id in remains
        .fleecing
        .iter()
        .chain(&remains.images)
        .chain(&remains.extra)
    {
        note(Thing::Node(id.clone()), node(monitor, id).await);
    }
    if server == ServerFate::StopIfUnused {
        note(Thing::Server, stop_server(monitor).await);
    }
    // A lost monitor fails every step that was left: said once.
    if let Some(lost) = errors.iter().position(RemovalError::is_lost) {
        let RemovalError { reason, .. } = errors.swap_remove(lost);
        errors.retain(|error| !error.is_lost());
        errors.push(RemovalError {
            what: Thing::Everything,
            reason,
        });
    }
    errors
}

/// Deletes an export, also from under its clients.
async fn export(monitor: &Monitor, id: &str) -> Result<(), Reason> {
    let mut events = monitor.events();
    let deadline = Instant::now() + LIMIT;
    let mut asked = false;
    loop {
        let exports = present::exports(monitor).await?;
        let Some(export) = exports.iter().find(|export| export.id == id) else {
            return Ok(());
        };
        if !asked && !export.shutting_down {
            asked = true;
            let command = block_export_del {
                mode: Some(BlockExportRemoveMode::hard),
                id: id.into(),
            };
            monitor.execute(command).await?;
            continue;
        }
        still_time(deadline)?;
        events.nudge(PAUSE).await;
    }
}

/// Deletes a node, as soon as nothing uses it.
async fn node(monitor: &Monitor, name: &str) -> Result<(), Reason> {
    let mut events = monitor.events();
    let deadline = Instant::now() + LIMIT;
    loop {
        let nodes = present::nodes(monitor).await?;
        if !nodes.iter().any(|node| node.name == name) {
            return Ok(());
        }
        let command = blockdev_del {
            node_name: name.into(),
        };
        match monitor.execute(command).await {
            Ok(_) => return Ok(()),
            // Its last user may be on its way out.
            Err(e) if e.is_refusal() && Instant::now() < deadline => events.nudge(PAUSE).await,
            Err(e) => return Err(e.into()),
        }
    }
}

/// Cancels a job, waits until it has ended, and dismisses it, which releases the nodes it holds.
async fn job(monitor: &Monitor, id: &str) -> Result<(), Reason> {
    let mut events = monitor.events();
    let deadline = Instant::now() + LIMIT;
    let mut asked = false;
    loop {
        let jobs = present::jobs(monitor).await?;
        let Some(job) = jobs.iter().find(|job| job.id == id) else {
            return Ok(());
        };
        if job.status == "concluded" {
            monitor.execute(job_dismiss { id: id.into() }).await?;
            return Ok(());
        }
        if !asked {
            asked = true;
            let command = block_job_cancel {
                force: None,
                device: id.into(),
            };
            match monitor.execute(command).await {
                Ok(_) => continue,
                // It ended by itself between the look and the command: look again.
                Err(e) if e.is_refusal() => {}
                Err(e) => return Err(e.into()),
            }
        }
        still_time(deadline)?;
        events.nudge(PAUSE).await;
    }
}

/// Stops the NBD server that a job of ours started and died with, unless an export is on it by now.
///
/// # Errors
/// Where it may still run.
pub async fn stop_unused_server(monitor: &Monitor) -> Result<(), RemovalError> {
    stop_server(monitor).await.map_err(|reason| RemovalError {
        what: Thing::Server,
        reason,
    })
}

/// Stopping it drops every export, so one with a stranger's export goes on running.
async fn stop_server(monitor: &Monitor) -> Result<(), Reason> {
    let exports = present::exports(monitor).await?;
    if exports.iter().any(|export| export.kind == "nbd") {
        return Ok(());
    }
    match monitor.execute(nbd_server_stop {}).await {
        // QEMU refuses this for one reason: no server is running.
        Err(e) if e.is_refusal() => Ok(()),
        result => Ok(result.map(drop)?),
    }
}

fn still_time(deadline: Instant) -> Result<(), Reason> {
    if Instant::now() < deadline {
        Ok(())
    } else {
        Err(Reason::StillThere { limit: LIMIT })
    }
}
