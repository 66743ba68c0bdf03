//! A point in time held for a tool that is trusted: it reads what QEMU exports, as long as it likes.
//!
//! What a tool has is recorded in an archive in the VM's state folder that holds records and no bytes: the tool's name is
//! the namespace, and an [`ExportRecord`] is what says that the tool said "success". So bitmaps are named, switched, and
//! cleaned up after a crash by the very code that does it for backups.

mod control;

pub use control::{Answer, CONTROL, end};

use super::backup::panic_text;
use super::base::{Choice, Owner};
use super::fleecing::{Bounds, VirtualFile};
use super::journal::{Journal, JournalError, Step};
use super::lineage;
use super::point_in_time::{PointError, Prepared, sources};
use super::recover;
use super::selection::Selection;
use super::signals::Signals;
use super::subject::{self, Folders, Subject, VmAccess};
use crate::archive::{
    self, Archive, BackupId, ExportRecord, ExportedDisk, LeftOut, Moment, NamespaceName,
};
use crate::config::Limits;
use crate::contract::{BLOCK_SIZE, with_causes};
use crate::event::Events;
use crate::extent::Extent;
use crate::nbd;
use crate::qemu::snapshot::Readers;
use crate::qemu::{Monitor, MonitorError, PointInTime};
use crate::sandbox::Program;
use crate::volume::open;
use crate::volume::reader::Reader;
use crate::volume::source::Source;
use control::Control;
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use time::OffsetDateTime;

/// How a tool gets the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// NBD exports on a unix socket, with dirty bitmaps as meta contexts.
    Nbd,
    /// Each disk as a read-only file through FUSE, its dirty regions as JSON beside it.
    FileHandle,
}

/// What a tool says of what it read; it decides what becomes of the bitmaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It has all of it: the next export holds what changes from this point in time on.
    Success,
    /// It has not: the next export holds these changes too.
    Failure,
}

/// What to hold, and for whom.
#[derive(Debug)]
pub struct ExportRequest {
    /// The VM.
    pub vm: VmAccess,
    /// The tool whose last success is the base of an increment; without it every export is of all, and nothing is
    /// tracked.
    pub tracking: Option<NamespaceName>,
    /// How the tool gets the disks.
    pub mechanism: Mechanism,
    /// All of every disk.
    pub full: bool,
}

/// The places that an export works in.
pub struct ExportPlaces {
    /// Records of what tools have.
    pub records: Arc<Archive>,
    /// Of the VM's jobs.
    pub folders: Folders,
}

/// What a tool is told once it can read.
#[derive(Debug, Serialize)]
pub struct Held {
    /// The VM.
    pub vm: String,
    /// Of this point in time.
    pub export: BackupId,
    /// How the disks are to be had.
    pub mechanism: Mechanism,
    /// The tool that is tracked.
    pub tracking: Option<NamespaceName>,
    /// The socket of QEMU's NBD server.
    pub socket: PathBuf,
    /// The disks.
    pub volumes: Vec<HeldVolume>,
    /// Whether the disks are as of one moment.
    pub moment: Moment,
    /// The VM's other disks.
    pub left_out: Vec<LeftOut>,
}

/// One disk that can be read.
#[derive(Debug, Serialize)]
pub struct HeldVolume {
    /// Its name.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Of the disk's image; what is read here is always raw.
    pub format: String,
    /// The export to build on, where only what changed since is dirty.
    pub base: Option<BackupId>,
    /// Why there is none, where there could be one.
    pub reason: Option<String>,
    /// Where NBD clients find it.
    pub uri: String,
    /// Its name in the NBD server.
    pub nbd_export: String,
    /// The NBD meta context that tells what is dirty; without it, all is.
    pub dirty_context: Option<String>,
    /// By `file-handle`: the file.
    pub file: Option<PathBuf>,
    /// By `file-handle`: a JSON file with its dirty regions.
    pub regions: Option<PathBuf>,
}

