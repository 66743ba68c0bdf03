//! The point in time of all disks, in one transaction, and the exports that read as of it.
//!
//! [`take`] either makes all of it or takes back what it made. If its future is dropped half-way,
//! things stay inside QEMU (see [`super::leftovers`]) and the guest may stay frozen (see
//! [`super::watchdog`]).

use super::agent::{Agent, AgentError};
use super::backup_access::{self, AccessError};
use super::bitmap::{self, BitmapPlan, Tracking};
use super::descriptor;
use super::filter::{self, FilterError, Stopped};
use super::ids::{JobId, OwnId, Role};
use super::machine::{Disk, Unusable};
use super::monitor::{Monitor, MonitorError};
use super::present;
use super::removal::{self, Remains, RemovalError, ServerFate};
use super::schema::Schema;
use serde_json::{Value, json};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Seconds that a guest's write may wait for its old data to be copied before the snapshot is given
/// up instead, where QEMU offers that. Guests give up on a request after 30 to 60 s.
pub(super) const CBW_TIMEOUT_SECONDS: u32 = 20;

/// How QEMU keeps the old data of overwritten blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// A backup job per disk, all in one transaction: the VM runs on. Where QEMU's jobs do not offer otherwise, a
    /// guest's write fails if its old data cannot be kept.
    Job,
    /// A filter between each device and its disk, put in while the VM is stopped for a moment. A snapshot that cannot
    /// be kept is given up, the guest's writes succeed.
    Filter,
    /// Proxmox's QEMU does it, by its backup-access API: filters as well, and the VM runs on.
    BackupAccess,
}

