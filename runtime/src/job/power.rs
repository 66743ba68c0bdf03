//! Reaching the VM: one that was stopped is started paused, by its configured command or by libvirt, and put back
//! afterwards.
//!
//! A file in the VM's state folder says that a job started it. It is written before the command runs and removed after
//! the VM is gone again, so that a job that was killed in between leaves the VM to the next one.

use super::journal::{Journal, JournalError};
use crate::contract::with_causes;
use crate::event::Events;
use crate::qemu::libvirt::{self, Domain, LibvirtError};
use crate::qemu::{Address, MachineError, Monitor, MonitorError, machine};
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How long the command and QEMU may take until there is a monitor.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long QEMU may take to write what it holds and end.
const QUIT_LIMIT: Duration = Duration::from_secs(60);

/// Between two tries to connect.
const PAUSE: Duration = Duration::from_millis(50);

/// A VM with a monitor.
#[derive(Debug)]
pub struct Reached {
    /// Its monitor.
    pub monitor: Monitor,
    /// Where a job started it: to be put back.
    started: bool,
    /// The command, where it still runs because it is QEMU itself or waits for it.
    command: Option<Child>,
    /// What ends it.
    stop: Stop,
}

/// What ends a VM that was started.
#[derive(Debug)]
enum Stop {
    /// QEMU is told itself.
    Quit,
    /// A program and its arguments.
    Command(String, Vec<String>),
    /// libvirt.
    Libvirt(libvirt::Address),
}

impl Stop {
    fn of(at: &Address, command: &[String]) -> Self {
        match (at, command.split_first()) {
            (Address::Libvirt(domain), _) => Self::Libvirt(domain.clone()),
            (_, Some((program, arguments))) => Self::Command(program.clone(), arguments.to_vec()),
            (_, None) => Self::Quit,
        }
    }
}

/// What starts a VM that does not run, and what ends it again. libvirt needs no commands for it.
#[derive(Debug, Clone, Copy)]
pub struct Switch<'a> {
    /// The command that starts it paused.
    pub start: &'a [String],
    /// The one that ends it.
    pub stop: &'a [String],
    /// Whether it is to be started at all.
    pub may_start: bool,
}

/// Why the VM cannot be reached or started.
#[derive(Debug, thiserror::Error)]
pub enum PowerError {
    /// It has no monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Nothing listens on its monitor's socket, and nothing says how to start it.
    #[error(
        "the VM does not run, and the key `start` of this VM in the configuration does not say how to start it paused"
    )]
    Stopped(#[source] MonitorError),
    /// It is to be left as it is.
    #[error(transparent)]
    Off(MonitorError),
    /// A start would not start it anew.
    #[error(
        "the domain '{domain}' is shut off with saved memory (`virsh dominfo` says \"Managed save: yes\"), which a start would go on from and consume: start it and let it run, or give that memory up by `virsh managedsave-remove`"
    )]
    Saved {
        /// Its name.
        domain: String,
    },
    /// libvirt did not start it, or cannot be asked.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The guest runs, though libvirt was asked to start it paused.
    #[error("libvirt was asked to start the domain paused, and its guest runs; it is left running")]
    RunsUnasked,
    /// The command cannot be run.
    #[error("the VM does not run, and its command `start` ({command}) cannot be run")]
    Command {
        /// Its program.
        command: String,
        /// What the system said.
        source: io::Error,
    },
    /// The command ended, and there is no VM.
    #[error("the VM does not run, and its command `start` ({command}) did not start it: {status}")]
    NotStarted {
        /// Its program.
        command: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// There is no monitor although the command seems to be content.
    #[error(
        "the command `start` ({command}) gave no VM within {} s",
        START_LIMIT.as_secs()
    )]
    Silent {
        /// Its program.
        command: String,
        /// Of the last try.
        source: MonitorError,
    },
    /// The guest runs, which nobody asked for.
    #[error(
        "the command `start` ({command}) let the guest run: it must start the VM paused, as QEMU's -S does; the VM is left running"
    )]
    Runs {
        /// Its program.
        command: String,
    },
    /// Its state cannot be asked.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The file that says so cannot be kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A signal asked for the end.
    #[error("cancelled")]
    Cancelled,
}