/// How an export ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// What became of the bitmaps.
    pub verdict: Verdict,
    /// Whether a signal said so, and not somebody who knows what the tool did.
    pub by_signal: bool,
    /// Disks of the VM that are missing although nobody excluded them.
    pub missing: Vec<String>,
    /// Clean-up that failed; the next run does it.
    pub left: Vec<String>,
}

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// There is no point in time, or none any more.
    #[error(transparent)]
    Point(#[from] PointError),
    /// What tools have cannot be recorded.
    #[error("the record of what the tool has")]
    Records(#[from] archive::Error),
    /// The control socket cannot be made.
    #[error("the control socket {path}", path = path.display())]
    Control {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No file can stand for the disk.
    #[error("disk {disk} cannot be had as a file")]
    File {
        /// The disk.
        disk: String,
        /// Why.
        source: FileError,
    },
    /// The disk cannot be read any more.
    #[error(
        "disk {disk} cannot be read as of the point in time any more, and what was read of it cannot be trusted, so this counts as a failure (a tool that gives space back leaves the first 64 KiB of each disk)"
    )]
    Unreadable {
        /// The disk.
        disk: String,
        /// What the server said.
        source: nbd::Error,
    },
    /// A fault of this program.
    #[error("a fault of this program ended the export: {0}")]
    Panicked(String),
    /// A task died.
    #[error("a task of the export died")]
    Task(#[source] tokio::task::JoinError),
}

/// Why no file can stand for a disk.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// QEMU refuses.
    #[error(
        "QEMU needs FUSE, /dev/fuse, and, where it does not run as root, fusermount3 and a fleecing folder that it may use"
    )]
    Qemu(#[source] MonitorError),
    /// The file cannot be made.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its dirty regions cannot be asked.
    #[error(transparent)]
    Regions(#[from] nbd::Error),
}

impl ExportError {
    /// Whether the user can mend it: exit status 2.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Point(error) => error.is_mistake(),
            Self::File { source, .. } => {
                matches!(source, FileError::Qemu(error) if error.is_refusal())
            }
            _ => false,
        }
    }
}

impl From<JournalError> for ExportError {
    fn from(error: JournalError) -> Self {
        Self::Point(error.into())
    }
}

/// Takes a point in time, tells `ready`, and holds it until somebody says how it ends, or `cancel` does.
///
/// # Errors
/// An [`ExportError`]; nothing is left in QEMU and tracking is as it was before, but for what has been told.
pub async fn export(
    request: ExportRequest,
    places: ExportPlaces,
    ready: impl FnOnce(&Held),
    events: &Events,
    signals: &Signals,
) -> Result<Ended, ExportError> {
    // What is not tracked has no bitmap; its job still needs a name in the journal.
    let namespace = match &request.tracking {
        Some(name) => name.clone(),
        None => "untracked"
            .parse()
            .map_err(|_| archive::Error::NotAnArchive)?,
    };
    let mut journal = places.folders.journal()?;
    let namespace = Arc::new(places.records.create_namespace(&namespace)?);
    let owner = Owner {
        archive: places.records.id(),
        namespace: namespace.name().clone(),
        vm: request.vm.name.clone(),
    };
    let subject = Subject {
        vm: &request.vm,
        selection: &Selection::default(),
        folders: &places.folders,
        archive: &places.records,
        namespace: &namespace,
        owner: &owner,
        full: request.full,
        program: &Program::this(),
        events,
        signals,
    };
    let (folder, path) = &places.folders.state;
    let control = Control::listen(folder, path)?;
    let job = async |monitor: &Monitor, journal: &mut Journal| {
        let export = Export {
            request: &request,
            subject: &subject,
            monitor,
            control: &control,
        };
        export.make(journal, ready).await
    };
    let ended = subject::on_vm(&subject, &mut journal, job).await;
    let ended = ended.map(|(ended, left)| Ended { left, ..ended });
    control.answer(&ended).await;
    control.close(folder);
    ended
}

/// An export of a VM that can be reached.
struct Export<'a> {
    request: &'a ExportRequest,
    subject: &'a Subject<'a>,
    monitor: &'a Monitor,
    control: &'a Control,
}

