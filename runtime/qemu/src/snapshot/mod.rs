//! The point in time of all disks, in one transaction, and the exports that read as of it.
//!
//! Each disk has an export of its own beside the one of the point in time, until [`PointInTime::finish`], by which its
//! storage can be asked whether it answers: a drain of storage that hangs stops the whole VM. QEMU drains all that it
//! has, so what is not in the point in time has one as well.
//!
//! [`take`] either makes all of it or takes back what it made. If its future is dropped half-way,
//! things stay inside QEMU (see [`super::leftovers`]) and the guest may stay frozen (see
//! [`super::watchdog`]).

mod error;
mod make;

use super::agent::{Agent, Freeze};
use super::backup_access::{self};
use super::bitmap::{BitmapName, BitmapPlan};
use super::filter::{self};
use super::ids::{JobId, OwnId, Role};
use super::machine::Disk;
use super::mark;
use super::monitor::{Monitor, MonitorError};
use super::present;
use super::removal::{self, Remains, RemovalError, ServerFate};
use super::schema::Schema;
pub use error::{Cause, SnapshotError, UndoError};
pub use make::NOT_FROZEN;
use make::{Frozen, make, undo};
use serde_json::json;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Seconds that a guest's write may wait for its old data to be copied before the snapshot is given
/// up instead, where QEMU offers that. Guests give up on a request after 30 to 60 s.
pub(super) const CBW_TIMEOUT_SECONDS: u32 = 20;

/// How QEMU keeps the old data of overwritten blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// A backup job per disk, all in one transaction: the VM runs on. Where QEMU's jobs do not offer otherwise, a
    /// guest's write fails if its old data cannot be kept.
    #[default]
    Job,
    /// A filter between each device and its disk, put in while the VM is stopped for a moment. A snapshot that cannot
    /// be kept is given up, the guest's writes succeed.
    Filter,
    /// Proxmox's QEMU does it, by its backup-access API: filters as well, put in one after the other, so that the VM is
    /// stopped for it.
    BackupAccess,
}

impl Form {
    /// Whether a VM that runs is stopped for a moment.
    pub fn stops(self) -> bool {
        match self {
            Self::Job => false,
            Self::Filter | Self::BackupAccess => true,
        }
    }
}

/// What a fleecing file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FleecingFormat {
    /// As large as the disk, with holes.
    #[default]
    Raw,
    /// QEMU's own format, for file systems without holes: empty, made by QEMU.
    Qcow2,
}

/// What to freeze, and for whom.
#[derive(Debug, Clone)]
pub struct PointRequest {
    /// Goes into every id.
    pub job: JobId,
    /// Granularity of new bitmaps in bytes: a power of two, 512 or more (QMP `block-dirty-bitmap-add`).
    pub block_size: u32,
    /// One for each disk.
    pub plans: Vec<Plan>,
    /// Where the exports go.
    pub server: NbdServer,
    /// What may be asked of the exports.
    pub readers: Readers,
    /// How old data is kept.
    pub form: Form,
    /// What the fleecing files are.
    pub format: FleecingFormat,
    /// Whether there is no point in time without the guest being frozen, where there is an agent.
    pub freeze: Freeze,
}

/// What may be asked of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Reads, and giving back what has been read (NBD `TRIM`), which needs an export that calls itself writable;
    /// writes are refused by the node itself.
    Discard,
    /// Reads only. QEMU's FUSE exports share a node with no export that calls itself writable.
    ReadOnly,
}

/// One disk of a point in time.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The disk, as [`super::machine::disks`] found it just before.
    pub disk: Disk,
    /// A sparse file of exactly the disk's size, or an empty one for qcow2, made by the caller, by an absolute path that QEMU can
    /// open for writing. The caller keeps a descriptor, and deletes the file in the end.
    pub fleecing: PathBuf,
    /// The same file, for a QEMU that may not open it.
    pub descriptor: Option<Arc<OwnedFd>>,
    /// What happens to its bitmaps.
    pub bitmap: BitmapPlan,
}

