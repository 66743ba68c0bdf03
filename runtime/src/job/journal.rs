//! The journal: how far a job got, for the next run to clean up after it.
//!
//! One small JSON file per VM, replaced as a whole at each step, in a folder whose lock the job holds. It never
//! decides what is in the archive (the archive does) nor what QEMU holds (QEMU is asked): it only says where to look.

use cap_std::fs::Dir;
use cap_tempfile::TempFile;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::PathBuf;

const FILE: &str = "journal.json";
const LOCK: &str = "lock";
const STARTED: &str = "started";

/// In a test's environment: the step at which the job stops itself (SIGSTOP), so that it can be killed right there.
const STOP_AT: &str = "FLEECEBOX_STOP_AT";

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
}

/// The journal of one VM, locked.
#[derive(Debug)]
pub struct Journal {
    folder: Dir,
    record: Option<Record>,
    /// Held as long as the job lives; the kernel lets go of it when the process dies.
    _lock: cap_std::fs::File,
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
    #[error("cannot keep the job's journal: {0}")]
    Io(#[from] io::Error),
}

impl Journal {
    /// Takes the lock in `folder` and reads what a dead run left there. `path` is only named in errors.
    pub fn open(folder: Dir, path: PathBuf) -> Result<Self, JournalError> {
        let mut options = cap_std::fs::OpenOptions::new();
        options.write(true).create(true);
        let lock = folder.open_with(LOCK, &options)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(JournalError::Busy { folder: path }),
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let record = match folder.read(FILE) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).map_err(io::Error::other)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            folder,
            record,
            _lock: lock,
        })
    }

    /// What is recorded: after [`Journal::open`], the run that died.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Replaces the record, durably.
    pub fn write(&mut self, record: Record) -> Result<(), JournalError> {
        let mut file = TempFile::new(&self.folder)?;
        file.write_all(&serde_json::to_vec_pretty(&record).map_err(io::Error::other)?)?;
        file.as_file().sync_all()?;
        file.replace(FILE)?;
        let step = record.step;
        self.record = Some(record);
        if std::env::var(STOP_AT).is_ok_and(|at| at == step.name()) {
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::STOP,
            );
        }
        Ok(())
    }

    /// Records that `step` begins.
    pub fn reach(&mut self, step: Step) -> Result<(), JournalError> {
        match self.record.clone() {
            Some(record) => self.write(Record { step, ..record }),
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
        }
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