impl Export<'_> {
    /// No `?` between the point in time and the end of the clean-up: whatever fails, the rest of it is done.
    async fn make(
        self,
        journal: &mut Journal,
        ready: impl FnOnce(&Held),
    ) -> Result<(Ended, Vec<String>), ExportError> {
        let (subject, monitor) = (self.subject, self.monitor);
        let point_error = PointError::from;
        recover::recover(&subject.traces(monitor), journal, subject.events)
            .await
            .map_err(point_error)?;
        let standing = subject::standing(subject, monitor).await?;
        let id = BackupId::random(OffsetDateTime::now_utc())?;
        let (disks, left_out, schema) = match self.request.tracking {
            Some(_) => subject.disks(monitor, id).await?,
            None => {
                let selected = subject.select(monitor).await?;
                let untracked = || Choice::untracked("nothing is tracked (--tracking)");
                let disks = selected.disks.into_iter();
                let disks = disks.map(|disk| (disk, untracked())).collect();
                (disks, selected.left_out, selected.schema)
            }
        };
        let missing = left_out.iter().filter(|disk| !disk.excluded);
        let missing = missing.map(|disk| disk.name.clone()).collect();
        let mut prepared =
            Prepared::new(subject, monitor, journal, standing, disks, schema, id).await?;
        let readers = match self.request.mechanism {
            Mechanism::Nbd => Readers::Discard,
            Mechanism::FileHandle => Readers::ReadOnly,
        };
        let point = match prepared.take(readers).await {
            Ok(point) => point,
            Err((error, mut left)) => {
                if error.is_undone() {
                    prepared.close(&mut left).await;
                }
                prepared.tell_left(&left);
                return Err(error.into());
            }
        };
        let held =
            AssertUnwindSafe(self.hold(&mut prepared, &point, id, left_out, ready)).catch_unwind();
        let (verdict, by_signal, failure) = held.await.unwrap_or_else(|panic| {
            let panicked = ExportError::Panicked(panic_text(&*panic));
            (Verdict::Failure, false, Some(panicked))
        });
        let mut left = prepared.release(&point).await;
        let recorded = match (verdict, &self.request.tracking) {
            (Verdict::Success, Some(_)) => self.record(&mut prepared, id).await,
            _ => Ok(()),
        };
        let failure = failure.or(recorded.err());
        if matches!(
            failure,
            Some(ExportError::Records(archive::Error::CommitUnknown { .. }))
        ) {
            left.push("it is not known whether the success was recorded; all bitmaps stay until that can be asked".into());
        } else {
            let accepted = failure.is_none() && verdict == Verdict::Success;
            left.extend(prepared.settle(&point, accepted).await);
        }
        left.extend(prepared.finish(&point).await);
        prepared.close(&mut left).await;
        match failure {
            None => {
                let ended = Ended {
                    verdict,
                    by_signal,
                    missing,
                    left: Vec::new(),
                };
                Ok((ended, left))
            }
            Some(error) => {
                prepared.tell_left(&left);
                Err(error)
            }
        }
    }

    /// Returns how it ended, whether a signal said so, and why it is a failure although nobody said so.
    async fn hold(
        &self,
        prepared: &mut Prepared<'_>,
        point: &PointInTime,
        id: BackupId,
        left_out: Vec<LeftOut>,
        ready: impl FnOnce(&Held),
    ) -> (Verdict, bool, Option<ExportError>) {
        let failed = |error| (Verdict::Failure, false, Some(error));
        // What is clean is not given back here, but by the tool, if it likes.
        for (index, _) in (0..).zip(&point.volumes) {
            prepared.make_room(point, index).await;
        }
        if let Err(error) = prepared.step(Step::Running) {
            return failed(error.into());
        }
        match self.describe(prepared, point, id).await {
            Ok(held) => ready(&Held { left_out, ..held }),
            Err(error) => return failed(error),
        }
        let bounds = Bounds::of(&self.request.vm.config, &Limits::default());
        let verdict = tokio::select! {
            verdict = self.control.wait() => verdict,
            () = self.subject.signals.end.cancelled() => return (Verdict::Failure, true, None),
            given_up = prepared.watch(bounds) => return failed(given_up.into()),
        };
        if verdict == Verdict::Failure {
            return (verdict, false, None);
        }
        // A tool's "success" is about what it read; whether that was the point in time is for us to say.
        for disk in sources(point) {
            if let Err(source) = read_first_block(&disk).await {
                let disk = disk.name;
                return failed(ExportError::Unreadable { disk, source });
            }
        }
        match prepared.check_intact(point).await {
            Ok(()) => (verdict, false, None),
            Err(error) => failed(error.into()),
        }
    }

    async fn describe(
        &self,
        prepared: &Prepared<'_>,
        point: &PointInTime,
        id: BackupId,
    ) -> Result<Held, ExportError> {
        let mut volumes = Vec::new();
        for ((source, (disk, choice)), index) in sources(point).zip(prepared.disks()).zip(0..) {
            let file = match self.request.mechanism {
                Mechanism::Nbd => None,
                Mechanism::FileHandle => {
                    let made = self.add_file(prepared, point, index, &source).await;
                    let disk = disk.name.clone();
                    Some(made.map_err(|source| ExportError::File { disk, source })?)
                }
            };
            volumes.push(HeldVolume {
                name: disk.name.clone(),
                size: disk.size,
                format: disk.format.clone(),
                base: choice.base.as_ref().map(|base| base.id()),
                reason: choice.reason.clone(),
                uri: nbd::uri(&source.socket, &source.export),
                nbd_export: source.export,
                dirty_context: source.dirty_context,
                file: file.as_ref().map(|file| file.path.clone()),
                regions: file.map(|file| file.regions),
            });
        }
        Ok(Held {
            vm: self.request.vm.name.clone(),
            export: id,
            mechanism: self.request.mechanism,
            tracking: self.request.tracking.clone(),
            socket: point.socket.clone(),
            volumes,
            moment: prepared.moment(point),
            left_out: Vec::new(),
        })
    }

    /// The disk as a file, with its dirty regions beside it.
    async fn add_file(
        &self,
        prepared: &Prepared<'_>,
        point: &PointInTime,
        index: u16,
        source: &Source,
    ) -> Result<VirtualFile, FileError> {
        #[derive(Serialize)]
        struct Regions {
            size: u64,
            dirty: Vec<Region>,
        }
        #[derive(Serialize)]
        struct Region {
            offset: u64,
            length: u64,
        }
        let frozen = open::open(source, BLOCK_SIZE, 1, None).await?;
        frozen.reader.disconnect().await;
        let region = |extent: Extent| Region {
            offset: extent.start(),
            length: extent.len(),
        };
        let regions = Regions {
            size: frozen.plan.size(),
            dirty: frozen.plan.dirty().iter().map(region).collect(),
        };
        let regions = serde_json::to_vec_pretty(&regions).map_err(io::Error::other)?;
        let file = prepared.add_virtual_file(&source.name, index, &regions)?;
        point
            .add_file(self.monitor, index, &file.path)
            .await
            .map_err(FileError::Qemu)?;
        Ok(file)
    }

    /// The tool has it: from here on the next export builds on this one.
    async fn record(&self, prepared: &mut Prepared<'_>, id: BackupId) -> Result<(), ExportError> {
        prepared.step(Step::Committing)?;
        let namespace = Arc::clone(self.subject.namespace);
        let record = ExportRecord {
            vm: self.request.vm.name.clone(),
            created: OffsetDateTime::now_utc(),
            host_version: env!("CARGO_PKG_VERSION").into(),
            disks: prepared.disks().iter().map(exported).collect(),
        };
        let recorded = tokio::task::spawn_blocking(move || namespace.record_export(id, record));
        recorded.await.map_err(ExportError::Task)??;
        // It has it, whether or not the journal can say so: the record decides.
        if let Err(error) = prepared.step(Step::Committed) {
            self.subject.events.warn(with_causes(&error));
        }
        Ok(())
    }
}