/// Which NBD server the exports are added to. QEMU has one per process.
#[derive(Debug, Clone)]
pub enum NbdServer {
    /// One that is started on this unix socket, by an absolute path that QEMU can create.
    Start(PathBuf),
    /// One that somebody else started and keeps running, on this unix socket.
    Shared(PathBuf),
}

impl NbdServer {
    /// The socket.
    pub fn socket(&self) -> &Path {
        match self {
            Self::Start(socket) | Self::Shared(socket) => socket,
        }
    }
}

/// All disks as of one moment, ready to be read. Dropping it leaves everything in place.
#[derive(Debug)]
pub struct PointInTime {
    /// In the order of the request.
    pub volumes: Vec<Volume>,
    /// The unix socket of the NBD server.
    pub socket: PathBuf,
    /// How long the guest's file systems were frozen, where they were, the agent's part included.
    pub frozen: Option<Duration>,
    /// How long the VM was stopped, where it was.
    pub stopped: Option<Duration>,
    /// Whether all disks are as of one moment. If not, each is as of one of its own.
    pub one_moment: bool,
    /// What QEMU told on the way that is worth a line in the log.
    pub notes: Vec<String>,
    job: JobId,
    server: ServerFate,
    form: Form,
    format: FleecingFormat,
    nodes: Nodes,
}

/// What the nodes of a point in time are called, in the order of the disks.
#[derive(Debug, Clone, Default)]
struct Nodes {
    /// Of the fleecing images.
    fleecing: Vec<String>,
    /// That read as of the point in time.
    access: Vec<String>,
    /// What Proxmox's QEMU holds, from when it was asked to.
    held: Option<backup_access::Held>,
    /// The exports of what is not in the point in time, each with its node.
    others: Vec<(String, Probe)>,
    /// Of the disks that devices had.
    plugged: BTreeSet<String>,
}

impl Nodes {
    /// By our ids, but where Proxmox's QEMU looks for them by names of its own.
    async fn of(monitor: &Monitor, request: &PointRequest) -> Result<Self, Cause> {
        let all = |role| {
            (0..)
                .zip(&request.plans)
                .map(move |(index, _)| id(request.job, role, index))
        };
        let mut nodes = Self {
            fleecing: all(Role::Fleecing).collect(),
            access: all(Role::Access).collect(),
            held: None,
            others: Vec::new(),
            plugged: BTreeSet::new(),
        };
        if request.form == Form::BackupAccess {
            for (name, plan) in nodes.fleecing.iter_mut().zip(&request.plans) {
                let device = backup_access::device_of(monitor, &plan.disk).await;
                *name = backup_access::fleecing_node(&device.map_err(Cause::Monitor)?)?;
            }
            // Before any of them counts as ours.
            backup_access::refuse_taken(monitor, &nodes.fleecing).await?;
            // QEMU's own, known once they are there.
            nodes.access.clear();
        }
        Ok(nodes)
    }
}

/// A disk that no device has any more, and that QEMU still has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplugged {
    /// Its name.
    pub disk: String,
    /// Its node.
    pub node: String,
    /// Whether it is in the point in time.
    pub taken: bool,
}

/// An export of a disk itself, read-only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Whose storage it tells of.
    pub disk: String,
    /// Its id, which is also its NBD name.
    pub export: String,
}

/// One disk of a [`PointInTime`].
#[derive(Debug, Clone)]
pub struct Volume {
    /// The NBD name of its export, which is also the export's id.
    pub export: String,
    /// The NBD meta context that tells what is dirty, where the old bitmap is used.
    pub dirty_context: Option<String>,
    /// What was asked for.
    pub plan: Plan,
}

/// Why the snapshot can no longer be believed.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The job that keeps old data is gone.
    #[error("the snapshot of disk {disk} is gone: its job does not exist any more")]
    Gone {
        /// The disk.
        disk: String,
    },
    /// The job ended, is ending, or met an error.
    #[error("the snapshot of disk {disk} is broken: its job is {status}{}", .error.as_ref().map(|said| format!(" ({said})")).unwrap_or_default())]
    Failed {
        /// The disk.
        disk: String,
        /// QMP's `JobStatus`, or `BlockDeviceIoStatus`.
        status: String,
        /// What QEMU said.
        error: Option<String>,
    },
}