impl PowerError {
    /// Whether the user can mend it.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Monitor(error) => error.is_no_monitor(),
            Self::Libvirt(error) => error.is_mistake(),
            Self::Machine(error) => !matches!(error, MachineError::Monitor(_)),
            Self::Journal(_) | Self::Cancelled | Self::Silent { .. } => false,
            _ => true,
        }
    }
}

/// Connects to the monitor; where nobody is there, the VM is started first.
///
/// # Errors
/// Any [`PowerError`]; a VM that was started for nothing is put back.
pub async fn reach(
    at: &Address,
    switch: Switch<'_>,
    journal: &Journal,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<Reached, PowerError> {
    let stop = Stop::of(at, switch.stop);
    let error = match Monitor::reach(at).await {
        Ok(monitor) => return adopt(monitor, stop, journal, events).await,
        Err(error) => error,
    };
    // What an earlier job started is gone by itself.
    journal.set_vm_started(false)?;
    if !error.is_nobody() {
        return Err(error.into());
    }
    if !switch.may_start {
        return Err(PowerError::Off(error));
    }
    let qmp = match at {
        Address::Libvirt(domain) => return start_by_libvirt(domain, stop, journal, events).await,
        Address::Socket(qmp) => qmp,
    };
    let Some((program, arguments)) = switch.start.split_first() else {
        return Err(PowerError::Stopped(error));
    };
    events.note(format!(
        "the VM does not run; starting it paused by {program}"
    ));
    journal.set_vm_started(true)?;
    // In a group of its own: what a terminal sends to the job is not for the VM.
    let spawned = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn();
    let mut command = match spawned {
        Ok(command) => command,
        Err(source) => {
            journal.set_vm_started(false)?;
            return Err(PowerError::Command {
                command: program.clone(),
                source,
            });
        }
    };
    let monitor = match wait_for_monitor(qmp, program, &mut command, cancel).await {
        Ok(monitor) => monitor,
        Err(error) => {
            // A command that still runs is QEMU on its way up, or waits for it; the file stays for what it may leave.
            if command.try_wait().is_ok_and(|ended| ended.is_some()) {
                journal.set_vm_started(false)?;
            } else {
                let _ = command.start_kill();
                let _ = command.wait().await;
            }
            return Err(error);
        }
    };
    let reached = Reached {
        monitor,
        started: true,
        command: Some(command),
        stop,
    };
    if runs(&reached.monitor).await? {
        journal.set_vm_started(false)?;
        return Err(PowerError::Runs {
            command: program.clone(),
        });
    }
    Ok(reached)
}

/// As libvirt does it itself; what it does has ended, well or not, when it answers.
async fn start_by_libvirt(
    domain: &libvirt::Address,
    stop: Stop,
    journal: &Journal,
    events: &Events,
) -> Result<Reached, PowerError> {
    let found = refuse_saved(domain).await?;
    events.note("the VM does not run; libvirt starts it paused");
    journal.set_vm_started(true)?;
    if let Err(error) = found.start_paused().await {
        if matches!(found.has_qemu().await, Ok(false)) {
            journal.set_vm_started(false)?;
        }
        return Err(error.into());
    }
    let reached = Reached {
        monitor: Monitor::reach(&Address::Libvirt(domain.clone())).await?,
        started: true,
        command: None,
        stop,
    };
    if runs(&reached.monitor).await? {
        journal.set_vm_started(false)?;
        return Err(PowerError::RunsUnasked);
    }
    Ok(reached)
}

/// The domain, which does not run, unless a start would go on from saved memory.
pub async fn refuse_saved(domain: &libvirt::Address) -> Result<Domain, PowerError> {
    let found = Domain::find(domain).await?;
    match found.has_saved_memory().await? {
        true => Err(PowerError::Saved {
            domain: found.name().into(),
        }),
        false => Ok(found),
    }
}

/// A VM that is there may be one that a job started which then died.
async fn adopt(
    monitor: Monitor,
    stop: Stop,
    journal: &Journal,
    events: &Events,
) -> Result<Reached, PowerError> {
    let mut started = journal.vm_started();
    if started && runs(&monitor).await? {
        events.note("an earlier job started the VM paused; it was let run since, so it stays");
        journal.set_vm_started(false)?;
        started = false;
    } else if started {
        events.note("an earlier job started the VM paused and died; this one stops it afterwards");
    }
    Ok(Reached {
        monitor,
        started,
        command: None,
        stop,
    })
}

async fn wait_for_monitor(
    qmp: &Path,
    program: &str,
    command: &mut Child,
    cancel: &CancellationToken,
) -> Result<Monitor, PowerError> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        // Asked before connecting: a command that ended well has made the socket by then.
        let ended = command.try_wait().map_err(|source| PowerError::Command {
            command: program.into(),
            source,
        })?;
        if let Some(status) = ended.filter(|status| !status.success()) {
            return Err(PowerError::NotStarted {
                command: program.into(),
                status,
            });
        }
        let late = Instant::now() >= deadline;
        // A command that only asks for the VM, as libvirt's does, has more to do when the monitor is there.
        if ended.is_some() || late || is_started_by(command, qmp).await {
            match Monitor::connect(qmp).await {
                Ok(monitor) => return Ok(monitor),
                Err(source) if late => {
                    return Err(PowerError::Silent {
                        command: program.into(),
                        source,
                    });
                }
                Err(_) => {}
            }
        }
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = cancel.cancelled() => return Err(PowerError::Cancelled),
        }
    }
}

