//! The point in time of a VM's disks as a job has it: what is prepared before it, how long it is held, and its end on
//! every way out.
//!
//! [`super::subject`] → [`Prepared::new`] → [`Prepared::take`] → read, while [`Prepared::watch`] looks after the guest →
//! [`Prepared::release`] → [`Prepared::settle`] the bitmaps → [`Prepared::finish`], with the exports by which the storage
//! was asked → [`Prepared::close`].
//!
//! A backup and an export differ only in who reads, and in what says that the reading came to something.

use super::base::{BuiltOn, Choice, ChoiceError};
use super::ending::Ending;
use super::extra::{self, Attached, ExtraError};
use super::fleecing::{Bounds, Fleecing, FleecingError, GivenUp, VirtualFile};
use super::journal::{Journal, JournalError, Record, Step};
use super::lineage;
use super::mark;
use super::power::PowerError;
use super::recover::RecoverError;
use super::storage::{Storage, Unanswered};
use super::subject::{Subject, VmAccess, tell_choice};
use super::volume_run::Uncovered;
use crate::archive::{BackupId, DiskRecord, Moment};
use crate::contract::{BLOCK_SIZE, with_causes};
use crate::event::Event;
use crate::policy::Denied;
use crate::qemu::agent::Freeze;
use crate::qemu::bitmap::{self, Tracking};
use crate::qemu::claim::ClaimError;
use crate::qemu::libvirt::AgentChannel;
use crate::qemu::machine::{RunState, Standing};
use crate::qemu::needs::NeedsError;
use crate::qemu::snapshot::{
    Broken, Cause, NOT_FROZEN, NbdServer, PointRequest, Readers, Unplugged,
};
use crate::qemu::{
    self, Address, Agent, JobId, MachineError, Monitor, MonitorError, Plan, PointInTime, Schema,
    SnapshotError, Watchdog, machine,
};
use crate::volume::source::Source;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why there is no point in time, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
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
    #[error("the guest agent")]
    Agent(#[from] qemu::AgentError),
    /// The guest must be frozen, and there is nobody to do it.
    #[error("the guest cannot be frozen, as `freeze` requires: {0}")]
    NoAgent(&'static str),
    /// The watchdog cannot be started.
    #[error("the watchdog")]
    Watchdog(#[from] qemu::WatchdogError),
    /// Another job has the VM.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// A disk is not granted.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The disks are not there or cannot be backed up.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// QEMU cannot give a point in time of them.
    #[error(transparent)]
    Needs(#[from] NeedsError),
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
    Snapshot(Box<SnapshotError>),
    /// The guest needs the fleecing folder's last room, or the snapshot passed a bound.
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
    /// The snapshot did not hold to the end.
    #[error("nothing read from the snapshot can be trusted")]
    Broken(#[from] Broken),
    /// What QEMU kept in the fleecing images may have been lost.
    #[error("the storage below the fleecing folder failed")]
    FleecingLost(#[source] io::Error),
    /// The system gives no random bytes.
    #[error("no random bytes")]
    Random(#[from] getrandom::Error),
}

/// The disks of a point in time, as NBD clients find them.
pub fn sources(point: &PointInTime) -> impl Iterator<Item = Source> {
    point.volumes.iter().map(|volume| Source {
        name: volume.plan.disk.name.clone(),
        size: volume.plan.disk.size,
        socket: point.socket.clone(),
        export: volume.export.clone(),
        dirty_context: volume.dirty_context.clone(),
    })
}

impl From<SnapshotError> for PointError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(Box::new(error))
    }
}

impl PointError {
    /// Whether all that was made on the way to a point in time was taken back.
    pub fn is_undone(&self) -> bool {
        !matches!(self, Self::Snapshot(error) if !error.is_undone())
    }

    /// Whether another backup is in the way.
    pub fn is_busy(&self) -> bool {
        match self {
            Self::Snapshot(error) => {
                matches!(&error.cause, Cause::BackupAccess(error) if error.is_busy())
            }
            _ => false,
        }
    }

    /// Whether the user can mend it: exit status 2.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Power(error) => error.is_mistake(),
            Self::Extra(error) => error.is_mistake(),
            Self::Needs(error) => error.is_mistake(),
            Self::Machine(error) => !matches!(error, MachineError::Monitor(_)),
            Self::Agent(error) => matches!(error, qemu::AgentError::Connect { .. }),
            Self::NoAgent(_) => true,
            Self::Snapshot(error) => match &error.cause {
                Cause::Fleecing { .. } | Cause::ServerRunning | Cause::ExportOnIothread { .. } => {
                    true
                }
                Cause::Filter(error) => error.is_mistake(),
                Cause::BackupAccess(error) => error.is_mistake(),
                _ => false,
            },
            Self::Choice(ChoiceError::Name(_))
            | Self::Fleecing(
                FleecingError::TooSmall { .. }
                | FleecingError::FileTooLarge { .. }
                | FleecingError::PathTooLong { .. },
            ) => true,
            _ => false,
        }
    }
}

/// All that a point in time needs, in a journal that says so; then the point in time itself.
pub struct Prepared<'a> {
    subject: &'a Subject<'a>,
    monitor: &'a Monitor,
    journal: &'a mut Journal,
    /// Whether the guest ran at the beginning.
    standing: Standing,
    attached: Vec<Attached<'a>>,
    /// Whether another process wrote to one of these meanwhile.
    torn: bool,
    fleecing: Fleecing,
    job: JobId,
    disks: Vec<(qemu::Disk, Choice)>,
    schema: Schema,
    reached: Vec<(Step, Instant)>,
    /// Ends the snapshot if this process dies.
    watchdog: Option<Watchdog>,
    /// What is in QEMU stays there.
    kept: bool,
}

impl<'a> Prepared<'a> {
    /// Attaches the extra files and makes the fleecing images. Where it fails, all is as it was, or the journal stays
    /// and the next run does it.
    pub async fn new(
        subject: &'a Subject<'a>,
        monitor: &'a Monitor,
        journal: &'a mut Journal,
        standing: Standing,
        mut disks: Vec<(qemu::Disk, Choice)>,
        schema: Schema,
        id: BackupId,
    ) -> Result<Self, PointError> {
        let owner = subject.owner;
        let (parent, fleecing_path) = &subject.folders.fleecing;
        let parent = parent.try_clone().map_err(PointError::FleecingLost)?;
        let job = JobId::random()?;
        let name = Fleecing::name(job);
        journal.write(Record {
            job: job.to_string(),
            archive: owner.archive.to_string(),
            namespace: owner.namespace.to_string(),
            backup: id.to_string(),
            step: Step::Preparing,
            fleecing: name.clone(),
            nbd_server: subject.vm.config.nbd.is_none(),
            ended: false,
        })?;
        let attached = match extra::attach_files(monitor, job, &subject.vm.extra, &mut disks).await
        {
            Ok(attached) => {
                for (disk, choice) in disks.iter().rev().take(attached.len()).rev() {
                    tell_choice(subject.events, disk, choice);
                }
                attached
            }
            Err(error) => {
                unprepare(subject, monitor, job, None, journal).await;
                return Err(error.into());
            }
        };
        let sizes: Vec<u64> = disks.iter().map(|(disk, _)| disk.size).collect();
        let format = subject.vm.config.fleecing_format;
        let room = room(monitor, &disks).await;
        let made = Fleecing::create(parent, fleecing_path, &name, &sizes, room, format);
        let fleecing = match made {
            Ok(fleecing) => fleecing,
            Err(error) => {
                unprepare(subject, monitor, job, None, journal).await;
                return Err(error.into());
            }
        };
        Ok(Self {
            subject,
            monitor,
            journal,
            standing,
            attached,
            torn: false,
            fleecing,
            job,
            disks,
            schema,
            reached: Vec::new(),
            watchdog: None,
            kept: false,
        })
    }

    /// Takes back what was prepared before there is anything to tear down.
    pub async fn give_up(mut self) {
        let fleecing = Some(&mut self.fleecing);
        unprepare(self.subject, self.monitor, self.job, fleecing, self.journal).await;
    }

    /// As a manifest says it; once it is released, for good.
    pub fn moment(&self, point: &PointInTime) -> Moment {
        match point.one_moment && !self.torn {
            true => Moment::One,
            false => Moment::OneForEach,
        }
    }

    /// The disks, each with what it builds on.
    pub fn disks(&self) -> &[(qemu::Disk, Choice)] {
        &self.disks
    }

    /// Lets what is given back leave the fleecing image of a disk, after what is clean of it was.
    pub async fn make_room(&self, point: &PointInTime, index: u16) {
        if let Err(error) = point.make_room(self.monitor, index).await {
            let disk = self.disks.get(usize::from(index));
            self.subject.events.warn(format!(
                "{}: its fleecing image does not shrink while it is read: {}",
                disk.map_or("", |(disk, _)| &disk.name),
                with_causes(&error)
            ));
        }
    }

    /// The disks as of `point`, for a backup.
    pub fn uncovered(&self, point: &PointInTime) -> Vec<Uncovered> {
        let each = |(source, (disk, choice)): (Source, &(qemu::Disk, Choice))| Uncovered {
            source,
            base: choice.base.as_ref().and_then(BuiltOn::backup).cloned(),
            reason: choice.reason.clone(),
            disk: DiskRecord {
                mark: choice.mark,
                ..lineage::record(disk)
            },
            bitmap: choice.bitmap.new_bitmap().map(ToString::to_string),
        };
        sources(point).zip(&self.disks).map(each).collect()
    }

    /// Most bytes that the fleecing images took up.
    pub fn fleecing_peak(&self) -> u64 {
        self.fleecing.peak()
    }

    /// An empty file in the job's folder for the disk `name`, QEMU's `index`th, to become, with `regions` beside it.
    pub fn add_virtual_file(
        &self,
        name: &str,
        index: u16,
        regions: &[u8],
    ) -> io::Result<VirtualFile> {
        self.fleecing.add_virtual_file(name, index, regions)
    }

    /// How long each step that was reached took; the last one is over now.
    pub fn steps(&self) -> Vec<(Step, Duration)> {
        let ends = self.reached.iter().skip(1).map(|&(_, at)| at);
        self.reached
            .iter()
            .zip(ends.chain([Instant::now()]))
            .map(|(&(step, from), to)| (step, to - from))
            .collect()
    }

    /// Tells and records that `step` begins.
    pub fn step(&mut self, step: Step) -> Result<(), JournalError> {
        self.subject.events.send(Event::Step { step: step.name() });
        self.reached.push((step, Instant::now()));
        self.journal.reach(step)
    }

    /// Takes the point in time. Where it fails, QEMU and the fleecing folder are as they were, but for what is
    /// returned besides: all of it has been told, and is the next run's.
    pub async fn take(
        &mut self,
        readers: Readers,
    ) -> Result<PointInTime, (PointError, Vec<String>)> {
        let error = match self.try_take(readers).await {
            Ok(point) => return Ok(point),
            Err(error) => error,
        };
        let extra = &self.subject.vm.extra;
        let detached = extra::detach_files(self.monitor, self.job, extra).await;
        let mut left: Vec<_> = detached.iter().map(|it| with_causes(it)).collect();
        left.extend(self.remove_fleecing());
        Err((error, left))
    }

    async fn try_take(&mut self, readers: Readers) -> Result<PointInTime, PointError> {
        let VmAccess {
            config: vm,
            monitor: address,
            ..
        } = self.subject.vm;
        let monitor = self.monitor;
        // No agent answers in a guest that stands still; its file systems cannot be frozen, and nothing writes to them.
        let agent_address = match self.standing {
            Standing::Runs => self.agent_address().await?,
            Standing::Still => None,
        };
        let mut agent = match &agent_address {
            Some(address) => self.reach_agent(address).await?,
            None => None,
        };
        let form = vm.point_in_time.unwrap_or_default();
        let stops = form.stops()
            && machine::run_state(monitor)
                .await?
                .is_some_and(|it| it.running);
        let ending = self.ending(address)?;
        let stopped_by = stops.then_some(address);
        let thawed_by = agent_address.as_ref().filter(|_| agent.is_some());
        let program = self.subject.program.path();
        let watchdog = Watchdog::spawn(program, thawed_by, stopped_by, Some(&ending));
        let mut watchdog = match watchdog.await {
            Ok(watchdog) => Some(watchdog),
            // The VM will not stand still: all that is lost is that somebody ends the snapshot of a job that dies.
            Err(error) if agent.is_none() && !stops => {
                self.subject.events.warn(format!(
                    "{}; if this job dies, its snapshot stays until the next run",
                    with_causes(&error)
                ));
                None
            }
            Err(error) => return Err(error.into()),
        };
        self.step(Step::Snapshot)?;
        if let Some(watchdog) = &mut watchdog {
            watchdog.arm_end().await?;
            if agent.is_some() {
                watchdog.arm_thaw().await?;
            }
            if stops {
                watchdog.arm_cont().await?;
            }
        }
        let server = match &vm.nbd {
            Some(socket) => NbdServer::Shared(socket.clone()),
            None => NbdServer::Start(self.fleecing.socket()),
        };
        let mut plans = Vec::new();
        for ((disk, choice), (path, file)) in self.disks.iter().zip(self.fleecing.images()) {
            let descriptor = file.as_fd().try_clone_to_owned();
            plans.push(Plan {
                disk: disk.clone(),
                fleecing: path.to_owned(),
                descriptor: Some(Arc::new(descriptor.map_err(PointError::FleecingLost)?)),
                bitmap: choice.bitmap.clone(),
            });
        }
        let request = PointRequest {
            job: self.job,
            block_size: BLOCK_SIZE,
            plans,
            server,
            readers,
            form,
            format: vm.fleecing_format,
            freeze: vm.freeze.unwrap_or_default(),
        };
        let taken = qemu::snapshot::take(monitor, &self.schema, request, agent.as_mut()).await;
        let stuck = matches!(&taken, Err(error) if error.is_stuck());
        // The agent takes one client at a time: ours goes before the watchdog may need it.
        drop(agent);
        if !stuck {
            if let Some(watchdog) = &mut watchdog
                && let Err(error) = watchdog.runs().await
            {
                // It may thaw the guest once more, which does no harm. The point in time is there and stays.
                self.subject.events.warn(with_causes(&error));
            }
            self.watchdog = watchdog;
        }
        let taken = taken?;
        for note in &taken.notes {
            self.subject.events.note(note);
        }
        if !taken.one_moment {
            self.subject.events.warn(
                "the disks are not of one moment: by backup-access QEMU freezes one after the other, and there is no VM here that could be stopped for it; the form `job` takes all at once",
            );
        }
        Ok(taken)
    }

    /// Marks each new bitmap, so that the next backup can tell whether it is still that one. What cannot be marked is not
    /// looked for then.
    pub async fn mark(&mut self, point: &PointInTime) {
        for (index, (disk, choice)) in (0..).zip(&mut self.disks) {
            let Some(bitmap) = choice.bitmap.new_bitmap() else {
                continue;
            };
            let base = choice.base.as_ref();
            let base = base.and_then(|base| base.disk().mark);
            match mark::set(self.monitor, point, index, disk, bitmap, base).await {
                Ok(mark) => choice.mark = Some(mark),
                Err(error) => self.subject.events.warn(format!(
                    "{}: its bitmap cannot be marked, so the next backup does not see whether somebody clears it: {}",
                    disk.name,
                    with_causes(&error)
                )),
            }
        }
    }

    /// Where the guest's agent is. That a domain of libvirt's has none is told, and refused where it was asked for.
    async fn agent_address(&self) -> Result<Option<Address>, PointError> {
        let Subject { vm, events, .. } = *self.subject;
        if let Some(path) = &vm.config.agent {
            return Ok(Some(Address::Socket(path.clone())));
        }
        let Some(definition) = self.monitor.described().await? else {
            return Ok(None);
        };
        let lack = match definition.agent {
            AgentChannel::Connected => return Ok(Some(vm.monitor.clone())),
            AgentChannel::Disconnected => {
                "libvirt says that no agent is connected in the guest (is qemu-guest-agent running there?)"
            }
            AgentChannel::None => "the domain has no channel org.qemu.guest_agent.0",
        };
        match vm.config.freeze {
            Some(Freeze::Required) => return Err(PointError::NoAgent(lack)),
            Some(Freeze::Never) => events.note(format!("{NOT_FROZEN} (`freeze` is `never`)")),
            Some(Freeze::IfAvailable) => events.note(format!("{NOT_FROZEN}: {lack}")),
            None => events.warn(format!("{NOT_FROZEN}: {lack}")),
        }
        Ok(None)
    }

    /// The agent, unless it is to be done without.
    async fn reach_agent(&self, address: &Address) -> Result<Option<Agent>, PointError> {
        let Subject { vm, events, .. } = *self.subject;
        let freeze = vm.config.freeze.unwrap_or_default();
        if freeze == Freeze::Never {
            events.note(format!("{NOT_FROZEN} (`freeze` is `never`)"));
            return Ok(None);
        }
        match Agent::reach(address, qemu::agent::Limits::default()).await {
            Ok(agent) => Ok(Some(agent)),
            Err(error) if freeze == Freeze::IfAvailable => {
                events.note(format!("{NOT_FROZEN}: {}", with_causes(&error)));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What the watchdog needs to know to end the snapshot.
    fn ending(&self, monitor: &Address) -> Result<String, PointError> {
        let absolute = |path: &Path| std::path::absolute(path);
        let (_, fleecing) = &self.subject.folders.fleecing;
        let make = || {
            Ok(Ending {
                job: self.job.to_string(),
                monitor: monitor.absolute()?,
                state: absolute(self.journal.path())?,
                fleecing: absolute(fleecing)?,
                nbd: self
                    .subject
                    .vm
                    .config
                    .nbd
                    .as_deref()
                    .map(absolute)
                    .transpose()?,
            })
        };
        let ending = make().and_then(|ending| serde_json::to_string(&ending).map_err(Into::into));
        ending.map_err(|error| PointError::Watchdog(qemu::WatchdogError::Start(error)))
    }

    /// Waits until the snapshot has to be given up: for the guest's sake, by a bound, or because QEMU is gone.
    pub async fn watch(&self, bounds: Bounds) -> PointError {
        tokio::select! {
            full = self.fleecing.given_up(bounds) => full.into(),
            // Most likely QEMU ended. If not, nothing can be said of the snapshot any more all the same.
            lost = self.monitor.lost() => lost.into(),
        }
    }

    /// After the last read: whether the snapshot held to the end, as far as QEMU and the storage can say.
    pub async fn check_intact(&self, point: &PointInTime) -> Result<(), PointError> {
        point.check_alive(self.monitor).await?;
        self.fleecing.sync().map_err(PointError::FleecingLost)
    }

    /// Takes all of it down but the bitmaps: the VM first, whatever became of the reading and whether the journal can
    /// be kept. Returns what is left; the next run removes it.
    pub async fn release(&mut self, point: &PointInTime) -> Vec<String> {
        let mut left = Vec::new();
        left.extend(self.step(Step::Releasing).err().map(|e| with_causes(&e)));
        if let Err(unanswered) = self.wait_for_storage(point).await {
            left.push(self.keep(&unanswered));
        } else {
            let errors = point.teardown(self.monitor).await;
            self.kept = !errors.is_empty();
            left.extend(errors.iter().map(|it| with_causes(it)));
            // QEMU may still hold a file that could not be taken from it; deleting it harms neither side.
            self.fleecing.remove_images();
            left.extend(self.resume().await);
        }
        self.torn = extra::warn_of_changes(&self.attached, self.subject.events);
        left
    }

    async fn wait_for_storage(&self, point: &PointInTime) -> Result<(), Unanswered> {
        let Subject {
            events, signals, ..
        } = *self.subject;
        let storage = Storage::new(&point.socket, point.probes());
        let storage = match self.fleecing.is_nearly_full() {
            // All that the guest wrote is not to be waited for while its writes fill up what is left.
            true => storage.in_haste(),
            false => storage,
        };
        storage.wait(events, signals).await
    }

    /// What is in QEMU is left to the watchdog or the next run. Returns what to say of it.
    fn keep(&mut self, unanswered: &Unanswered) -> String {
        self.kept = true;
        format!(
            "what job {} made in QEMU stays, because {unanswered} and the VM would stand still until it does: the job's watchdog removes it then, or `fleecebox recover` does",
            self.job
        )
    }

    /// A guest whose writes a full fleecing image failed was stopped by QEMU: with the image gone they succeed.
    async fn resume(&self) -> Option<String> {
        let monitor = self.monitor;
        let stopped = self.standing == Standing::Runs
            && machine::run_state(monitor)
                .await
                .is_ok_and(|state| state.as_ref().is_some_and(RunState::is_io_error));
        if !stopped {
            return None;
        }
        self.subject.events.warn(
            "an I/O error stopped the VM during the backup; it is continued now that nothing of the backup is left in it",
        );
        let continued = monitor.execute(qapi::qmp::cont {}).await;
        let error = continued.err()?;
        Some(format!(
            "the VM is stopped by an I/O error: {}",
            with_causes(&error)
        ))
    }

    /// Whether no QEMU answers any more that could have anything of the job's. What answers again is cleaned up by whoever
    /// sees that.
    async fn has_ended(&self) -> bool {
        self.monitor.is_lost() && Monitor::reach(&self.subject.vm.monitor).await.is_err()
    }

    fn remove_fleecing(&mut self) -> Option<String> {
        let error = self.fleecing.remove().err()?;
        Some(format!(
            "the fleecing images in {}: {}",
            self.fleecing.folder().display(),
            with_causes(&error)
        ))
    }

    /// The bitmaps: switched to the new ones where it is `committed`, else as if nothing had been tried. Returns what
    /// could not be settled; the next run does it.
    pub async fn settle(&mut self, point: &PointInTime, committed: bool) -> Vec<String> {
        let mut left = Vec::new();
        if self.kept {
            // A bitmap is in its image as well: QEMU reads and writes there to remove one.
            return left;
        }
        if let Err(error) = self.step(Step::SwitchingBitmaps) {
            left.push(with_causes(&error));
        }
        if let Err(unanswered) = self.wait_for_storage(point).await {
            left.push(format!("the bitmaps: {unanswered}"));
            left.push(self.keep(&unanswered));
            return left;
        }
        let monitor = self.monitor;
        for (volume, (disk, choice)) in point.volumes.iter().zip(&self.disks) {
            let node = &disk.node;
            let settled = if committed {
                accept(monitor, node, choice).await
            } else {
                bitmap::back_out(monitor, node, &volume.plan.bitmap).await
            };
            match settled {
                Ok(Tracking::Restored) => {}
                Ok(Tracking::Lost) => self.subject.events.warn(format!(
                    "{}: its bitmap could not be made whole; the next backup reads it in full",
                    disk.name
                )),
                Err(error) => left.push(format!(
                    "the bitmaps of {}: {}",
                    disk.name,
                    with_causes(&error)
                )),
            }
        }
        left
    }

    /// After the bitmaps: takes down the rest, which the storage was asked by. Returns what is left.
    pub async fn finish(&mut self, point: &PointInTime) -> Vec<String> {
        let mut left = Vec::new();
        if self.kept {
            if self.has_ended().await {
                left.extend(self.remove_fleecing());
            }
            return left;
        }
        if let Err(unanswered) = self.wait_for_storage(point).await {
            left.push(self.keep(&unanswered));
            return left;
        }
        let errors = point.finish(self.monitor).await;
        if errors.is_empty() {
            self.journal.server_stopped();
        }
        for Unplugged { disk, node, taken } in
            point.unplugged(self.monitor).await.unwrap_or_default()
        {
            let (which, why) = match taken {
                true => ("", "read it"),
                false => (
                    ", which is not in the backup,",
                    "asked its storage whether it answers",
                ),
            };
            self.subject.events.warn(format!(
                "disk {disk}{which} was unplugged while the backup ran, and could not be closed, as it {why}: QEMU still has its node {node} open (QMP blockdev-del closes it)"
            ));
        }
        left.extend(errors.iter().map(|it| with_causes(it)));
        left.extend(self.remove_fleecing());
        left
    }

    /// While anything is left, the journal stays for the next run, and the watchdog does what it can.
    pub async fn close(&mut self, left: &mut Vec<String>) {
        if !left.is_empty() {
            left.extend(self.journal.end_incomplete().err().map(|e| with_causes(&e)));
            return;
        }
        if let Err(error) = self.journal.clear() {
            left.push(with_causes(&error));
        }
        if let Some(watchdog) = self.watchdog.take()
            && let Err(error) = watchdog.disarm().await
        {
            // There is nothing left that it could end.
            self.subject.events.warn(with_causes(&error));
        }
    }

    /// Warns of each thing that is left.
    pub fn tell_left(&self, left: &[String]) {
        for left in left {
            self.subject.events.warn(format!(
                "clean-up is incomplete, the next run does the rest: {left}"
            ));
        }
    }
}

/// Bytes that the fleecing images of `disks` begin with.
pub(super) async fn room(monitor: &Monitor, disks: &[(qemu::Disk, Choice)]) -> u64 {
    let mut room = 0u64;
    for (disk, choice) in disks {
        let old = choice.bitmap.old().map(ToString::to_string);
        let dirty = old.and_then(|old| disk.bitmap(&old)).map(|old| old.dirty);
        let held = match dirty {
            Some(dirty) => Some(dirty),
            // A compressed image holds more than it takes up, and is never one that is written.
            None => machine::held(monitor, &disk.node).await.ok().flatten(),
        };
        let held = held.unwrap_or(disk.size);
        room = room.saturating_add(super::fleecing::room(disk.size, held));
    }
    room
}

async fn accept(monitor: &Monitor, node: &str, choice: &Choice) -> Result<Tracking, MonitorError> {
    bitmap::accept(monitor, node, &choice.bitmap).await?;
    for stale in &choice.stale {
        bitmap::remove(monitor, node, stale).await?;
    }
    Ok(Tracking::Restored)
}

/// Where it fails, the journal stays, and the next run does it.
async fn unprepare(
    subject: &Subject<'_>,
    monitor: &Monitor,
    job: JobId,
    fleecing: Option<&mut Fleecing>,
    journal: &mut Journal,
) {
    let detached = extra::detach_files(monitor, job, &subject.vm.extra).await;
    let removed = fleecing.is_none_or(|fleecing| fleecing.remove().is_ok());
    if removed && detached.is_empty() {
        let _ = journal.clear();
    }
}
