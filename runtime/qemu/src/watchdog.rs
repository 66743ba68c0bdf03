//! A process beside the job that thaws and continues the VM when the job dies, and then ends its snapshot.
//!
//! The job spawns it before it freezes or stops anything, and tells it what is at stake, one byte per
//! order over a socket, each echoed when it is taken. When the socket closes before the order to
//! disarm, the watchdog makes the VM run again, and does what its caller says must be done besides. While the VM may stand still the job also has to show every second that it
//! runs. One that does not, because it was stopped or frozen or gets no processor time, holds the very connections that
//! the VM would have to be thawed and continued by: it is killed, and what it leaves is the next job's to clean up.
//! The process has a session of its own and ignores the signals
//! that a terminal or a service manager sends to all of a job's processes.

use super::address::Address;
use super::agent::{Agent, AgentError, Limits};
use super::libvirt::Domain;
use super::monitor::{Monitor, MonitorError};
use fleecebox_contract::with_causes;
use qapi::qmp::cont;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

/// First argument of this program when it is the watchdog; then `--agent ADDRESS`, `--qmp ADDRESS` and `--end TEXT`, each
/// where there is one, an address as JSON.
pub const HIDDEN_ARGUMENT: &str = "__watchdog";

/// How long the process may take to start, to echo an order, or to end.
const ECHO_LIMIT: Duration = Duration::from_secs(10);

/// How long a VM that does not answer is tried. Guests call a disk dead after minutes at most, and no
/// process may stay for ever.
const RESCUE_LIMIT: Duration = Duration::from_secs(600);

/// Pause between two signs of the job's life.
const BEAT: Duration = Duration::from_secs(1);

/// Longest time without such a sign while the VM stands still: more than a busy machine keeps a process waiting, less
/// than the 30 s after which guests give up on their disks.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// Pause between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// What goes over the socket: orders to the watchdog, which echoes them, and its first word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Word {
    Ready = b'r',
    Thaw = b't',
    Cont = b'c',
    /// The snapshot has to be ended.
    End = b'e',
    /// The VM runs: it need not be thawed or continued any more.
    Runs = b'f',
    Disarm = b'd',
    /// The job runs. It is not echoed.
    Alive = b'a',
}