/// One disk as the record has it.
fn exported((disk, choice): &(crate::qemu::Disk, Choice)) -> ExportedDisk {
    ExportedDisk {
        name: disk.name.clone(),
        size: disk.size,
        disk: lineage::record(disk),
        base: choice.base.as_ref().map(|base| base.id()),
        bitmap: choice.bitmap.new_bitmap().map(ToString::to_string),
    }
}

/// The block that a tool leaves: while it can be read, the snapshot was not broken.
async fn read_first_block(disk: &Source) -> Result<(), nbd::Error> {
    let length = disk.size.min(u64::from(BLOCK_SIZE));
    let Some(first) = Extent::between(0, length) else {
        return Ok(());
    };
    let reader = Reader::connect(&disk.socket, &disk.export, 1, None).await?;
    let read = reader.read_on_first(first).await;
    reader.disconnect().await;
    read.map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::base::Recorded;
    use super::*;
    use crate::archive::{BackupRecord, ComponentId, Namespace, ProviderRecord};
    use crate::contract::{GuestLimits, World};
    use cap_std::ambient_authority;
    use cap_std::fs::Dir;

    /// As exports were recorded before they had records of their own.
    fn record_as_a_backup(namespace: &Namespace, id: BackupId) {
        let record = BackupRecord {
            vm: "web".into(),
            created: OffsetDateTime::UNIX_EPOCH,
            provider: ProviderRecord {
                name: "export".into(),
                component: ComponentId::of(b""),
                world: World::BlindProvider,
                settings: String::new(),
                limits: GuestLimits {
                    memory: 0,
                    cpu_ms: 0,
                },
            },
            host_version: "0.1.0".into(),
            volumes: Vec::new(),
            attachments: Vec::new(),
            kept: Vec::new(),
            moment: Moment::One,
            left_out: Vec::new(),
        };
        namespace.begin(id).unwrap().commit(record).unwrap();
    }

    #[test]
    fn what_a_tool_has_is_known_by_its_record_and_by_one_of_the_older_kind() {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        let records = Archive::create(root).unwrap();
        let tool = records.create_namespace(&"tool".parse().unwrap()).unwrap();
        let id = || BackupId::random(OffsetDateTime::UNIX_EPOCH).unwrap();
        let (older, export) = (id(), id());
        record_as_a_backup(&tool, older);
        let record = ExportRecord {
            vm: "web".into(),
            created: OffsetDateTime::UNIX_EPOCH,
            host_version: "0.1.0".into(),
            disks: Vec::new(),
        };
        tool.record_export(export, record.clone()).unwrap();
        let recorded = |id| recover::recorded(&tool, id).unwrap();
        assert!(matches!(recorded(older), Recorded::Committed(_)));
        assert!(matches!(recorded(export), Recorded::Exported(found) if *found == record));
        assert!(matches!(recorded(id()), Recorded::Absent));
    }
}
