//! The journal: how far a job got, for the next run to clean up after it.
//!
//! One small JSON file per VM, replaced as a whole at each step, in a folder whose lock the job holds. It never
//! decides what is in the archive (the archive does) nor what QEMU holds (QEMU is asked): it only says where to look.

use crate::contract::with_causes;
use cap_std::fs::Dir;
use cap_tempfile::TempFile;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const FILE: &str = "journal.json";
const UNREADABLE: &str = "journal.json.unreadable";
const LOCK: &str = "lock";
const STARTED: &str = "started";

/// Stops this process (SIGSTOP) at the step that a test names in its environment, so that it can be killed right there.
#[cfg(feature = "stops")]
fn stop_at(step: Step) {
    use rustix::process::{Signal, getpid, kill_process};
    if std::env::var("FLEECEBOX_STOP_AT").is_ok_and(|at| at == step.name()) {
        let _ = kill_process(getpid(), Signal::STOP);
    }
}

/// How far a backup got. Each is recorded before what it names is begun, but for [`Step::Committed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Fleecing images are made.
    Preparing,
    /// The guest is frozen, the snapshot taken, the guest thawed.
    Snapshot,
    /// Providers run.
    Running,
    /// The snapshot's intactness is checked and QEMU's part taken down.
    Releasing,
    /// What providers claim is read back.
    Proving,
    /// Objects are made durable and the manifest is written.
    Committing,
    /// The manifest is in the archive.
    Committed,
    /// Old bitmaps are removed, or new ones merged back.
    SwitchingBitmaps,
    /// One of another version of this program.
    #[serde(other)]
    Other,
}

impl Step {
    /// As it stands in the journal.
    pub fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Snapshot => "snapshot",
            Self::Running => "running",
            Self::Releasing => "releasing",
            Self::Proving => "proving",
            Self::Committing => "committing",
            Self::Committed => "committed",
            Self::SwitchingBitmaps => "switching-bitmaps",
            Self::Other => "other",
        }
    }
}

/// What the next run needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The job's id, as QEMU's ids carry it.
    pub job: String,
    /// Id of the archive that the backup was made for.
    pub archive: String,
    /// The provider's part of it.
    pub namespace: String,
    /// The backup that the job was making.
    pub backup: String,
    /// How far it got.
    pub step: Step,
    /// The job's folder within the VM's fleecing folder.
    pub fleecing: String,
    /// Whether an NBD server that the job starts may be running.
    pub nbd_server: bool,
    /// The job ended in order, with something left.
    #[serde(default)]
    pub ended: bool,
}

/// The journal of one VM, locked.
#[derive(Debug)]
pub struct Journal {
    folder: Dir,
    path: PathBuf,
    record: Option<Record>,
    unreadable: Option<String>,
    /// Held as long as the job lives; the kernel lets go of it when the process dies.
    _lock: Lock,
}

