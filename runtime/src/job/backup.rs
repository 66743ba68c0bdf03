//! One backup of one VM, from the first look at it to the last thing removed.
//!
//! point in time → run each volume → the snapshot was intact → QEMU's part taken down → prove → commit → bitmaps.
//!
//! The snapshot is taken down as soon as its last byte has been read, before anything is proven or made durable: until
//! then each of the guest's writes pays for it. Whatever fails, on every way out: QEMU's part is taken down first, then
//! tracking becomes what it was, then what was stored is removed.

use super::base::{self, Choice, ChoiceError, Owner, Recorded};
use super::component::{Component, ComponentError};
use super::event::{Event, Events};
use super::extra::{self, Attached, Extra, ExtraError};
use super::fleecing::{Bounds, Fleecing, FleecingError, GivenUp};
use super::journal::{Journal, JournalError, Record, Step};
use super::power::{self, PowerError};
use super::prove::ProofError;
use super::recover::{self, RecoverError, Traces};
use super::transfer::Transfer;
use super::volume_run::{Covered, VolumeError};
use crate::archive::{self, Archive, BackupId, Manifest, Namespace, NamespaceName};
use crate::config::{Provider, Vm};
use crate::grants::account::Account;
use crate::qemu::bitmap::{self, Tracking};
use crate::qemu::machine::{RunState, Standing};
use crate::qemu::snapshot::{Broken, Cause, NbdServer, Request as PointRequest};
use crate::qemu::{
    self, Agent, Form, JobId, MachineError, Monitor, MonitorError, Plan, PointInTime, Schema,
    SnapshotError, Watchdog, machine,
};
use crate::sandbox::{Cache, Program};
use bytes::Bytes;
use cap_std::fs::Dir;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

/// Unit of digests and of dirty tracking, in bytes: QEMU's copy-before-write cluster, so that an incremental reads no
/// more than changed.
pub const BLOCK_SIZE: u32 = 64 << 10;

/// What to back up, with what, to where. Every path was opened by the caller.
#[derive(Debug)]
pub struct Request {
    /// The VM's name: part of its bitmaps' names and of the manifest.
    pub vm_name: String,
    /// Its sockets and disks.
    pub vm: Vm,
    /// QEMU's QMP socket.
    pub qmp: PathBuf,
    /// The provider's name.
    pub provider_name: String,
    /// Its settings, limits and grants.
    pub provider: Provider,
    /// The component's bytes.
    pub component: Bytes,
    /// The provider's part of the archive.
    pub namespace: NamespaceName,
    /// Handed to the provider.
    pub attachments: BTreeMap<String, Vec<u8>>,
    /// Further volumes.
    pub extra: Vec<Extra>,
    /// What the job uses of the provider's limits, for whoever wants to know whatever becomes of the job.
    pub account: Arc<Account>,
    /// Read every disk in full.
    pub full: bool,
}

/// The places that a job works in.
pub struct Places {
    /// The archive.
    pub archive: Arc<Archive>,
    /// The VM's folder in the state folder, and its path for errors.
    pub vm_state: (Dir, PathBuf),
    /// Where fleecing images go, and its absolute path for QEMU.
    pub fleecing: (Dir, PathBuf),
    /// Compiled components.
    pub cache: Cache,
    /// What sandbox processes run.
    pub program: Program,
}