/// Takes the point in time: fleecing nodes; freeze, where there is an agent; one transaction; thaw;
/// then the nodes and exports to read by.
///
/// The caller arms the watchdog before, where there is an agent, and disarms it afterwards unless
/// [`SnapshotError::frozen`] says that the guest is still frozen.
///
/// # Errors
/// A [`SnapshotError`]; tracking then is what it was before.
pub async fn take(
    monitor: &Monitor,
    schema: &Schema,
    request: PointRequest,
    agent: Option<&mut Agent>,
) -> Result<PointInTime, SnapshotError> {
    let mut server = ServerFate::Keep;
    let mut frozen = Frozen::default();
    let mut nodes = Nodes::default();
    let made = make(
        monitor,
        schema,
        &request,
        agent,
        &mut server,
        &mut frozen,
        &mut nodes,
    )
    .await;
    match made {
        Ok(()) => Ok(PointInTime {
            volumes: volumes(&request),
            socket: request.server.socket().into(),
            frozen: frozen.time,
            stopped: frozen.stopped.time,
            one_moment: frozen.one_moment,
            notes: frozen.notes,
            job: request.job,
            server,
            form: request.form,
            format: request.format,
            nodes,
        }),
        Err(cause) => Err(SnapshotError {
            cause,
            frozen: frozen.still,
            stopped: frozen.stopped.still,
            left: undo(monitor, &request, server, &nodes).await,
        }),
    }
}

impl PointInTime {
    /// The job in whose name all was made.
    pub fn job(&self) -> JobId {
        self.job
    }

    /// Whether we started the NBD server: the journal needs it, as QEMU cannot say so later.
    pub fn server(&self) -> ServerFate {
        self.server
    }

    /// Whether every disk's job still keeps old data (QMP `query-jobs`, `query-block-jobs`).
    ///
    /// A snapshot that QEMU gave up (`break-snapshot`) may show nowhere but in reads: read a cluster
    /// that was never trimmed as well.
    ///
    /// # Errors
    /// A [`Broken`].
    pub async fn check_alive(&self, monitor: &Monitor) -> Result<(), Broken> {
        match self.form {
            Form::Job => self.check_jobs(monitor).await,
            Form::Filter => self.check_filters(monitor).await,
            Form::BackupAccess => self.check_access(monitor).await,
        }
    }

    async fn check_filters(&self, monitor: &Monitor) -> Result<(), Broken> {
        for (index, volume) in (0..).zip(&self.volumes) {
            let filter = id(self.job, Role::Filter, index);
            if !filter::holds(monitor, &filter, &volume.plan.disk).await? {
                return Err(Broken::Gone {
                    disk: volume.plan.disk.name.clone(),
                });
            }
        }
        Ok(())
    }

    async fn check_access(&self, monitor: &Monitor) -> Result<(), Broken> {
        let nodes = present::nodes(monitor).await?;
        for (volume, access) in self.volumes.iter().zip(&self.nodes.access) {
            if !nodes.iter().any(|node| node.name == *access) {
                return Err(Broken::Gone {
                    disk: volume.plan.disk.name.clone(),
                });
            }
        }
        Ok(())
    }

    async fn check_jobs(&self, monitor: &Monitor) -> Result<(), Broken> {
        let jobs = present::jobs(monitor).await?;
        let block_jobs = present::block_jobs(monitor).await?;
        for (index, volume) in (0..).zip(&self.volumes) {
            let id = id(self.job, Role::Job, index);
            let disk = || volume.plan.disk.name.clone();
            let Some(job) = jobs.iter().find(|job| job.id == id) else {
                return Err(Broken::Gone { disk: disk() });
            };
            let failed = |status: &str| Broken::Failed {
                disk: disk(),
                status: status.into(),
                error: job.error.clone(),
            };
            // A drain pauses a job for a moment; that is no harm.
            let keeps = ["running", "paused", "ready", "standby"].contains(&job.status.as_str());
            if !keeps || job.error.is_some() {
                return Err(failed(&job.status));
            }
            let trouble = block_jobs
                .iter()
                .find(|job| job.id == id && !["ok", ""].contains(&job.io_status.as_str()));
            if let Some(job) = trouble {
                return Err(failed(&job.io_status));
            }
        }
        Ok(())
    }

