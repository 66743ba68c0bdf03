//! One backup of one VM, from the first look at it to the last thing removed.
//!
//! point in time → run each volume → the snapshot was intact → QEMU's part taken down → prove → commit → bitmaps.
//!
//! The snapshot is taken down as soon as its last byte has been read, before anything is proven or made durable: until
//! then each of the guest's writes pays for it. Whatever fails, on every way out: QEMU's part is taken down first, then
//! tracking becomes what it was, then what was stored is removed.

use super::base::Owner;
use super::component::{Component, ComponentError};
use super::fleecing::Bounds;
use super::journal::{Journal, JournalError, Step};
use super::means::{Maker, Means};
use super::point_in_time::{PointError, Prepared};
use super::prove::ProofError;
use super::recover::{self, RecoverError};
use super::selection::Selection;
use super::signals::Signals;
use super::subject::{self, Folders, Subject, VmAccess};
use super::transfer::Transfer;
use super::volume_run::{Covered, Uncovered, VolumeError};
use crate::archive::{
    self, Archive, BackupId, BackupWriter, Kept, Manifest, Moment, NamespaceName, Recheck,
};
use crate::config::Provider;
use crate::contract::with_causes;
use crate::event::Events;
use crate::grants::account::Account;
use crate::grants::farewell::Farewells;
use crate::qemu::snapshot::Readers;
use crate::qemu::{Monitor, PointInTime};
use crate::sandbox::{Cache, Program};
use bytes::Bytes;
use futures_util::FutureExt;
use std::any::Any;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// What to back up, with what, to where. Every path was opened by the caller.
#[derive(Debug)]
pub struct BackupRequest {
    /// The VM.
    pub vm: VmAccess,
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
    /// By whose word disks are taken or left out.
    pub selection: Selection,
    /// What the job uses of the provider's limits, for whoever wants to know whatever becomes of the job.
    pub account: Arc<Account>,
    /// Read every disk in full.
    pub full: bool,
}

/// The places that a job works in.
pub struct BackupPlaces {
    /// The archive.
    pub archive: Arc<Archive>,
    /// Of the VM's jobs.
    pub folders: Folders,
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
    #[error("provider {name}")]
    Component {
        /// The provider's name.
        name: String,
        /// Why.
        source: ComponentError,
    },
    /// There is no point in time, or none any more.
    #[error(transparent)]
    Point(#[from] PointError),
    /// A volume was not backed up.
    #[error("volume {volume}")]
    Volume {
        /// Its name.
        volume: String,
        /// Why.
        source: VolumeError,
    },
    /// What the provider claims cannot be read back.
    #[error("volume {volume}")]
    Proof {
        /// Its name.
        volume: String,
        /// Why.
        source: ProofError,
    },
    /// The archive failed.
    #[error("the archive")]
    Archive(#[from] archive::Error),
    /// A task of the job died.
    #[error("a task of the job died")]
    Task(#[source] tokio::task::JoinError),
    /// A signal asked for the end.
    #[error("cancelled; {}", match left {
        false => "the VM and the archive are as they were before",
        true => "what is left is named above",
    })]
    Cancelled {
        /// Whether anything of the job is left.
        left: bool,
    },
    /// A fault of this program.
    #[error("a fault of this program ended the job: {0}")]
    Panicked(String),
}

impl BackupError {
    /// Whether the user can mend it: exit status 2.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Component { source, .. } => source.is_refusal(),
            Self::Point(error) => error.is_mistake(),
            _ => false,
        }
    }
}

impl From<JournalError> for BackupError {
    fn from(error: JournalError) -> Self {
        Self::Point(error.into())
    }
}

impl From<RecoverError> for BackupError {
    fn from(error: RecoverError) -> Self {
        Self::Point(error.into())
    }
}

