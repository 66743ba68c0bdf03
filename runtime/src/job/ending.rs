//! What the watchdog of a job that died does once the VM runs: it ends the job's snapshot, each write of the guest pays for.
//!
//! It does so under the VM's lock, which it holds no longer than that takes, and not before the storage of the disks
//! answers. The journal, the archive and the bitmaps are the next run's. A job that ended with something left in QEMU
//! leaves it to its watchdog as well.

use super::journal::{self, Lock};
use super::recover::{self, InQemu, RecoverError};
use super::signals::Signals;
use super::storage::Storage;
use crate::contract::with_causes;
use crate::event::Events;
use crate::qemu::claim::{Claim, ClaimError};
use crate::qemu::libvirt::LibvirtError;
use crate::qemu::monitor::NotQmp;
use crate::qemu::watchdog::{self, say};
use crate::qemu::{Address, JobId, Monitor, MonitorError, leftovers};
use cap_std::ambient_authority;
use cap_std::fs::Dir;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long it is tried: storage that hangs for longer is for an operator, and no process may stay for ever.
const LIMIT: Duration = Duration::from_secs(24 * 3600);

/// How often it is tried where QEMU or a file system refuses, which waiting seldom changes.
const TRIES: u32 = 10;

/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// Whose snapshot it is. Paths are absolute.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ending {
    /// The job.
    pub job: String,
    /// Where QEMU's monitor is.
    pub monitor: Address,
    /// The VM's folder in the state folder.
    pub state: PathBuf,
    /// Where the job's fleecing folder is.
    pub fleecing: PathBuf,
    /// Socket of the NBD server, where the job did not start it.
    pub nbd: Option<PathBuf>,
}

/// Why one try did not end it.
enum Trouble {
    /// Its storage does not answer.
    Hangs(Storage),
    /// Another job has the VM, and cleans up itself.
    Busy,
    /// libvirt, which has the VM's monitor, is not there.
    Away(LibvirtError),
    /// Something takes the connection to the monitor and lets go of it at once, as no QEMU that lives does twice.
    NoQemu,
    /// Anything else.
    Other(RecoverError),
}

impl<E: Into<RecoverError>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// The watchdog process.
pub fn serve() -> ExitCode {
    watchdog::serve_arguments(async |text| match serde_json::from_str(text) {
        Ok(ending) => end(&ending).await,
        Err(error) => {
            say(&format!(
                "the snapshot of the job that died stays: {}",
                with_causes(&error)
            ));
            false
        }
    })
}

/// Returns whether nothing of the job is in QEMU any more.
async fn end(ending: &Ending) -> bool {
    let deadline = Instant::now() + LIMIT;
    let mut told = String::new();
    let mut tell = |text: String| {
        if text != told {
            say(&text);
            told = text;
        }
    };
    let mut refused = false;
    let mut failed = 0;
    while Instant::now() < deadline && failed < TRIES {
        let tried = attempt(ending).await;
        if refused && matches!(tried, Err(Trouble::NoQemu)) {
            return true;
        }
        refused = matches!(tried, Err(Trouble::NoQemu));
        match tried {
            Ok(()) => return true,
            Err(Trouble::NoQemu) => {}
            Err(Trouble::Hangs(storage)) => {
                tell(format!(
                    "the watchdog of job {} ends its snapshot as soon as the storage of the VM's disks answers",
                    ending.job
                ));
                // Without the lock and the monitor, which others may need meanwhile.
                let _ = storage.answers(sleep(LIMIT)).await;
            }
            Err(Trouble::Busy) => {}
            Err(Trouble::Away(error)) => tell(format!(
                "the watchdog of job {} ends its snapshot as soon as libvirt answers: {}",
                ending.job,
                with_causes(&error)
            )),
            Err(Trouble::Other(error)) => {
                failed += 1;
                tell(format!(
                    "cannot end the snapshot of job {} yet: {}",
                    ending.job,
                    with_causes(&error)
                ));
            }
        }
        sleep(PAUSE).await;
    }
    say(&format!(
        "the watchdog gives up: what job {} left in QEMU stays for `fleecebox recover`",
        ending.job
    ));
    false
}

/// Whether there is no QEMU any more that could have anything of the job's.
fn is_gone(error: &MonitorError) -> bool {
    match error {
        MonitorError::Libvirt(error) => error.is_gone(),
        error => error.is_nobody(),
    }
}

async fn attempt(ending: &Ending) -> Result<(), Trouble> {
    let open = |path| Dir::open_ambient_dir(path, ambient_authority());
    let files = RecoverError::Files;
    let state = match open(&ending.state) {
        // Whoever removed the VM's state wants none of it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        state => state.map_err(files)?,
    };
    let Some(_lock) = Lock::try_take_for_watchdog(&state).map_err(files)? else {
        return Err(Trouble::Busy);
    };
    let record = journal::read_record(&state).map_err(files)?;
    let record = record.and_then(Result::ok);
    if record
        .as_ref()
        .is_some_and(|record| record.job != ending.job)
    {
        // A later job cleaned up before it began.
        return Ok(());
    }
    let Ok(job) = ending.job.parse::<JobId>() else {
        return Ok(());
    };
    let fleecing = open(&ending.fleecing).map_err(files)?;
    let monitor = match Monitor::reach(&ending.monitor).await {
        Err(MonitorError::Libvirt(error)) if error.is_away() => return Err(Trouble::Away(error)),
        Err(error) if is_gone(&error) => {
            super::fleecing::remove_folder(&fleecing, &job.folder()).map_err(files)?;
            return Ok(());
        }
        Err(MonitorError::NotQmp {
            reason: NotQmp::Closed,
            ..
        }) => return Err(Trouble::NoQemu),
        monitor => monitor?,
    };
    let qemu = InQemu {
        monitor: &monitor,
        fleecing: &fleecing,
        nbd: ending.nbd.as_deref(),
        signals: &Signals::default(),
        only: Some(job),
    };
    if let Some(leftover) = leftovers::find(&monitor).await?.remove(&job) {
        let storage = recover::storage(&fleecing, ending.nbd.as_deref(), job, leftover.probes);
        if storage.answers(sleep(PAUSE)).await.is_err() {
            return Err(Trouble::Hangs(storage));
        }
    }
    let claim = match Claim::make(&monitor, &ending.fleecing).await {
        // It cleans up before it begins.
        Err(ClaimError::Busy { .. }) => return Err(Trouble::Busy),
        claim => claim?,
    };
    let (events, _) = Events::channel();
    let removed = qemu.remove(record.as_ref(), &events).await;
    if let Some(claim) = claim {
        claim.release(&monitor).await;
    }
    if removed? {
        say(&format!(
            "its watchdog ended the snapshot of job {}; the next run settles its bitmaps",
            ending.job
        ));
    }
    Ok(())
}