    /// Lets a disk, which must be exported with [`Readers::ReadOnly`], be read as the file `path` too, which is there and
    /// empty, by QEMU's own FUSE export. It takes no discard, and goes with [`PointInTime::teardown`].
    ///
    /// # Errors
    /// Those of [`Monitor::execute_raw`].
    pub async fn add_file(
        &self,
        monitor: &Monitor,
        index: u16,
        path: &Path,
    ) -> Result<(), MonitorError> {
        let arguments = json!({
            "type": "fuse",
            "id": id(self.job, Role::File, index),
            "node-name": self.nodes.access.get(usize::from(index)),
            "mountpoint": path,
            "writable": false,
        });
        let added = monitor.execute_raw("block-export-add", arguments).await;
        added.map(drop)
    }

    /// An export of a disk of nothing, `index`'s size: discard a block of it, then [`PointInTime::set_mark`]. It goes with
    /// [`PointInTime::teardown`].
    ///
    /// # Errors
    /// Those of [`Monitor::execute_raw`].
    pub async fn prepare_mark(
        &self,
        monitor: &Monitor,
        index: u16,
        disk: &Disk,
        granularity: u32,
    ) -> Result<String, MonitorError> {
        mark::prepare(monitor, self.job, index, disk, granularity).await
    }

    /// Makes dirty in `bitmap` what was discarded.
    ///
    /// # Errors
    /// Those of [`Monitor::execute_raw`].
    pub async fn set_mark(
        &self,
        monitor: &Monitor,
        index: u16,
        disk: &Disk,
        bitmap: &BitmapName,
    ) -> Result<(), MonitorError> {
        mark::pour(monitor, self.job, index, disk, bitmap).await
    }

    /// From now on what is given back of a disk also leaves its fleecing image, which it does not yet where that is qcow2
    /// and the disk has an old bitmap: what is clean by it is given back first, all of the disk at most, and to
    /// discard where it holds nothing qcow2 writes a table of 64 KiB for each 512 MiB.
    ///
    /// # Errors
    /// Those of [`Monitor::execute_raw`]; the image then grows and does not shrink.
    pub async fn make_room(&self, monitor: &Monitor, index: u16) -> Result<(), MonitorError> {
        let number = usize::from(index);
        let (Some(volume), Some(node)) =
            (self.volumes.get(number), self.nodes.fleecing.get(number))
        else {
            return Ok(());
        };
        if self.format == FleecingFormat::Raw || volume.plan.bitmap.old().is_none() {
            return Ok(());
        }
        let image = id(self.job, Role::Image, index);
        let options = json!({ "options": [make::qcow2(node, &image, true)] });
        let reopened = monitor.execute_raw("blockdev-reopen", options).await;
        reopened.map(drop)
    }

    /// The exports by which the storage of each disk can be asked.
    pub fn probes(&self) -> Vec<Probe> {
        let probe = |(index, volume): (u16, &Volume)| Probe {
            disk: volume.plan.disk.name.clone(),
            export: id(self.job, Role::Probe, index),
        };
        let own = (0..).zip(&self.volumes).map(probe);
        let others = self.nodes.others.iter().map(|(_, probe)| probe.clone());
        own.chain(others).collect()
    }

    /// Takes everything down but what [`PointInTime::finish`] does, and the bitmaps, which [`super::bitmap::accept`] or
    /// [`super::bitmap::back_out`] settle next. May be called again after a failure. The fleecing files are the caller's to
    /// delete. The storage of all disks has to answer, or the VM stands still.
    ///
    /// Returns what could not be removed.
    pub async fn teardown(&self, monitor: &Monitor) -> Vec<RemovalError> {
        let remains = Remains {
            extra: Vec::new(),
            probes: Vec::new(),
            ..self.remains()
        };
        removal::remove(monitor, &remains, ServerFate::Keep).await
    }