/// Makes one backup.
pub async fn backup(
    request: BackupRequest,
    places: BackupPlaces,
    events: &Events,
    signals: &Signals,
) -> Result<Summary, BackupError> {
    let refused = |source| BackupError::Component {
        name: request.provider_name.clone(),
        source,
    };
    let program = &places.program;
    let component = tokio::select! {
        loaded = Component::load(request.component.clone(), program, &places.cache, request.provider.grant.wasi(), events) => loaded.map_err(refused)?,
        () = signals.end.cancelled() => return Err(BackupError::Cancelled { left: false }),
    };
    request.account.compiling(component.compiled.usage);
    let namespace = Arc::new(places.archive.create_namespace(&request.namespace)?);
    if request.full {
        namespace.set_recheck(Recheck::Everything);
    }
    let owner = Owner {
        archive: places.archive.id(),
        namespace: request.namespace.clone(),
        vm: request.vm.name.clone(),
    };
    // First the lock: QEMU would let a second job wait for the monitor without a word.
    let mut journal = places.folders.journal()?;
    let subject = Subject {
        vm: &request.vm,
        selection: &request.selection,
        folders: &places.folders,
        archive: &places.archive,
        namespace: &namespace,
        owner: &owner,
        full: request.full,
        program,
        events,
        signals,
    };
    let attempt = Attempt {
        request: &request,
        subject: &subject,
        program,
        component,
    };
    let job = async |monitor: &Monitor, journal: &mut Journal| attempt.make(monitor, journal).await;
    let (summary, left) = subject::on_vm(&subject, &mut journal, job).await?;
    Ok(Summary { left, ..summary })
}

/// What a panic said. Which tasks of the job run on is not known, so nothing it made is believed.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked").to_owned()
}

fn panicked(panic: &(dyn Any + Send)) -> BackupError {
    BackupError::Panicked(panic_text(panic))
}

/// A backup of a VM that can be reached.
struct Attempt<'a> {
    request: &'a BackupRequest,
    subject: &'a Subject<'a>,
    program: &'a Program,
    component: Component,
}

impl Attempt<'_> {
    async fn make(
        &self,
        monitor: &Monitor,
        journal: &mut Journal,
    ) -> Result<(Summary, Vec<String>), BackupError> {
        let &Self {
            request, subject, ..
        } = self;
        let events = subject.events;
        recover::recover(&subject.traces(monitor), journal, events).await?;
        let standing = subject::standing(subject, monitor).await?;
        let id = BackupId::random(OffsetDateTime::now_utc())?;
        let (disks, left_out, schema) = subject.disks(monitor, id).await?;
        let configuration = monitor.configuration().await.map_err(PointError::from)?;
        let prepared =
            Prepared::new(subject, monitor, journal, standing, disks, schema, id).await?;
        let limits = &request.provider.limits;
        let level = limits.zstd_level(subject.archive.zstd_level());
        let begun = subject.namespace.begin_at(id, level);
        let begun = begun.and_then(|writer| Ok((keep(&writer, configuration)?, Arc::new(writer))));
        let (kept, writer) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                prepared.give_up().await;
                return Err(error.into());
            }
        };
        let transfer = Transfer {
            vm: &request.vm.name,
            maker: Maker {
                name: &request.provider_name,
                provider: &request.provider,
                component: &self.component,
            },
            bytes: request.component.clone(),
            attachments: &request.attachments,
            namespace: Arc::clone(subject.namespace),
            writer: Some(writer),
            id,
            moment: Moment::One,
            left_out,
            kept,
            means: Means::new(
                events.clone(),
                subject.signals.end.clone(),
                Arc::clone(&request.account),
                self.program.clone(),
            ),
            farewells: Farewells::new(subject.signals.at_once.clone()),
        };
        let backup = Backup {
            request,
            transfer,
            prepared,
        };
        backup.make().await
    }
}

/// Keeps what the VM is defined by, under the name of such a file, where it is known.
fn keep(
    writer: &BackupWriter,
    configuration: Option<(&str, String)>,
) -> Result<Vec<Kept>, archive::Error> {
    let named = configuration.and_then(|(name, text)| Some((name.parse().ok()?, text)));
    match named {
        Some((name, text)) => Ok(vec![writer.keep(name, text.as_bytes())?]),
        None => Ok(Vec::new()),
    }
}