/// Why there is no watchdog, or it is not known to do its duty.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    /// The process cannot be started.
    #[error("cannot start the watchdog process")]
    Start(#[source] io::Error),
    /// It did not echo what it was told.
    #[error("the watchdog process did not answer")]
    Talk(#[source] io::Error),
    /// It answered with something else.
    #[error("the watchdog process answered {actual:#04x} where {expected:#04x} was expected")]
    Echo {
        /// The byte it was told.
        expected: u8,
        /// The byte it said.
        actual: u8,
    },
}

/// The job's end. Dropping it is what the job's death is: the process then does its duty.
#[derive(Debug)]
pub struct Watchdog {
    reading: OwnedReadHalf,
    writing: Arc<Mutex<OwnedWriteHalf>>,
    /// Shows that the job runs, from the first order on.
    beating: Option<AbortOnDropHandle<()>>,
    child: Child,
}

impl Watchdog {
    /// Starts the process, which runs this program with [`HIDDEN_ARGUMENT`], and waits until signals cannot hurt it.
    /// `agent` and `qmp` are where to thaw and to continue the VM by; `end` is what [`serve_arguments`] hands on.
    ///
    /// # Errors
    /// Any [`WatchdogError`]; nothing may be frozen or stopped then.
    pub async fn spawn(
        program: &Path,
        agent: Option<&Address>,
        qmp: Option<&Address>,
        end: Option<&str>,
    ) -> Result<Self, WatchdogError> {
        let mut command = Command::new(program);
        command.arg(HIDDEN_ARGUMENT);
        for (name, address) in [("--agent", agent), ("--qmp", qmp)] {
            if let Some(address) = address {
                // The process lives in the root folder, so as not to hold any other.
                let address = address.absolute().map_err(WatchdogError::Start)?;
                let address = serde_json::to_string(&address)
                    .map_err(|error| WatchdogError::Start(error.into()))?;
                command.arg(name).arg(address);
            }
        }
        if let Some(end) = end {
            command.arg("--end").arg(end);
        }
        // Without the rest of it, by which nobody is found; but a user's own libvirt is.
        command.env_clear().current_dir("/");
        if let Some(folder) = std::env::var_os("XDG_RUNTIME_DIR") {
            command.env("XDG_RUNTIME_DIR", folder);
        }
        Self::start(command).await
    }

    pub(super) async fn start(mut command: Command) -> Result<Self, WatchdogError> {
        let (socket, theirs) =
            std::os::unix::net::UnixStream::pair().map_err(WatchdogError::Start)?;
        socket.set_nonblocking(true).map_err(WatchdogError::Start)?;
        let child = command
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(WatchdogError::Start)?;
        // The command holds the other end too; with it dropped, closing ours is noticed there and theirs here.
        drop(command);
        let socket = UnixStream::from_std(socket).map_err(WatchdogError::Start)?;
        let (reading, writing) = socket.into_split();
        let mut watchdog = Self {
            reading,
            writing: Arc::new(Mutex::new(writing)),
            beating: None,
            child,
        };
        watchdog.expect(Word::Ready).await?;
        Ok(watchdog)
    }

    /// From now on the guest may be frozen.
    ///
    /// # Errors
    /// Nothing may be frozen then.
    pub async fn arm_thaw(&mut self) -> Result<(), WatchdogError> {
        self.order(Word::Thaw).await
    }

    /// From now on the VM may be stopped by us.
    ///
    /// # Errors
    /// Nothing may be stopped then.
    pub async fn arm_cont(&mut self) -> Result<(), WatchdogError> {
        self.order(Word::Cont).await
    }

    /// From now on there is something in QEMU.
    ///
    /// # Errors
    /// Nothing may be made there then.
    pub async fn arm_end(&mut self) -> Result<(), WatchdogError> {
        self.order(Word::End).await
    }

    /// The guest is thawed and the VM runs: what is left to do is to end the snapshot.
    ///
    /// # Errors
    /// It may still thaw and continue the VM, which does no harm to one that runs.
    pub async fn runs(&mut self) -> Result<(), WatchdogError> {
        self.order(Word::Runs).await?;
        self.beating = None;
        Ok(())
    }

    /// Nothing is at stake any more: the process ends without doing anything.
    ///
    /// # Errors
    /// It may still thaw and continue the VM, which does no harm to one that runs.
    pub async fn disarm(mut self) -> Result<(), WatchdogError> {
        self.beating = None;
        self.order(Word::Disarm).await?;
        let ended = timeout(ECHO_LIMIT, self.child.wait()).await;
        ended
            .map_err(io::Error::from)
            .flatten()
            .map(drop)
            .map_err(WatchdogError::Talk)
    }

    /// The process's id.
    pub fn process(&self) -> Option<u32> {
        self.child.id()
    }

    async fn order(&mut self, word: Word) -> Result<(), WatchdogError> {
        let sent = self.writing.lock().await.write_all(&[word as u8]).await;
        sent.map_err(WatchdogError::Talk)?;
        self.expect(word).await?;
        if matches!(word, Word::Thaw | Word::Cont) {
            self.beating.get_or_insert_with(|| {
                AbortOnDropHandle::new(tokio::spawn(beat(self.writing.clone())))
            });
        }
        Ok(())
    }

    async fn expect(&mut self, word: Word) -> Result<(), WatchdogError> {
        let echo = timeout(ECHO_LIMIT, self.reading.read_u8()).await;
        let echo = echo.map_err(io::Error::from).flatten();
        match echo.map_err(WatchdogError::Talk)? {
            actual if actual == word as u8 => Ok(()),
            actual => Err(WatchdogError::Echo {
                expected: word as u8,
                actual,
            }),
        }
    }
}

/// Shows that the job runs, for as long as there is a watchdog to see it.
async fn beat(writing: Arc<Mutex<OwnedWriteHalf>>) {
    loop {
        let sent = writing.lock().await.write_u8(Word::Alive as u8).await;
        if sent.is_err() {
            return;
        }
        sleep(BEAT).await;
    }
}

/// [`serve`] with what [`Watchdog::spawn`] puts on the command line.
/// When the VM runs again, `end` gets the text of `--end` and says whether it ended the snapshot.
pub fn serve_arguments(end: impl AsyncFnOnce(&str) -> bool) -> ExitCode {
    let mut known = [("--agent", None), ("--qmp", None), ("--end", None)];
    let mut arguments = std::env::args_os().skip(2);
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        for (known, found) in &mut known {
            if name == *known {
                *found = value.to_str().map(str::to_owned);
            }
        }
    }
    let [(_, agent), (_, qmp), (_, text)] = known;
    let address = |text: Option<String>| text.and_then(|text| serde_json::from_str(&text).ok());
    serve(address(agent), address(qmp), async || match text {
        Some(text) => end(&text).await,
        None => true,
    })
}