impl Form {
    /// What is best where nothing else is asked for.
    ///
    /// # Errors
    /// Those of [`Monitor::query`].
    pub async fn offered(monitor: &Monitor, schema: &Schema) -> Result<Self, MonitorError> {
        Ok(match backup_access::is_offered(monitor, schema).await? {
            true => Self::BackupAccess,
            false => Self::Job,
        })
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
pub struct Request {
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

/// Why there is no point in time. What had been made was taken back, but for what `left` names.
#[derive(Debug)]
pub struct SnapshotError {
    /// What went wrong.
    pub cause: Cause,
    /// The guest could not be thawed either: the watchdog must go on trying.
    pub frozen: Option<AgentError>,
    /// The VM could not be continued either: the watchdog must go on trying.
    pub stopped: Option<MonitorError>,
    /// What could not be taken back.
    pub left: Vec<UndoError>,
}

impl SnapshotError {
    /// Whether the VM still stands, frozen or stopped.
    pub fn is_stuck(&self) -> bool {
        self.frozen.is_some() || self.stopped.is_some()
    }

    /// Whether all is as it was before.
    pub fn is_undone(&self) -> bool {
        !self.is_stuck() && self.left.is_empty()
    }
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        if let Some(e) = &self.frozen {
            write!(f, "; the guest may still be frozen: {e}")?;
        }
        if let Some(e) = &self.stopped {
            write!(f, "; the VM may still be stopped: {e}")?;
        }
        for e in &self.left {
            write!(f, "; {e}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SnapshotError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// What went wrong on the way to a point in time.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The old bitmap of a disk is not one to rely on.
    #[error("disk {disk} has no usable bitmap {bitmap}: {reason}")]
    Bitmap {
        /// The disk.
        disk: String,
        /// The bitmap.
        bitmap: String,
        /// Why.
        reason: Unusable,
    },
    /// The monitor failed before anything was changed but fleecing nodes.
    #[error(transparent)]
    Monitor(MonitorError),
    /// QEMU cannot open the fleecing image.
    #[error(
        "QEMU cannot open the fleecing image {path}: {source}. The VM's QEMU must be able to open this path for writing: one that runs as another user, or confined as libvirt does, needs a fleecing folder that it may use"
    )]
    Fleecing {
        /// The file.
        path: PathBuf,
        /// What QEMU said.
        source: MonitorError,
    },
    /// The guest's file systems could not be frozen.
    #[error("cannot freeze the guest's file systems: {0}")]
    Freeze(#[source] AgentError),
    /// The transaction failed, for all disks.
    #[error("the point in time could not be taken: {0}")]
    Transaction(#[source] MonitorError),
    /// QEMU would abort.
    #[error(
        "disk {disk} is exported ({export}) by a QEMU that has iothreads; where the export uses one, a backup job would abort QEMU, and it does not say whether; remove the export or the iothreads"
    )]
    ExportOnIothread {
        /// The disk.
        disk: String,
        /// The export.
        export: String,
    },
    /// No filter can be put over the disks.
    #[error("the point in time could not be taken by filters: {0}")]
    Filter(#[from] FilterError),
    /// Proxmox's QEMU does not take it.
    #[error("the point in time could not be taken by backup access: {0}")]
    BackupAccess(#[from] AccessError),
    /// The VM stays stopped; see [`SnapshotError::stopped`].
    #[error("the VM was not continued after the point in time")]
    Cont,
    /// The guest stays frozen; see [`SnapshotError::frozen`].
    #[error("the guest's file systems did not thaw after the point in time")]
    Thaw,
    /// The node that reads as of the point in time cannot be made.
    #[error("disk {disk} cannot be read as of the point in time: {source}")]
    Access {
        /// The disk.
        disk: String,
        /// What QEMU said.
        source: MonitorError,
    },
    /// An NBD server is running already, and QEMU cannot say where.
    #[error(
        "this QEMU runs an NBD server already and cannot say where; name its socket with the key `nbd` of this VM in the configuration"
    )]
    ServerRunning,
    /// The NBD server cannot be started.
    #[error("QEMU cannot start an NBD server on {path}: {source}")]
    Server {
        /// Its socket.
        path: PathBuf,
        /// What QEMU said.
        source: MonitorError,
    },
    /// An export cannot be added.
    #[error("disk {disk} cannot be exported: {source}")]
    Export {
        /// The disk.
        disk: String,
        /// What QEMU said.
        source: MonitorError,
    },
}

/// A step of taking back that failed.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// A thing inside QEMU may still be there.
    #[error(transparent)]
    Removal(#[from] RemovalError),
    /// A disk's bitmaps are not as they were before.
    #[error("the bitmaps of disk {disk} could not be put back: {source}")]
    Bitmap {
        /// The disk.
        disk: String,
        /// Why.
        source: MonitorError,
    },
}

impl UndoError {
    fn is_lost(&self) -> bool {
        matches!(self, Self::Removal(error) if error.is_lost())
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
    /// What QEMU told on the way that is worth a line in the log.
    pub notes: Vec<String>,
    job: JobId,
    server: ServerFate,
    form: Form,
    nodes: Nodes,
}

/// What the nodes of a point in time are called, in the order of the disks.
#[derive(Debug, Clone, Default)]
struct Nodes {
    /// Of the fleecing images.
    fleecing: Vec<String>,
    /// That read as of the point in time.
    access: Vec<String>,
}

impl Nodes {
    /// By our ids, but where Proxmox's QEMU looks for them by names of its own.
    async fn of(monitor: &Monitor, request: &Request) -> Result<Self, Cause> {
        let all = |role| {
            (0..)
                .zip(&request.plans)
                .map(move |(index, _)| id(request.job, role, index))
        };
        let mut nodes = Self {
            fleecing: all(Role::Fleecing).collect(),
            access: all(Role::Access).collect(),
        };
        if request.form == Form::BackupAccess {
            for (name, plan) in nodes.fleecing.iter_mut().zip(&request.plans) {
                let device = backup_access::device_of(monitor, &plan.disk).await;
                *name = backup_access::fleecing_node(&device.map_err(Cause::Monitor)?)?;
            }
            // QEMU's own, known once they are there.
            nodes.access.clear();
        }
        Ok(nodes)
    }
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
    #[error("the snapshot of disk {disk} is broken: its job is {status}{}", .error.as_ref().map(|e| format!(" ({e})")).unwrap_or_default())]
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
    request: Request,
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
            notes: frozen.notes,
            job: request.job,
            server,
            form: request.form,
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

    /// Takes everything down but the bitmaps, which [`bitmap::accept`] or [`bitmap::back_out`] settle
    /// next. May be called again after a failure. The fleecing files are the caller's to delete.
    ///
    /// Returns what could not be removed; all steps are tried.
    pub async fn teardown(&self, monitor: &Monitor) -> Vec<RemovalError> {
        let plans = self.volumes.iter().map(|volume| &volume.plan);
        removal::remove(
            monitor,
            &remains(self.job, self.form, plans, &self.nodes),
            self.server,
        )
        .await
    }
}

/// What is known of the guest's file systems.
#[derive(Default)]
struct Frozen {
    time: Option<Duration>,
    still: Option<AgentError>,
    stopped: Stopped,
    notes: Vec<String>,
}

async fn make(
    monitor: &Monitor,
    schema: &Schema,
    request: &Request,
    agent: Option<&mut Agent>,
    server: &mut ServerFate,
    frozen: &mut Frozen,
    nodes: &mut Nodes,
) -> Result<(), Cause> {
    for plan in &request.plans {
        check_bitmap(plan)?;
    }
    if request.form == Form::BackupAccess
        && !backup_access::is_offered(monitor, schema)
            .await
            .map_err(Cause::Monitor)?
    {
        return Err(AccessError::Missing.into());
    }
    *nodes = Nodes::of(monitor, request).await?;
    if request.form == Form::Job {
        refuse_exports_on_iothreads(monitor, &request.plans).await?;
    }
    for ((index, plan), node) in (0..).zip(&request.plans).zip(&nodes.fleecing) {
        add_fleecing(monitor, request, index, plan, node).await?;
    }

    match agent {
        None => freeze_disks(monitor, schema, request, frozen, nodes).await?,
        Some(agent) => {
            let start = Instant::now();
            if let Err(e) = agent.freeze().await {
                return Err(match e {
                    // Freezing failed, and so did thawing after it.
                    AgentError::StillFrozen { .. } => {
                        frozen.still = Some(e);
                        Cause::Thaw
                    }
                    e => Cause::Freeze(e),
                });
            }
            let taken = freeze_disks(monitor, schema, request, frozen, nodes).await;
            frozen.still = agent.thaw().await.err();
            frozen.time = Some(start.elapsed());
            taken?;
            if frozen.still.is_some() {
                return Err(Cause::Thaw);
            }
        }
    }

    if request.form != Form::BackupAccess {
        for (index, plan) in (0..).zip(&request.plans) {
            add_access(monitor, request.job, index)
                .await
                .map_err(|source| Cause::Access {
                    disk: plan.disk.name.clone(),
                    source,
                })?;
        }
    }
    if let NbdServer::Start(path) = &request.server {
        start_server(monitor, path).await?;
        *server = ServerFate::StopIfUnused;
    }
    for ((index, plan), access) in (0..).zip(&request.plans).zip(&nodes.access) {
        add_export(monitor, request, index, plan, access)
            .await
            .map_err(|source| Cause::Export {
                disk: plan.disk.name.clone(),
                source,
            })?;
    }
    Ok(())
}

/// Takes back what [`make`] got done: everything is looked for, so it need not say how far it came.
async fn undo(
    monitor: &Monitor,
    request: &Request,
    server: ServerFate,
    nodes: &Nodes,
) -> Vec<UndoError> {
    let remains = remains(request.job, request.form, request.plans.iter(), nodes);
    let removed = removal::remove(monitor, &remains, server).await;
    let mut left: Vec<_> = removed.into_iter().map(UndoError::from).collect();
    if left.iter().any(UndoError::is_lost) {
        // No bitmap can be put back either.
        return left;
    }
    for plan in &request.plans {
        // A bitmap that was found unusable is left for the caller to judge.
        if check_bitmap(plan).is_err() {
            continue;
        }
        match bitmap::back_out(monitor, &plan.disk.node, &plan.bitmap).await {
            Ok(Tracking::Restored) => {}
            Ok(Tracking::Lost) => {
                tracing::warn!("disk {}: the next backup reads it in full", plan.disk.name);
            }
            Err(source) => left.push(UndoError::Bitmap {
                disk: plan.disk.name.clone(),
                source,
            }),
        }
    }
    left
}

/// A disabled bitmap must not be taken for the base, nor be enabled again by a later undo.
fn check_bitmap(plan: &Plan) -> Result<(), Cause> {
    let Some(old) = plan.bitmap.old() else {
        return Ok(());
    };
    let name = old.to_string();
    let state = plan.disk.bitmap(&name).ok_or(Unusable::Missing);
    state
        .and_then(|bitmap| bitmap.usable())
        .map_err(|reason| Cause::Bitmap {
            disk: plan.disk.name.clone(),
            bitmap: name,
            reason,
        })
}

/// A backup job on a disk that an export runs in an iothread aborts QEMU 10.0.2. QEMU does not say which exports do, so
/// where there are iothreads, each export of a disk that no device has is one of them.
async fn refuse_exports_on_iothreads(monitor: &Monitor, plans: &[Plan]) -> Result<(), Cause> {
    let exports = present::exports(monitor).await.map_err(Cause::Monitor)?;
    let export_of = |plan: &Plan| exports.iter().find(|export| export.node == plan.disk.node);
    if !plans.iter().any(|plan| export_of(plan).is_some())
        || !present::has_iothreads(monitor)
            .await
            .map_err(Cause::Monitor)?
    {
        return Ok(());
    }
    let devices = present::devices(monitor).await.map_err(Cause::Monitor)?;
    let has = |plan: &Plan, device: &present::Device| {
        let inserted = device.inserted.as_ref();
        inserted.is_some_and(|inserted| inserted.name == plan.disk.node)
    };
    for plan in plans {
        if let Some(export) = export_of(plan)
            && !devices.iter().any(|device| has(plan, device))
        {
            return Err(Cause::ExportOnIothread {
                disk: plan.disk.name.clone(),
                export: export.id.clone(),
            });
        }
    }
    Ok(())
}

async fn add_fleecing(
    monitor: &Monitor,
    request: &Request,
    index: u16,
    plan: &Plan,
    node: &str,
) -> Result<(), Cause> {
    let file =
        |filename: Value| json!({ "driver": "file", "filename": filename, "discard": "unmap" });
    let image = id(request.job, Role::Image, index);
    let options = |filename| match request.format {
        FleecingFormat::Raw => {
            json!({ "driver": "raw", "node-name": node, "discard": "unmap", "file": file(filename) })
        }
        FleecingFormat::Qcow2 => {
            let mut file = file(filename);
            file["node-name"] = json!(image);
            file
        }
    };
    let (path, file) = (&plan.fleecing, plan.descriptor.as_ref().map(AsFd::as_fd));
    let added = descriptor::add_node(monitor, path, file, options).await;
    let added = match request.format {
        FleecingFormat::Raw => added,
        FleecingFormat::Qcow2 => match added {
            Ok(()) => format_qcow2(monitor, request.job, index, plan.disk.size, node).await,
            error => error,
        },
    };
    match added {
        Ok(()) => Ok(()),
        Err(source) if source.is_refusal() => Err(Cause::Fleecing {
            path: plan.fleecing.clone(),
            source,
        }),
        Err(error) => Err(Cause::Monitor(error)),
    }
}

/// Makes the file below a qcow2 image, and adds its node.
async fn format_qcow2(
    monitor: &Monitor,
    job: JobId,
    index: u16,
    size: u64,
    node: &str,
) -> Result<(), MonitorError> {
    let (image, create) = (id(job, Role::Image, index), id(job, Role::Create, index));
    let mut events = monitor.events();
    let options = json!({ "driver": "qcow2", "file": image, "size": size });
    let arguments = json!({ "job-id": create, "options": options });
    monitor.execute_raw("blockdev-create", arguments).await?;
    loop {
        let jobs = present::jobs(monitor).await?;
        let Some(job) = jobs.into_iter().find(|job| job.id == create) else {
            break;
        };
        if job.status == "concluded" {
            let dismiss = json!({ "id": create });
            monitor.execute_raw("job-dismiss", dismiss).await?;
            if let Some(description) = job.error {
                return Err(MonitorError::Refused {
                    command: "blockdev-create".into(),
                    class: "GenericError".into(),
                    description,
                });
            }
            break;
        }
        events.nudge(Duration::from_millis(20)).await;
    }
    let qcow2 = json!({ "driver": "qcow2", "node-name": node, "discard": "unmap", "file": image });
    monitor.execute_raw("blockdev-add", qcow2).await.map(drop)
}

/// The moment itself.
async fn freeze_disks(
    monitor: &Monitor,
    schema: &Schema,
    request: &Request,
    frozen: &mut Frozen,
    nodes: &mut Nodes,
) -> Result<(), Cause> {
    let switch = bitmap::switch(&request.plans, request.block_size);
    let stopped = &mut frozen.stopped;
    match request.form {
        Form::BackupAccess => {
            let (adds, disables) = switch.into_iter().partition(bitmap::is_add);
            bitmap_actions(monitor, adds).await?;
            let mut disks = Vec::new();
            for (plan, fleecing) in request.plans.iter().zip(&nodes.fleecing) {
                let device = fleecing.strip_suffix(backup_access::FLEECING);
                disks.push((&plan.disk, device.unwrap_or(fleecing).to_owned()));
            }
            let access = backup_access::set_up(monitor, schema, request.job, &disks).await?;
            nodes.access = access.nodes;
            frozen.notes = access.notes;
            bitmap_actions(monitor, disables).await
        }
        Form::Job => transaction(monitor, backups(request, schema).chain(switch).collect()).await,
        Form::Filter => {
            let plans = &request.plans;
            filter::insert(monitor, schema, request.job, plans, switch, stopped).await?;
            match stopped.still {
                Some(_) => Err(Cause::Cont),
                None => Ok(()),
            }
        }
    }
}

/// All at once, where there are any.
async fn bitmap_actions(monitor: &Monitor, actions: Vec<Value>) -> Result<(), Cause> {
    match actions.is_empty() {
        true => Ok(()),
        false => transaction(monitor, actions).await,
    }
}

async fn transaction(monitor: &Monitor, actions: Vec<Value>) -> Result<(), Cause> {
    let arguments = json!({ "actions": actions });
    let taken = monitor.execute_raw("transaction", arguments).await;
    taken.map(drop).map_err(Cause::Transaction)
}

/// They come before all actions on bitmaps. A backup action drains its disk and holds the drain to the end of the
/// transaction, while bitmap actions do not drain: with all backups first, no write falls between any
/// two actions. Adding before disabling loses nothing even so.
fn backups(request: &Request, schema: &Schema) -> impl Iterator<Item = Value> {
    (0..).zip(&request.plans).map(|(index, plan)| {
        let mut data = json!({
            "job-id": id(request.job, Role::Job, index),
            "device": plan.disk.node,
            "target": id(request.job, Role::Fleecing, index),
            "sync": "none",
            "filter-node-name": id(request.job, Role::Filter, index),
            "auto-dismiss": false,
        });
        // A full fleecing image then breaks the snapshot instead of the guest's write.
        if schema.command_has_argument("blockdev-backup", "on-cbw-error") {
            data["on-cbw-error"] = json!("break-snapshot");
        }
        if schema.command_has_argument("blockdev-backup", "cbw-timeout") {
            data["cbw-timeout"] = json!(CBW_TIMEOUT_SECONDS);
        }
        json!({ "type": "blockdev-backup", "data": data })
    })
}

async fn add_access(monitor: &Monitor, job: JobId, index: u16) -> Result<(), MonitorError> {
    let arguments = json!({
        "driver": "snapshot-access",
        "node-name": id(job, Role::Access, index),
        "file": id(job, Role::Filter, index),
        "discard": "unmap",
    });
    let added = monitor.execute_raw("blockdev-add", arguments).await;
    added.map(drop)
}

async fn start_server(monitor: &Monitor, path: &Path) -> Result<(), Cause> {
    let arguments = json!({ "addr": { "type": "unix", "data": { "path": path } } });
    match monitor.execute_raw("nbd-server-start", arguments).await {
        Ok(_) => Ok(()),
        // QMP has no class of its own for this; the words are QEMU's since the command exists.
        Err(MonitorError::Refused { description, .. })
            if description.contains("already running") =>
        {
            Err(Cause::ServerRunning)
        }
        Err(source) => match descriptor::start_server(monitor, path).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Cause::Server {
                path: path.into(),
                source,
            }),
        },
    }
}

/// Never with an `iothread`: a later `blockdev-backup` of that node would abort QEMU.
async fn add_export(
    monitor: &Monitor,
    request: &Request,
    index: u16,
    plan: &Plan,
    access: &str,
) -> Result<(), MonitorError> {
    let export = id(request.job, Role::Export, index);
    let mut arguments = json!({
        "type": "nbd",
        "id": export,
        "node-name": access,
        "name": export,
        "writable": request.readers == Readers::Discard,
    });
    if let Some(old) = plan.bitmap.old() {
        arguments["bitmaps"] = json!([{ "node": plan.disk.node, "name": old.to_string() }]);
    }
    let added = monitor.execute_raw("block-export-add", arguments).await;
    added.map(drop)
}

fn volumes(request: &Request) -> Vec<Volume> {
    let volume = |(index, plan): (u16, &Plan)| Volume {
        export: id(request.job, Role::Export, index),
        dirty_context: plan
            .bitmap
            .old()
            .map(|old| format!("qemu:dirty-bitmap:{old}")),
        plan: plan.clone(),
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
        exports: all(Role::Export).chain(all(Role::File)).collect(),
        backup_access: (form == Form::BackupAccess).then(|| backup_access::target(job)),
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
            .collect(),
    }
}

fn id(job: JobId, role: Role, index: u16) -> String {
    OwnId { job, role, index }.to_string()
}