/// A backup under way.
struct Backup<'a> {
    request: &'a BackupRequest,
    transfer: Transfer<'a>,
    prepared: Prepared<'a>,
}

impl Backup<'_> {
    /// No `?` between the point in time and the end of the clean-up: whatever fails, the rest of it is done.
    async fn make(mut self) -> Result<(Summary, Vec<String>), BackupError> {
        let point = match self.prepared.take(Readers::Discard).await {
            Ok(point) => point,
            Err((error, mut left)) => {
                left.extend(self.transfer.abandon().await);
                if error.is_undone() {
                    self.prepared.close(&mut left).await;
                }
                self.prepared.tell_left(&left);
                return Err(error.into());
            }
        };
        let since = Instant::now();
        self.prepared.mark(&point).await;
        let volumes = self.prepared.uncovered(&point);
        let read = AssertUnwindSafe(self.read_all(&point, &volumes)).catch_unwind();
        let read = read.await.unwrap_or_else(|panic| Err(panicked(&*panic)));
        let fleecing_peak = self.prepared.fleecing_peak();
        let mut left = self.prepared.release(&point).await;
        self.transfer.moment = self.prepared.moment(&point);
        let snapshot = since.elapsed();
        self.request.account.snapshot(snapshot, fleecing_peak);
        let committed = match read {
            Ok(covered) => {
                let made =
                    AssertUnwindSafe(self.prove_and_commit(covered, &volumes)).catch_unwind();
                made.await.unwrap_or_else(|panic| Err(panicked(&*panic)))
            }
            Err(error) => Err(error),
        };
        left.extend(self.settle_bitmaps(&point, &committed).await);
        left.extend(self.prepared.finish(&point).await);
        if committed.is_err() {
            left.extend(self.transfer.abandon().await);
        }
        self.prepared.close(&mut left).await;
        self.transfer.farewells.over().await;
        let manifest = committed.map_err(|error| {
            self.prepared.tell_left(&left);
            match error {
                BackupError::Cancelled { .. } => BackupError::Cancelled {
                    left: !left.is_empty(),
                },
                error => error,
            }
        })?;
        let summary = Summary {
            manifest,
            frozen: point.frozen,
            stopped: point.stopped,
            snapshot,
            fleecing_peak,
            steps: self.prepared.steps(),
            left: Vec::new(),
        };
        Ok((summary, left))
    }

    /// Runs the provider on every volume side by side; the first failure stops the others.
    async fn read_all(
        &mut self,
        point: &PointInTime,
        volumes: &[Uncovered],
    ) -> Result<Vec<Covered>, BackupError> {
        self.prepared.step(Step::Running)?;
        let stop = self.transfer.means.cancel.child_token();
        let make_room = |index| self.prepared.make_room(point, index);
        let runs = self.transfer.run(volumes, make_room, &stop);
        let bounds = Bounds::of(&self.request.vm.config, &self.request.provider.limits);
        let covered = 'runs: {
            tokio::pin!(runs);
            let failure: BackupError = tokio::select! {
                ended = &mut runs => break 'runs ended?,
                given_up = self.prepared.watch(bounds) => given_up.into(),
            };
            stop.cancel();
            // Why the runs ended is known.
            let _ = runs.await;
            return Err(failure);
        };
        self.prepared.check_intact(point).await?;
        Ok(covered)
    }

    async fn prove_and_commit(
        &mut self,
        covered: Vec<Covered>,
        volumes: &[Uncovered],
    ) -> Result<Manifest, BackupError> {
        self.prepared.step(Step::Proving)?;
        self.transfer.prove(&covered).await?;
        self.prepared.step(Step::Committing)?;
        let manifest = self.transfer.commit(covered, volumes).await?;
        // The backup is there, whether or not the journal can say so: the archive decides.
        if let Err(error) = self.prepared.step(Step::Committed) {
            self.transfer.means.events.warn(with_causes(&error));
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
        self.prepared.settle(point, committed.is_ok()).await
    }
}