/// What a backup came to.
#[derive(Debug)]
pub struct Summary {
    /// The committed manifest.
    pub manifest: Manifest,
    /// From the first freeze command to the last thaw's answer, where the guest was frozen.
    pub frozen: Option<Duration>,
    /// From before the VM was stopped to after it was continued, where it was stopped.
    pub stopped: Option<Duration>,
    /// From the point in time to the end of the snapshot.
    pub snapshot: Duration,
    /// Most bytes that the fleecing images took up.
    pub fleecing_peak: u64,
    /// How long each step took, in order.
    pub steps: Vec<(Step, Duration)>,
    /// Clean-up that failed although the backup is committed. The next run does it.
    pub left: Vec<String>,
}

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The component cannot be used.
    #[error("provider {name}: {source}")]
    Component {
        /// The provider's name.
        name: String,
        /// Why.
        source: ComponentError,
    },
    /// The VM cannot be reached or started.
    #[error(transparent)]
    Power(#[from] PowerError),
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// An extra volume cannot join.
    #[error(transparent)]
    Extra(#[from] ExtraError),
    /// The agent cannot be reached.
    #[error("the guest agent: {0}")]
    Agent(#[from] qemu::AgentError),
    /// The watchdog cannot be started.
    #[error("the watchdog: {0}")]
    Watchdog(#[from] qemu::WatchdogError),
    /// The disks are not there or cannot be backed up.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// What an earlier run left could not be cleaned up.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// No base can be chosen.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    /// The journal cannot be kept, or another job runs.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There are no fleecing images.
    #[error(transparent)]
    Fleecing(#[from] FleecingError),
    /// There is no point in time.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A volume was not backed up.
    #[error("volume {volume}: {source}")]
    Volume {
        /// Its name.
        volume: String,
        /// Why.
        source: VolumeError,
    },
    /// The guest needs the fleecing folder's last room, or the snapshot passed a bound.
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
    /// The snapshot did not hold to the end.
    #[error("{0}; nothing read from it can be trusted")]
    Broken(#[from] Broken),
    /// What QEMU kept in the fleecing images may have been lost.
    #[error("the storage below the fleecing folder failed: {0}")]
    FleecingLost(io::Error),
    /// What the provider claims cannot be read back.
    #[error("volume {volume}: {source}")]
    Proof {
        /// Its name.
        volume: String,
        /// Why.
        source: ProofError,
    },
    /// The archive failed.
    #[error("the archive: {0}")]
    Archive(#[from] archive::Error),
    /// A task of the job died.
    #[error("a task of the job died: {0}")]
    Task(#[source] tokio::task::JoinError),
    /// The system gives no random bytes.
    #[error("no random bytes: {0}")]
    Random(#[from] getrandom::Error),
    /// A signal asked for the end.
    #[error("cancelled; the VM and the archive are as they were before")]
    Cancelled,
}

impl BackupError {
    /// Whether the user can mend it: exit status 2.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Component { source, .. } => source.is_refusal(),
            Self::Power(error) => error.is_mistake(),
            Self::Extra(error) => error.is_mistake(),
            Self::Machine(error) => !matches!(error, MachineError::Monitor(_)),
            Self::Archive(error) => error.is_not_writable(),
            Self::Agent(error) => matches!(error, qemu::AgentError::Connect { .. }),
            Self::Snapshot(error) => match &error.cause {
                Cause::Fleecing { .. } | Cause::ServerRunning | Cause::ExportOnIothread { .. } => {
                    true
                }
                Cause::Filter(error) => error.is_mistake(),
                _ => false,
            },
            Self::Choice(ChoiceError::Name(_))
            | Self::Fleecing(FleecingError::TooSmall { .. } | FleecingError::PathTooLong { .. }) => {
                true
            }
            _ => false,
        }
    }
}

/// Makes one backup.
pub async fn backup(
    request: Request,
    places: Places,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<Summary, BackupError> {
    let refused = |source| BackupError::Component {
        name: request.provider_name.clone(),
        source,
    };
    let program = &places.program;
    let component = tokio::select! {
        loaded = Component::load(request.component.clone(), program, &places.cache, events) => loaded.map_err(refused)?,
        () = cancel.cancelled() => return Err(BackupError::Cancelled),
    };
    let namespace = Arc::new(places.archive.create_namespace(&request.namespace)?);
    let owner = Owner {
        archive: places.archive.id(),
        namespace: request.namespace.clone(),
        vm: request.vm_name.clone(),
    };
    // First the lock: QEMU would let a second job wait for the monitor without a word.
    let mut journal = Journal::open(places.vm_state.0, places.vm_state.1)?;
    let mut reached =
        power::reach(&request.qmp, &request.vm.start, &journal, events, cancel).await?;
    let attempt = Attempt {
        request: &request,
        archive: &places.archive,
        fleecing: (&places.fleecing.0, &places.fleecing.1),
        program,
        namespace,
        owner,
        component,
        monitor: &reached.monitor,
        events,
        cancel,
    };
    let mut made = attempt.make(&mut journal).await;
    if reached.monitor.is_lost()
        && let Ok(monitor) = Monitor::connect(&request.qmp).await
    {
        // QEMU runs on, with all in it that the job could not take down.
        events.note("the monitor was lost and answers again; cleaning up over a new connection");
        let traces = attempt.traces(&monitor);
        match (
            recover::clean_up(&traces, &mut journal, events).await,
            &mut made,
        ) {
            (Ok(()), Ok(summary)) => summary.left.clear(),
            (Ok(()), Err(_)) => {}
            (Err(error), _) => events.warn(error.to_string()),
        }
        reached.monitor = monitor;
    }
    let put_back = reached.put_back(&journal, events).await;
    match (made, put_back) {
        (Ok(mut summary), Err(left)) => {
            summary.left.push(left);
            Ok(summary)
        }
        (Err(error), Err(left)) => {
            events.warn(left);
            Err(error)
        }
        (made, Ok(())) => made,
    }
}

/// A backup of a VM that has a monitor.
struct Attempt<'a> {
    request: &'a Request,
    archive: &'a Archive,
    /// The folder for fleecing images, and its path.
    fleecing: (&'a Dir, &'a Path),
    program: &'a Program,
    namespace: Arc<Namespace>,
    owner: Owner,
    component: Component,
    monitor: &'a Monitor,
    events: &'a Events,
    cancel: &'a CancellationToken,
}

impl Attempt<'_> {
    async fn make(&self, journal: &mut Journal) -> Result<Summary, BackupError> {
        let &Self {
            request,
            archive,
            fleecing: (fleecing_folder, fleecing_path),
            monitor,
            events,
            ..
        } = self;
        recover::recover(&self.traces(monitor), journal, events).await?;
        let standing = standing(monitor, request, events).await?;
        let id = BackupId::random(OffsetDateTime::now_utc())?;
        let mut disks = self.disks(id).await?;

        let parent = fleecing_folder
            .try_clone()
            .map_err(BackupError::FleecingLost)?;
        let job = JobId::random()?;
        let name = Fleecing::name(job);
        journal.write(Record {
            job: job.to_string(),
            archive: archive.id().to_string(),
            namespace: request.namespace.to_string(),
            backup: id.to_string(),
            step: Step::Preparing,
            fleecing: name.clone(),
            nbd_server: request.vm.nbd.is_none(),
        })?;
        let attached = match extra::attach_files(monitor, job, &request.extra, &mut disks).await {
            Ok(attached) => {
                for (disk, choice) in disks.iter().rev().take(attached.len()).rev() {
                    tell_choice(events, disk, choice);
                }
                attached
            }
            Err(error) => {
                self.unprepare(job, None, journal).await;
                return Err(error.into());
            }
        };
        let sizes: Vec<u64> = disks.iter().map(|(disk, _)| disk.size).collect();
        let fleecing = match Fleecing::create(
            parent,
            fleecing_path,
            &name,
            &sizes,
            request.vm.fleecing_format,
        ) {
            Ok(fleecing) => fleecing,
            Err(error) => {
                self.unprepare(job, None, journal).await;
                return Err(error.into());
            }
        };
        let writer = match self.namespace.begin(id) {
            Ok(writer) => Arc::new(writer),
            Err(error) => {
                self.unprepare(job, Some(&fleecing), journal).await;
                return Err(error.into());
            }
        };
        let transfer = Transfer {
            vm: &request.vm_name,
            provider_name: &request.provider_name,
            provider: &request.provider,
            bytes: request.component.clone(),
            component: &self.component,
            program: self.program,
            attachments: &request.attachments,
            account: &request.account,
            namespace: Arc::clone(&self.namespace),
            writer: Some(writer),
            id,
            events,
            cancel: self.cancel,
        };
        Backup {
            request,
            transfer,
            monitor,
            journal,
            standing,
            attached,
            fleecing,
            job,
            disks,
            reached: Vec::new(),
            events,
            cancel: self.cancel,
        }
        .make()
        .await
    }

    /// Where jobs on this VM leave what is to be cleaned up, seen over `monitor`.
    fn traces<'b>(&'b self, monitor: &'b Monitor) -> Traces<'b> {
        Traces {
            monitor,
            fleecing: self.fleecing.0,
            own_server: self.request.vm.nbd.is_none(),
            archive: self.archive,
            namespace: &self.namespace,
            owner: &self.owner,
        }
    }

    /// The disks to back up, each with what it builds on.
    async fn disks(&self, id: BackupId) -> Result<Vec<(qemu::Disk, Choice)>, BackupError> {
        let (request, events) = (self.request, self.events);
        let choice = match &request.vm.disks[..] {
            [] => machine::Choice::All,
            names => machine::Choice::Named(names.to_vec()),
        };
        let mut found = machine::disks(self.monitor, &choice).await?;
        extra::add_nodes(self.monitor, &request.extra, &mut found).await?;
        for skipped in &found.skipped {
            events.note(format!("{} is skipped: {}", skipped.name, skipped.reason));
        }
        // The disks of one backup mostly share their base.
        let mut known = BTreeMap::new();
        let mut disks = Vec::new();
        for disk in found.disks {
            let choice = if disk.read_only {
                Choice::untracked("it is read-only and has no bitmap")
            } else {
                let choice = base::choose(&self.owner, &disk, id, BLOCK_SIZE, |id| {
                    if let Some(known) = known.get(&id) {
                        return Ok(Recorded::clone(known));
                    }
                    let found = recover::recorded(&self.namespace, id)?;
                    known.insert(id, found.clone());
                    Ok(found)
                })?;
                if request.full {
                    choice
                        .in_full(&self.owner, &disk, id)
                        .map_err(ChoiceError::from)?
                } else {
                    choice
                }
            };
            tell_choice(events, &disk, &choice);
            disks.push((disk, choice));
        }
        tell_missing(events, &disks);
        Ok(disks)
    }

    /// Takes back what was prepared before there is anything to tear down. Where that fails, the journal stays, and the
    /// next run does it.
    async fn unprepare(&self, job: JobId, fleecing: Option<&Fleecing>, journal: &mut Journal) {
        let detached = extra::detach_files(self.monitor, job, &self.request.extra).await;
        let removed = fleecing.is_none_or(|fleecing| fleecing.remove().is_ok());
        if removed && detached.is_empty() {
            let _ = journal.clear();
        }
    }
}

/// Whether the guest runs; a storage daemon, which has none, never stands still.
async fn standing(
    monitor: &Monitor,
    request: &Request,
    events: &Events,
) -> Result<Standing, BackupError> {
    let Some(state) = machine::run_state(monitor).await? else {
        return Ok(Standing::Runs);
    };
    let standing = state.standing()?;
    if standing == Standing::Still {
        let agent = match &request.vm.agent {
            Some(_) => ", without asking its agent",
            None => "",
        };
        events.note(format!(
            "the VM does not run (it is {}); its disks are taken as they are{agent}",
            state.status
        ));
    }
    Ok(standing)
}

fn tell_choice(events: &Events, disk: &qemu::Disk, choice: &Choice) {
    let what = match (&choice.base, &choice.reason) {
        (Some(base), _) => format!("incremental since {}", base.manifest.backup),
        (None, Some(reason)) => format!("read in full: {reason}"),
        (None, None) if disk.can_persist => {
            "read in full: it has no bitmap of this archive (it is new here, or QEMU ended without storing it)".into()
        }
        (None, None) => {
            "read in full: it has no bitmap of this archive (its image keeps none when QEMU ends)"
                .into()
        }
    };
    events.note(format!(
        "{} ({}, {} bytes): {what}",
        disk.name, disk.format, disk.size
    ));
}

/// Says which volumes of the bases are no more: removed from the VM, or not chosen this time.
fn tell_missing(events: &Events, disks: &[(qemu::Disk, Choice)]) {
    let mut missing = BTreeMap::new();
    for base in disks.iter().filter_map(|(_, choice)| choice.base.as_ref()) {
        for volume in &base.manifest.record.volumes {
            if !disks.iter().any(|(disk, _)| disk.name == volume.name) {
                missing.insert(&volume.name, base.manifest.backup);
            }
        }
    }
    for (volume, base) in missing {
        events.note(format!("{volume} was in {base} and is not in this backup"));
    }
}

/// A backup under way.
struct Backup<'a> {
    request: &'a Request,
    transfer: Transfer<'a>,
    monitor: &'a Monitor,
    journal: &'a mut Journal,
    /// Whether the guest ran at the beginning.
    standing: Standing,
    attached: Vec<Attached<'a>>,
    fleecing: Fleecing,
    job: JobId,
    disks: Vec<(qemu::Disk, Choice)>,
    reached: Vec<(Step, Instant)>,
    events: &'a Events,
    cancel: &'a CancellationToken,
}

impl Backup<'_> {
    /// No `?` between the point in time and the end of the clean-up: whatever fails, the rest of it is done.
    async fn make(mut self) -> Result<Summary, BackupError> {
        let point = match self.point_in_time().await {
            Ok(point) => point,
            Err(error) => {
                // It has been taken back, but for what the error names.
                let undone = !matches!(&error, BackupError::Snapshot(error) if !error.is_undone());
                let detached =
                    extra::detach_files(self.monitor, self.job, &self.request.extra).await;
                let mut left: Vec<_> = detached.iter().map(ToString::to_string).collect();
                left.extend(self.remove_fleecing());
                left.extend(self.transfer.abandon().await);
                if undone {
                    self.close_journal(&mut left);
                }
                self.tell_left(&left);
                return Err(error);
            }
        };
        let since = Instant::now();
        let read = self.read_all(&point).await;
        let fleecing_peak = self.fleecing.peak();
        // The VM first, whatever became of the reading and whether the journal can be kept.
        let mut left = Vec::new();
        left.extend(self.step(Step::Releasing).err().map(|e| e.to_string()));
        left.extend(self.take_down(&point).await);
        left.extend(self.resume().await);
        extra::warn_of_changes(&self.attached, self.events);
        let snapshot = since.elapsed();
        self.request.account.snapshot(snapshot, fleecing_peak);
        let committed = match read {
            Ok(covered) => self.prove_and_commit(covered).await,
            Err(error) => Err(error),
        };
        left.extend(self.settle_bitmaps(&point, &committed).await);
        if committed.is_err() {
            left.extend(self.transfer.abandon().await);
        }
        self.close_journal(&mut left);
        let manifest = committed.inspect_err(|_| self.tell_left(&left))?;
        Ok(Summary {
            manifest,
            frozen: point.frozen,
            stopped: point.stopped,
            snapshot,
            fleecing_peak,
            steps: self.steps(),
            left,
        })
    }

    /// While anything is left, the journal stays for the next run.
    fn close_journal(&mut self, left: &mut Vec<String>) {
        if left.is_empty()
            && let Err(error) = self.journal.clear()
        {
            left.push(error.to_string());
        }
    }

    fn tell_left(&self, left: &[String]) {
        for left in left {
            self.events.warn(format!(
                "clean-up is incomplete, the next run does the rest: {left}"
            ));
        }
    }

    /// How long each step that was reached took; the last one is over now.
    fn steps(&self) -> Vec<(Step, Duration)> {
        let ends = self.reached.iter().skip(1).map(|&(_, at)| at);
        self.reached
            .iter()
            .zip(ends.chain([Instant::now()]))
            .map(|(&(step, from), to)| (step, to - from))
            .collect()
    }

    async fn point_in_time(&mut self) -> Result<PointInTime, BackupError> {
        let schema = Schema::probe(self.monitor).await?;
        // No agent answers in a guest that stands still; its file systems cannot be frozen, and nothing writes to them.
        let agent_socket = self.request.vm.agent.as_ref();
        let agent_socket = agent_socket.filter(|_| self.standing == Standing::Runs);
        let mut agent = match agent_socket {
            Some(path) => Some(Agent::connect(path, qemu::agent::Limits::default()).await?),
            None => None,
        };
        let form = self.request.vm.point_in_time;
        let stops = form == Form::Filter && self.standing == Standing::Runs;
        let qmp = stops.then_some(&*self.request.qmp);
        let mut watchdog = match (agent_socket, qmp) {
            (None, None) => None,
            (agent, qmp) => Some(Watchdog::spawn(agent.map(AsRef::as_ref), qmp).await?),
        };
        self.step(Step::Snapshot)?;
        if let Some(watchdog) = &mut watchdog {
            if agent.is_some() {
                watchdog.arm_thaw().await?;
            }
            if stops {
                watchdog.arm_cont().await?;
            }
        }
        let server = match &self.request.vm.nbd {
            Some(socket) => NbdServer::Shared(socket.clone()),
            None => NbdServer::Start(self.fleecing.socket()),
        };
        let mut plans = Vec::new();
        for ((disk, choice), (path, file)) in self.disks.iter().zip(self.fleecing.images()) {
            let descriptor = file.as_fd().try_clone_to_owned();
            plans.push(Plan {
                disk: disk.clone(),
                fleecing: path.to_owned(),
                descriptor: Some(Arc::new(descriptor.map_err(BackupError::FleecingLost)?)),
                bitmap: choice.bitmap.clone(),
            });
        }
        let request = PointRequest {
            job: self.job,
            block_size: BLOCK_SIZE,
            plans,
            server,
            form,
            format: self.request.vm.fleecing_format,
        };
        let taken = qemu::snapshot::take(self.monitor, &schema, request, agent.as_mut()).await;
        let stuck = matches!(&taken, Err(error) if error.is_stuck());
        // The agent takes one client at a time: ours goes before the watchdog may need it.
        drop(agent);
        if let Some(watchdog) = watchdog
            && !stuck
            && let Err(error) = watchdog.disarm().await
        {
            // It may thaw the guest once more, which does no harm. The point in time is there and stays.
            self.events.warn(error.to_string());
        }
        Ok(taken?)
    }

    /// Runs the provider on every volume side by side; the first failure stops the others.
    async fn read_all(&mut self, point: &PointInTime) -> Result<Vec<Covered>, BackupError> {
        self.step(Step::Running)?;
        let stop = self.cancel.child_token();
        let choices = self.disks.iter().map(|(_, choice)| choice);
        let volumes = point.volumes.iter().zip(choices);
        let runs = self.transfer.run(&point.socket, volumes, &stop);
        let bounds = Bounds::of(&self.request.vm, &self.request.provider.limits);
        let covered = 'runs: {
            tokio::pin!(runs);
            let failure: BackupError = tokio::select! {
                ended = &mut runs => break 'runs ended?,
                full = self.fleecing.given_up(bounds) => full.into(),
                // Most likely QEMU ended. If not, nothing can be said of the snapshot any more all the same.
                lost = self.monitor.lost() => lost.into(),
            };
            stop.cancel();
            // Why the runs ended is known.
            let _ = runs.await;
            return Err(failure);
        };
        // After the last read: did the snapshot hold to the end?
        point.check_alive(self.monitor).await?;
        self.fleecing.sync().map_err(BackupError::FleecingLost)?;
        Ok(covered)
    }

    /// Returns what could not be removed; the next run does it.
    async fn take_down(&mut self, point: &PointInTime) -> Vec<String> {
        let errors = point.teardown(self.monitor).await;
        if errors.is_empty() {
            self.journal.server_stopped();
        }
        let mut left: Vec<_> = errors.iter().map(ToString::to_string).collect();
        // QEMU may still hold a file that could not be taken from it; deleting it harms neither side.
        left.extend(self.remove_fleecing());
        left
    }

    /// A guest whose writes a full fleecing image failed was stopped by QEMU: with the image gone they succeed.
    async fn resume(&self) -> Option<String> {
        let stopped = self.standing == Standing::Runs
            && machine::run_state(self.monitor)
                .await
                .is_ok_and(|state| state.as_ref().is_some_and(RunState::is_io_error));
        if !stopped {
            return None;
        }
        self.events.warn(
            "an I/O error stopped the VM during the backup; it is continued now that nothing of the backup is left in it",
        );
        let continued = self.monitor.execute(qapi::qmp::cont {}).await;
        let error = continued.err()?;
        Some(format!("the VM is stopped by an I/O error: {error}"))
    }

    fn remove_fleecing(&self) -> Option<String> {
        let error = self.fleecing.remove().err()?;
        Some(format!(
            "the fleecing images in {}: {error}",
            self.fleecing.folder().display()
        ))
    }

    async fn prove_and_commit(&mut self, covered: Vec<Covered>) -> Result<Manifest, BackupError> {
        self.step(Step::Proving)?;
        self.transfer.prove(&covered).await?;
        self.step(Step::Committing)?;
        let disks = self.disks.iter().map(|(disk, choice)| (disk, choice));
        let manifest = self.transfer.commit(covered, disks).await?;
        // The backup is there, whether or not the journal can say so: the archive decides.
        if let Err(error) = self.step(Step::Committed) {
            self.events.warn(error.to_string());
        }
        Ok(manifest)
    }

    /// Returns what could not be settled; the next run does it.
    async fn settle_bitmaps(
        &mut self,
        point: &PointInTime,
        committed: &Result<Manifest, BackupError>,
    ) -> Vec<String> {
        let unknown = matches!(
            committed,
            Err(BackupError::Archive(archive::Error::CommitUnknown { .. }))
        );
        if unknown {
            return vec!["it is not known whether the backup was committed; all bitmaps stay until the archive can be asked".into()];
        }
        let mut left = Vec::new();
        if let Err(error) = self.step(Step::SwitchingBitmaps) {
            left.push(error.to_string());
        }
        for (volume, (disk, choice)) in point.volumes.iter().zip(&self.disks) {
            let node = &disk.node;
            let settled = if committed.is_ok() {
                self.accept(node, choice).await
            } else {
                bitmap::back_out(self.monitor, node, &volume.plan.bitmap).await
            };
            match settled {
                Ok(Tracking::Restored) => {}
                Ok(Tracking::Lost) => self.events.warn(format!(
                    "{}: its bitmap could not be made whole; the next backup reads it in full",
                    disk.name
                )),
                Err(error) => left.push(format!("the bitmaps of {}: {error}", disk.name)),
            }
        }
        left
    }

    async fn accept(&self, node: &str, choice: &Choice) -> Result<Tracking, MonitorError> {
        bitmap::accept(self.monitor, node, &choice.bitmap).await?;
        for stale in &choice.stale {
            bitmap::remove(self.monitor, node, stale).await?;
        }
        Ok(Tracking::Restored)
    }

    fn step(&mut self, step: Step) -> Result<(), JournalError> {
        self.events.send(Event::Step { step: step.name() });
        self.reached.push((step, Instant::now()));
        self.journal.reach(step)
    }
}