/// Why there is no journal to write.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another job holds the lock of this VM.
    #[error(
        "another job is running on this VM (it holds the lock in {folder}); wait for it to end"
    )]
    Busy {
        /// The VM's state folder.
        folder: PathBuf,
    },
    /// The file system failed.
    #[error("cannot keep the job's journal")]
    Io(#[from] io::Error),
    /// The file of the dead run cannot be read, or not be set aside.
    #[error("cannot read the journal {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What the lock file holds while a watchdog has the lock, which takes no longer than to end a snapshot.
const WATCHDOG: &[u8] = b"watchdog";

/// How long the lock is waited for where a watchdog has it.
const WATCHDOG_LIMIT: Duration = Duration::from_secs(30);

/// How long it is waited for at least: who takes it says a moment later who that is.
const LOCK_LIMIT: Duration = Duration::from_millis(300);

/// Between two looks at the lock.
const PAUSE: Duration = Duration::from_millis(20);

/// The lock of a VM: whoever holds it is the only job on it. The kernel lets go of it when the process dies.
#[derive(Debug)]
pub struct Lock(cap_std::fs::File);

impl Lock {
    /// The lock in `folder`, unless somebody has it.
    pub fn try_take(folder: &Dir) -> io::Result<Option<Self>> {
        use cap_std::fs::OpenOptionsExt as _;
        let mut options = cap_std::fs::OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600);
        let lock = folder.open_with(LOCK, &options)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                lock.set_len(0)?;
                Ok(Some(Self(lock)))
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// As [`Lock::try_take`], for a watchdog, which says so there: a job waits for it.
    pub fn try_take_for_watchdog(folder: &Dir) -> io::Result<Option<Self>> {
        let lock = Self::try_take(folder)?;
        if let Some(Self(file)) = &lock {
            (&*file).write_all(WATCHDOG)?;
        }
        Ok(lock)
    }

    /// Waits where a watchdog is about to let go of it.
    fn take(folder: &Dir) -> io::Result<Option<Self>> {
        let since = Instant::now();
        loop {
            if let Some(lock) = Self::try_take(folder)? {
                return Ok(Some(lock));
            }
            let limit = match folder.read(LOCK)?.as_slice() {
                WATCHDOG => WATCHDOG_LIMIT,
                _ => LOCK_LIMIT,
            };
            if since.elapsed() >= limit {
                return Ok(None);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

impl Journal {
    /// Takes the lock in `folder` and reads what a dead run left there. `path` is only named in errors.
    pub fn open(folder: Dir, path: PathBuf) -> Result<Self, JournalError> {
        let Some(lock) = Lock::take(&folder)? else {
            return Err(JournalError::Busy { folder: path });
        };
        let file = |source| JournalError::File {
            path: path.join(FILE),
            source,
        };
        let (record, unreadable) = match read_record(&folder).map_err(file)? {
            None => (None, None),
            Some(Ok(record)) => (Some(record), None),
            Some(Err(reason)) => {
                folder.rename(FILE, &folder, UNREADABLE).map_err(file)?;
                let told = format!(
                    "the journal of the last job on this VM, {}, cannot be read ({reason}) and is set aside as {UNREADABLE}: what QEMU shows of that job is removed all the same, but what its backup left in the archive, if it never committed, stays",
                    path.join(FILE).display()
                );
                (None, Some(told))
            }
        };
        Ok(Self {
            folder,
            path,
            record,
            unreadable,
            _lock: lock,
        })
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What has to be said of a journal that could not be read, once.
    pub fn take_unreadable(&mut self) -> Option<String> {
        self.unreadable.take()
    }

    /// What is recorded: after [`Journal::open`], the run that died.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Replaces the record, durably, as a step begins.
    pub fn write(&mut self, record: Record) -> Result<(), JournalError> {
        #[cfg(feature = "stops")]
        let step = record.step;
        self.replace(record)?;
        #[cfg(feature = "stops")]
        stop_at(step);
        Ok(())
    }

    fn replace(&mut self, record: Record) -> Result<(), JournalError> {
        let mut file = TempFile::new(&self.folder)?;
        file.write_all(&serde_json::to_vec_pretty(&record).map_err(io::Error::other)?)?;
        file.as_file().sync_all()?;
        file.replace(FILE)?;
        self.record = Some(record);
        Ok(())
    }

    /// Records that `step` begins.
    pub fn reach(&mut self, step: Step) -> Result<(), JournalError> {
        match self.record.clone() {
            Some(record) => self.write(Record { step, ..record }),
            None => Ok(()),
        }
    }

    /// The job ends in order, and something is left.
    pub fn end_incomplete(&mut self) -> Result<(), JournalError> {
        match self.record.clone() {
            Some(record) => self.replace(Record {
                ended: true,
                ..record
            }),
            None => Ok(()),
        }
    }

    /// The NBD server is stopped: recorded with the next step, since one that runs later is somebody else's.
    pub fn server_stopped(&mut self) {
        if let Some(record) = &mut self.record {
            record.nbd_server = false;
        }
    }

    /// Whether a job started the VM, which has to be stopped again.
    pub fn vm_started(&self) -> bool {
        self.folder.exists(STARTED)
    }

    /// Records durably whether it did.
    pub fn set_vm_started(&self, started: bool) -> Result<(), JournalError> {
        if started {
            self.folder.create(STARTED)?.sync_all()?;
            self.folder.open(".")?.sync_all()?;
        } else if self.vm_started() {
            self.folder.remove_file(STARTED)?;
        }
        Ok(())
    }

    /// Nothing is left to clean up.
    pub fn clear(&mut self) -> Result<(), JournalError> {
        if self.record.take().is_some() {
            self.folder.remove_file(FILE)?;
        }
        Ok(())
    }
}

/// What the last run recorded in `folder`, where it recorded anything, or why that is no record: a loss of power may have
/// emptied it, and another version of this program may write others.
pub fn read_record(folder: &Dir) -> io::Result<Option<Result<Record, String>>> {
    match folder.read(FILE) {
        Ok(bytes) if bytes.is_empty() => Ok(Some(Err("it is empty".into()))),
        Ok(bytes) => Ok(Some(
            serde_json::from_slice(&bytes).map_err(|error| with_causes(&error)),
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: Step) -> Record {
        Record {
            job: "0123456789abcdef".into(),
            archive: "a".into(),
            namespace: "n".into(),
            backup: "b".into(),
            step,
            fleecing: "fbx-0123456789abcdef".into(),
            nbd_server: true,
            ended: false,
        }
    }

    fn open(path: &Path) -> Journal {
        let dir = Dir::open_ambient_dir(path, cap_std::ambient_authority()).unwrap();
        Journal::open(dir, path.to_owned()).unwrap()
    }

    #[test]
    fn a_journal_that_cannot_be_read_is_set_aside_and_named() {
        for content in ["", "{", "{\"job\": 1}"] {
            let path = tempfile::tempdir().unwrap();
            std::fs::write(path.path().join(FILE), content).unwrap();
            let mut journal = open(path.path());
            assert_eq!(journal.record(), None);
            let told = journal.take_unreadable().unwrap();
            let named = path.path().join(FILE);
            assert!(told.contains(named.to_str().unwrap()), "{told}");
            drop(journal);
            assert_eq!(open(path.path()).take_unreadable(), None);
            let aside = std::fs::read_to_string(path.path().join(UNREADABLE));
            assert_eq!(aside.unwrap(), content);
        }
    }

    #[test]
    fn a_later_versions_journal_is_read_as_far_as_it_is_known() {
        let path = tempfile::tempdir().unwrap();
        let mut journal = serde_json::to_value(record(Step::Running)).unwrap();
        journal["step"] = "folding-time".into();
        journal["more"] = 1.into();
        std::fs::write(path.path().join(FILE), journal.to_string()).unwrap();
        assert_eq!(open(path.path()).record(), Some(&record(Step::Other)));
    }

    #[test]
    fn a_job_waits_for_a_watchdog_that_has_the_lock_and_for_no_other_job() {
        let path = tempfile::tempdir().unwrap();
        let dir = || Dir::open_ambient_dir(path.path(), cap_std::ambient_authority()).unwrap();
        let watchdog = Lock::try_take_for_watchdog(&dir()).unwrap().unwrap();
        let waits = std::thread::spawn({
            let dir = dir();
            move || Lock::take(&dir).unwrap().is_some()
        });
        std::thread::sleep(2 * LOCK_LIMIT);
        assert!(!waits.is_finished());
        drop(watchdog);
        assert!(waits.join().unwrap());
    }

    #[test]
    fn a_dead_run_is_found_and_a_live_one_keeps_others_out() {
        let path = tempfile::tempdir().unwrap();
        let open = || {
            let dir = Dir::open_ambient_dir(path.path(), cap_std::ambient_authority()).unwrap();
            Journal::open(dir, path.path().to_owned())
        };
        let mut journal = open().unwrap();
        assert_eq!(journal.record(), None);
        journal.write(record(Step::Preparing)).unwrap();
        journal.reach(Step::Running).unwrap();
        journal.server_stopped();
        assert!(matches!(open(), Err(JournalError::Busy { .. })));
        drop(journal);
        let mut journal = open().unwrap();
        assert_eq!(journal.record(), Some(&record(Step::Running)));
        journal.clear().unwrap();
        drop(journal);
        assert_eq!(open().unwrap().record(), None);
    }
}