/// The watchdog process, with the socket to the job as its standard input. To be called before there
/// is any other runtime or thread. Fails if the VM could not be made to run again.
pub fn serve(
    agent: Option<Address>,
    qmp: Option<Address>,
    end: impl AsyncFnOnce() -> bool,
) -> ExitCode {
    // In a session of its own it is not part of the terminal's. It fails for the leader of a group,
    // which is one that no terminal signals together with the job.
    let _ = rustix::process::setsid();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let saved = runtime.and_then(|runtime| {
        runtime.block_on(async {
            let stakes = watch().await?;
            let runs = rescue(stakes, agent.as_ref(), qmp.as_ref()).await;
            let ended = !stakes.end || end().await;
            Ok(runs && ended)
        })
    });
    match saved {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            say(&format!(
                "the watchdog process cannot work: {}",
                with_causes(&e)
            ));
            ExitCode::FAILURE
        }
    }
}

/// What has to be done when the job dies.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Stakes {
    thaw: bool,
    cont: bool,
    end: bool,
}

impl Stakes {
    /// Whether the VM may stand still.
    fn stands(self) -> bool {
        self.thaw || self.cont
    }
}

/// Takes orders until the job disarms or is gone.
async fn watch() -> io::Result<Stakes> {
    // A handler that nobody reads replaces the default action, which is to die.
    let mut ignored = Vec::new();
    for kind in [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
    ] {
        ignored.push(signal(kind)?);
    }
    // The handlers stay for the life of the process even without their streams.
    drop(ignored);

    let stdin = std::os::unix::net::UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    stdin.set_nonblocking(true)?;
    let mut socket = UnixStream::from_std(stdin)?;
    // By a descriptor, as its number may be another process's by the time that it is needed.
    let job = rustix::process::getppid().and_then(|job| pidfd_open(job, PidfdFlags::empty()).ok());
    socket.write_u8(Word::Ready as u8).await?;
    let (stakes, end) = take_orders(&mut socket, SILENCE_LIMIT).await;
    if let (End::Silent, Some(job)) = (end, job) {
        say("the backup job does not run while its VM stands still; it is killed");
        if let Err(error) = pidfd_send_signal(job, Signal::KILL) {
            say(&format!(
                "cannot kill the backup job: {}",
                with_causes(&error)
            ));
        }
    }
    Ok(stakes)
}

/// Why no more orders are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The job disarmed or is gone.
    Closed,
    /// It gave no sign of life while something was at stake.
    Silent,
}

async fn take_orders(socket: &mut UnixStream, silence: Duration) -> (Stakes, End) {
    let mut stakes = Stakes::default();
    loop {
        let byte = match timeout(silence, socket.read_u8()).await {
            Ok(Ok(byte)) => byte,
            // An error is as good as the end: the job is gone.
            Ok(Err(_)) => return (stakes, End::Closed),
            Err(_) if !stakes.stands() => continue,
            Err(_) => return (stakes, End::Silent),
        };
        match byte {
            b if b == Word::Thaw as u8 => stakes.thaw = true,
            b if b == Word::Cont as u8 => stakes.cont = true,
            b if b == Word::End as u8 => stakes.end = true,
            b if b == Word::Runs as u8 => (stakes.thaw, stakes.cont) = (false, false),
            b if b == Word::Disarm as u8 => stakes = Stakes::default(),
            _ => continue,
        }
        // A job that is gone by now shows in the next read.
        let _ = socket.write_u8(byte).await;
        if byte == Word::Disarm as u8 {
            return (stakes, End::Closed);
        }
    }
}