/// Whether who listens on the monitor's socket is the command itself, or a process that it started.
async fn is_started_by(command: &Child, qmp: &Path) -> bool {
    let Some(command) = command.id() else {
        return false;
    };
    let listener = UnixStream::connect(qmp).await;
    let listener = listener.and_then(|stream| stream.peer_cred());
    let mut process = listener.ok().and_then(|peer| peer.pid());
    while let Some(pid) = process.filter(|&pid| pid > 1) {
        if pid.cast_unsigned() == command {
            return true;
        }
        process = parent(pid);
    }
    false
}

/// From `/proc/PID/stat`: `pid (name) state parent …`, where the name may hold anything.
fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

async fn runs(monitor: &Monitor) -> Result<bool, PowerError> {
    let state = machine::run_state(monitor).await?;
    Ok(state.is_some_and(|state| state.running))
}

/// Why a VM that was started does not end.
#[derive(Debug, thiserror::Error)]
enum EndError {
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error("its command `stop` ({command}) cannot be run")]
    Command { command: String, source: io::Error },
    #[error("its command `stop` ({command}) did not stop it: {status}")]
    NotStopped { command: String, status: ExitStatus },
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
}

async fn stop_by(program: &str, arguments: &[String]) -> Result<(), EndError> {
    let mut stop = Command::new(program);
    stop.args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let command = || program.to_owned();
    let ended = timeout(QUIT_LIMIT, stop.status()).await;
    let ended = ended.map_err(io::Error::from).flatten();
    let status = ended.map_err(|source| EndError::Command {
        command: command(),
        source,
    })?;
    match status.success() {
        true => Ok(()),
        false => Err(EndError::NotStopped {
            command: command(),
            status,
        }),
    }
}

impl Reached {
    /// Ends the VM where a job started it, unless somebody let it run since. What fails is returned in words.
    pub async fn put_back(self, journal: &Journal, events: &Events) -> Result<(), String> {
        if !self.started {
            return Ok(());
        }
        match self.end(events).await {
            Ok(()) => journal
                .set_vm_started(false)
                .map_err(|error| with_causes(&error)),
            Err(error) => Err(format!(
                "the VM that was started paused still runs: {}",
                with_causes(&error)
            )),
        }
    }

    async fn end(self, events: &Events) -> Result<(), EndError> {
        match machine::run_state(&self.monitor).await {
            Ok(Some(state)) if state.running => {
                events.note("the VM was let run meanwhile, so it is not stopped again");
                return Ok(());
            }
            Err(error) if error.is_lost() => return Ok(()),
            state => state.map(drop)?,
        }
        match &self.stop {
            Stop::Command(program, arguments) => stop_by(program, arguments).await?,
            Stop::Libvirt(domain) => Domain::find(domain).await?.stop().await?,
            Stop::Quit => match self.monitor.execute(qapi::qmp::quit {}).await {
                Err(error) if !error.is_lost() => return Err(error.into()),
                _ => {}
            },
        }
        let gone = async {
            self.monitor.lost().await;
            if let Some(mut command) = self.command {
                let _ = command.wait().await;
            }
        };
        timeout(QUIT_LIMIT, gone)
            .await
            .map_err(|_| MonitorError::TimedOut {
                what: "quit".into(),
                limit: QUIT_LIMIT,
            })?;
        events.note("the VM is stopped again");
        Ok(())
    }
}