    /// Takes down what is left, and as [`PointInTime::teardown`]: the disks' own exports, the nodes of files that the VM
    /// does not have, the NBD server.
    pub async fn finish(&self, monitor: &Monitor) -> Vec<RemovalError> {
        let Remains { probes, extra, .. } = self.remains();
        let remains = Remains {
            probes,
            extra,
            ..Remains::default()
        };
        removal::remove(monitor, &remains, self.server).await
    }

    /// Disks that were unplugged meanwhile: what was made here kept whoever did it from removing their nodes. To be asked
    /// after [`PointInTime::finish`].
    ///
    /// # Errors
    /// Those of [`Monitor::query`].
    pub async fn unplugged(&self, monitor: &Monitor) -> Result<Vec<Unplugged>, MonitorError> {
        let Nodes {
            others, plugged, ..
        } = &self.nodes;
        if others.is_empty() && plugged.is_empty() {
            return Ok(Vec::new());
        }
        let graph = present::graph(monitor).await?;
        let taken = self.volumes.iter().map(|volume| &volume.plan.disk);
        let taken = taken.filter(|disk| plugged.contains(&disk.node));
        let taken = taken.map(|disk| (&disk.name, &disk.node, true));
        let others = others.iter();
        let all = taken.chain(others.map(|(node, probe)| (&probe.disk, node, false)));
        let unused = all.filter(|(_, node, _)| graph.is_unused(node));
        Ok(unused
            .map(|(disk, node, taken)| Unplugged {
                disk: disk.clone(),
                node: node.clone(),
                taken,
            })
            .collect())
    }

    fn remains(&self) -> Remains {
        let plans = self.volumes.iter().map(|volume| &volume.plan);
        remains(self.job, self.form, plans, &self.nodes)
    }
}

fn volumes(request: &PointRequest) -> Vec<Volume> {
    let volume = |(index, plan): (u16, &Plan)| Volume {
        export: id(request.job, Role::Export, index),
        dirty_context: plan
            .bitmap
            .old()
            .map(|old| format!("qemu:dirty-bitmap:{old}")),
        // QEMU has the image: where it is deleted, nobody else may have it open.
        plan: Plan {
            descriptor: None,
            ..plan.clone()
        },
    };
    (0..).zip(&request.plans).map(volume).collect()
}

fn remains<'a>(
    job: JobId,
    form: Form,
    plans: impl Iterator<Item = &'a Plan>,
    nodes: &Nodes,
) -> Remains {
    let sources: Vec<_> = plans.map(|plan| &plan.disk.node).collect();
    let disks = sources.len();
    let is_ours = |node: &&&String| OwnId::parse(node).is_some();
    let all = |role| (0..).take(disks).map(move |index| id(job, role, index));
    Remains {
        exports: [Role::Export, Role::File, Role::Mark]
            .into_iter()
            .flat_map(all)
            .collect(),
        probes: all(Role::Probe)
            .chain(nodes.others.iter().map(|(_, probe)| probe.export.clone()))
            .collect(),
        backup_access: nodes.held.clone(),
        access: match form {
            // They go with the rest that QEMU set up.
            Form::BackupAccess => Vec::new(),
            Form::Job | Form::Filter => nodes.access.clone(),
        },
        filters: match form {
            // Each goes with its job.
            Form::Job | Form::BackupAccess => Vec::new(),
            Form::Filter => all(Role::Filter).collect(),
        },
        jobs: all(Role::Create).chain(all(Role::Job)).collect(),
        fleecing: nodes.fleecing.clone(),
        images: all(Role::Image).collect(),
        extra: sources
            .iter()
            .filter(is_ours)
            .map(|&node| node.clone())
            .chain(all(Role::Mark))
            .collect(),
    }
}

fn id(job: JobId, role: Role, index: u16) -> String {
    OwnId { job, role, index }.to_string()
}