/// Makes the VM run again, first its CPUs, without which no agent answers. Returns whether it does.
async fn rescue(mut stakes: Stakes, agent: Option<&Address>, qmp: Option<&Address>) -> bool {
    if !stakes.stands() {
        return true;
    }
    say("the backup job died; its watchdog makes the VM run again");
    let deadline = Instant::now() + RESCUE_LIMIT;
    while Instant::now() < deadline {
        if let (true, Some(address)) = (stakes.cont, qmp) {
            stakes.cont = !is_over("continue the VM", continue_vm(address).await);
        }
        if let (true, Some(address)) = (stakes.thaw, agent) {
            stakes.thaw = !is_over("thaw the guest", thaw(address).await);
        }
        let wanted = (stakes.cont && qmp.is_some()) || (stakes.thaw && agent.is_some());
        if !wanted {
            return !stakes.stands();
        }
        sleep(PAUSE).await;
    }
    say("the watchdog gives up: the VM may still be frozen or stopped");
    false
}

/// How one try ended that did not succeed.
enum Trouble {
    /// Nothing listens on the socket any more, so there is no VM any more.
    NoVm,
    /// Anything else: to be tried again.
    Other(String),
}

async fn continue_vm(address: &Address) -> Result<(), Trouble> {
    let trouble = |e: MonitorError| match &e {
        MonitorError::Libvirt(error) if error.is_gone() => Trouble::NoVm,
        error if error.is_nobody() => Trouble::NoVm,
        error => Trouble::Other(with_causes(error)),
    };
    let monitor = Monitor::reach(address).await.map_err(trouble)?;
    monitor.execute(cont {}).await.map(drop).map_err(trouble)
}

async fn thaw(address: &Address) -> Result<(), Trouble> {
    let trouble = |e: AgentError| match &e {
        AgentError::Connect { source, .. } if is_nobody(source) => Trouble::NoVm,
        AgentError::Libvirt(error) if error.is_gone() => Trouble::NoVm,
        _ => Trouble::Other(with_causes(&e)),
    };
    if let Some(domain) = address.libvirt() {
        let domain = Domain::find(domain).await;
        let domain = domain.map_err(|error| trouble(error.into()))?;
        if let Ok(false) = domain.has_qemu().await {
            return Err(Trouble::NoVm);
        }
    }
    let mut agent = Agent::reach(address, Limits::default())
        .await
        .map_err(trouble)?;
    agent.thaw().await.map_err(trouble)
}

fn is_over(what: &str, result: Result<(), Trouble>) -> bool {
    match result {
        Ok(()) | Err(Trouble::NoVm) => true,
        Err(Trouble::Other(why)) => {
            say(&format!("cannot {what} yet: {why}"));
            false
        }
    }
}

/// A QEMU that lives listens on its sockets even while another client is served.
fn is_nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
    )
}

/// The terminal may be gone with the job, which must not stop the rescue.
pub fn say(text: &str) {
    let text = fleecebox_contract::terminal::one_line(text);
    let _ = writeln!(io::stderr(), "fleecebox: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn stakes_after(words: &[u8]) -> Stakes {
        let (mut job, mut watchdog) = UnixStream::pair().unwrap();
        job.write_all(words).await.unwrap();
        job.shutdown().await.unwrap();
        let (stakes, end) = take_orders(&mut watchdog, SILENCE_LIMIT).await;
        assert_eq!(end, End::Closed);
        stakes
    }

    #[tokio::test]
    async fn what_is_at_stake_is_what_was_armed_and_not_disarmed() {
        let (thaw, cont) = (true, true);
        assert_eq!(stakes_after(b"").await, Stakes::default());
        let end = false;
        assert_eq!(
            stakes_after(b"t").await,
            Stakes {
                thaw,
                cont: false,
                end
            }
        );
        assert_eq!(stakes_after(b"t?c").await, Stakes { thaw, cont, end });
        let snapshot = Stakes {
            end: true,
            ..Stakes::default()
        };
        assert_eq!(stakes_after(b"etcf").await, snapshot);
        assert_eq!(stakes_after(b"etcd").await, Stakes::default());
    }

    #[tokio::test]
    async fn silence_counts_only_while_something_is_at_stake() {
        let silence = Duration::from_millis(200);
        let (mut job, mut watchdog) = UnixStream::pair().unwrap();
        let watching = tokio::spawn(async move { take_orders(&mut watchdog, silence).await });
        sleep(3 * silence).await;
        job.write_u8(Word::Thaw as u8).await.unwrap();
        for _ in 0..6 {
            job.write_u8(Word::Alive as u8).await.unwrap();
            sleep(silence / 2).await;
        }
        assert!(!watching.is_finished());
        let (stakes, end) = watching.await.unwrap();
        assert_eq!(end, End::Silent);
        assert!(stakes.thaw);
    }
}
