//! The job process's side of one sandbox process: starting it, speaking with it, and making sure of its end.

use super::budget::{Budget, Share};
use super::cgroup::{Group, Member};
use super::usage::Usage;
use super::witness::{Listeners, Witness};
use fleecebox_channel::{
    ARGUMENT, Answer, AsyncSocket, Bounds, COMPILE_MEMORY, Call, Confinement, Gap, ImageRead,
    Order, Payload, PayloadError, SocketError, Violation, hand_over, listed, room,
};
use fleecebox_contract::ErrorCode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

/// How much of a dying sandbox's last words is kept, in bytes. They come from a process that may be hostile.
const LAST_WORDS: usize = 300;

/// How often a process's time is held against its job's: what a job may use too much is at most this for each of its
/// processes.
const CHECKED_EVERY: Duration = Duration::from_millis(250);

/// How long a process that was killed is waited for. The kernel ends it at once, unless it holds it itself, in a call on
/// storage that hangs; the VM's snapshot must not wait for that.
const END_TIME: Duration = Duration::from_secs(5);

/// The program that a sandbox process runs: one whose `main` enters the confined side for [`ARGUMENT`].
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    confinement_required: bool,
    witnesses: Vec<Arc<dyn Witness>>,
    budget: Option<Budget>,
}

impl Program {
    /// The program that is running now, whatever has since happened to its file.
    pub fn this() -> Self {
        Self::at("/proc/self/exe")
    }

    /// Another one; for tests, whose own program is not Fleecebox.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            confinement_required: false,
            witnesses: Vec::new(),
            budget: None,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// With `required`, a process with a [`Gap`] in its confinement gets no order ([`Error::Unconfined`]).
    pub fn require_confinement(self, required: bool) -> Self {
        Self {
            confinement_required: required,
            ..self
        }
    }

    /// The same, with all processes that run a provider within one budget.
    pub fn within(self, budget: Budget) -> Self {
        // Made now: a process that this one has started would stay behind where it has to move (`cgroup`).
        budget.group();
        Self {
            budget: Some(budget),
            ..self
        }
    }

    /// The same, with one more who follows what its processes ask and are answered.
    pub fn watched_by(mut self, witness: impl Witness + 'static) -> Self {
        self.witnesses.push(Arc::new(witness));
        self
    }
}

/// A running sandbox process. It is killed when this is dropped, at any moment.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    handle: OwnedFd,
    /// Taken when its end was seen.
    ended: Option<oneshot::Receiver<ExitStatus>>,
    socket: AsyncSocket,
    payload: Payload,
    bounds: Bounds,
    stderr: OwnedFd,
    missing: Vec<Gap>,
    listeners: Listeners,
    share: Option<Share>,
    member: Option<Member>,
    next_check: Instant,
    /// Processor time that the job itself has used for it.
    worked: Duration,
}

/// Why a sandbox process is of no more use. After any of these it has been killed, or is when it is dropped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("no sandbox process could be started")]
    Start(#[source] std::io::Error),
    /// It ended without having said that it is done.
    #[error("the sandbox process ended: {status}{}{}", forbidden(.status), said(.words))]
    Died {
        /// How it ended.
        status: ExitStatus,
        /// What it printed to standard error, one line, cut and escaped; often empty.
        words: String,
    },
    /// It said something that its own stubs never say: somebody has broken it.
    #[error("the sandbox process broke the protocol")]
    Broken(#[source] Violation),
    /// What came over the socket is no message.
    #[error("the sandbox process broke the protocol")]
    Socket(#[source] SocketError),
    /// Bytes could not be copied in or out.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// All of the job's processes together have used more than they may.
    #[error(
        "it used more CPU time than its limit allows: {} s for all volumes together (cpu-seconds)",
        .limit.as_secs()
    )]
    CpuTime {
        /// The limit.
        limit: Duration,
    },
    /// The kernel ended it: the processes of its control group took more memory than they may together.
    #[error(
        "it needs more memory than its limit allows: the kernel ended it at {} MiB, its runtime included (memory)",
        .limit >> 20
    )]
    Memory {
        /// Of the group, in bytes.
        limit: u64,
    },
    /// It was given no order, because [`Program::require_confinement`] says so.
    #[error("a sandbox process is not confined as required: {}", listed(.missing))]
    Unconfined {
        /// What this system does not offer.
        missing: Vec<Gap>,
    },
}

/// What the kernel's signal says: a sandbox process is ended by it for one reason only.
fn forbidden(status: &ExitStatus) -> &'static str {
    if status.signal() == Some(Signal::SYS.as_raw()) {
        ", for a system call that no sandbox needs: something in it has broken out of its runtime"
    } else {
        ""
    }
}

fn said(words: &str) -> String {
    if words.is_empty() {
        String::new()
    } else {
        format!(" ({words})")
    }
}

impl Process {
    /// Starts a process, and gives it `order` and the compiled component, open for reading only.
    ///
    /// For all but [`Order::Compile`], which is [`super::compile()`]'s.
    pub async fn start(program: &Program, order: &Order, compiled: &File) -> Result<Self, Error> {
        let payload = Payload::create(Payload::TRANSFER_SIZE)?;
        Self::begin(program, order, payload, Some(compiled.as_fd())).await
    }

    /// Starts a process on a payload of the caller's.
    pub(super) async fn begin(
        program: &Program,
        order: &Order,
        payload: Payload,
        compiled: Option<BorrowedFd<'_>>,
    ) -> Result<Self, Error> {
        let (here, there) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(start)?;
        // Not blocking on either side: nobody waits for last words, neither to say nor to hear them.
        let (stderr, said) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(start)?;
        let files: Vec<_> = std::iter::once(payload.as_fd()).chain(compiled).collect();
        hand_over(&here, &files).map_err(start)?;
        let mut command = Command::new(&program.path);
        command
            .arg0("fleecebox")
            .arg(ARGUMENT)
            .env_clear()
            .current_dir("/")
            // An interrupt from the terminal is for the job, which then ends its sandboxes in its own order.
            .process_group(0)
            .stdin(there)
            .stdout(Stdio::null())
            .stderr(said);
        let started = launch(command).await?;
        let mut process = Self {
            pid: started.pid,
            handle: started.handle,
            ended: Some(started.ended),
            socket: AsyncSocket::new(UnixStream::from(here)).map_err(Error::Socket)?,
            payload,
            bounds: Bounds::new(order),
            stderr,
            missing: Vec::new(),
            listeners: Listeners::begin(&program.witnesses, order),
            share: match order {
                // It has limits of its own.
                Order::Compile { .. } | Order::Fit(_) => None,
                Order::Run(_) | Order::OpenImage(_) => program.budget.as_ref().map(Budget::share),
            },
            member: None,
            next_check: Instant::now() + CHECKED_EVERY,
            worked: Duration::ZERO,
        };
        // Nothing hostile has reached the process before it has its order, so this is true.
        let Confinement { mut missing } = process.hear().await?;
        // It waits for its order now, so that the number is its own.
        process.member = group(program, order, compiled)
            .and_then(|(group, room)| group.admit(process.pid, room).ok());
        if process.member.is_none() {
            missing.push(Gap::Group);
        }
        if program.confinement_required && !missing.is_empty() {
            return Err(Error::Unconfined { missing });
        }
        process.missing = missing;
        process.say(order).await?;
        Ok(process)
    }

    /// Waits until it has taken its answer, and for its next call, which is within what the order granted.
    ///
    /// May be cancelled and called again. There is no time limit: the caller has one.
    pub async fn next(&mut self) -> Result<Call, Error> {
        loop {
            let call = self.hear_within_budget().await?;
            if let Err(violation) = self.bounds.check(&call) {
                self.signal_kill();
                return Err(Error::Broken(violation));
            }
            if let Call::Grow { bytes } = call {
                let granted = self.share.as_ref().is_none_or(|share| share.grow(bytes));
                self.queue(&match granted {
                    true => Answer::Unit,
                    false => Answer::Error(ErrorCode::TooLarge),
                })?;
                continue;
            }
            let payload = |length| self.take_payload(length).ok();
            match self.listeners.called(&call, &payload) {
                Some(code) => self.answer(&Answer::Error(code))?,
                None => return Ok(call),
            }
        }
    }

    async fn hear_within_budget(&mut self) -> Result<Call, Error> {
        if self.share.is_none() {
            return self.hear().await;
        }
        loop {
            if Instant::now() >= self.next_check {
                self.next_check = Instant::now() + CHECKED_EVERY;
                self.check_time()?;
            }
            // Only the waiting is given up in between, and not how an end is found out about.
            match timeout_at(self.next_check, self.socket.receive()).await {
                Ok(Ok(call)) => return Ok(call),
                Ok(Err(error)) => return Err(self.end(error).await),
                Err(_) => {}
            }
        }
    }

    /// What it and the job have used for it.
    fn usage(&self) -> Option<Usage> {
        let usage = Usage::of(self.pid)?;
        Some(Usage {
            cpu: usage.cpu.saturating_add(self.worked),
            ..usage
        })
    }

    /// The job has used processor time for what it asked: it counts as its own.
    pub fn worked_for(&mut self, cpu: Duration) {
        self.worked = self.worked.saturating_add(cpu);
    }

    /// One that has ended has used what it had when it was last looked at.
    fn check_time(&self) -> Result<(), Error> {
        match (&self.share, self.usage()) {
            // Whoever kills it reads first what it has used.
            (Some(share), Some(usage)) if !share.spend(usage.cpu) => Err(Error::CpuTime {
                limit: share.cpu_limit(),
            }),
            _ => Ok(()),
        }
    }

    /// Answers the last call; [`Process::next`] sees to it that the answer is taken.
    pub fn answer(&mut self, answer: &Answer) -> Result<(), Error> {
        let payload = |length| self.take_payload(length).ok();
        self.listeners.answered(answer, &payload);
        self.queue(answer)
    }

    /// Asks an open image for bytes; the caller then goes on with [`Process::next`] until [`Call::Done`].
    pub fn read_image(&mut self, read: ImageRead) -> Result<(), Error> {
        self.listeners.asked(read);
        self.queue(&read)
    }

    /// Copies `length` bytes out of what both processes hold.
    pub fn take_payload(&self, length: u32) -> Result<Vec<u8>, Error> {
        Ok(self.payload.take(length.into())?)
    }

    /// Copies `bytes` to where the sandbox finds them, at most [`Payload::TRANSFER_SIZE`]; returns their number.
    pub fn give_payload(&self, bytes: &[u8]) -> Result<u32, Error> {
        let length = self.payload.give(bytes)?;
        // The payload is far smaller than 4 GiB.
        Ok(length as u32)
    }

    /// Its process id, for the log.
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// Kills it and waits until it is gone. Dropping it kills it as well, but does not wait.
    ///
    /// Returns what it has used, unless it had ended by itself or the system does not show it.
    pub async fn kill(mut self) -> Option<Usage> {
        let usage = self.usage();
        if let (Some(share), Some(usage)) = (&self.share, &usage) {
            share.spend(usage.cpu);
        }
        // While it can be signalled nobody has waited for it, so that the number was its own until now.
        let own = pidfd_send_signal(&self.handle, Signal::KILL).is_ok();
        self.gone().await;
        usage.filter(|_| own)
    }

    /// In what it is less confined than it could be, on a system that offers everything.
    pub fn missing(&self) -> &[Gap] {
        &self.missing
    }

    pub(super) fn payload(&self) -> &Payload {
        &self.payload
    }

    fn queue(&mut self, message: &impl serde::Serialize) -> Result<(), Error> {
        self.socket.queue(message).map_err(Error::Socket)
    }

    async fn say(&mut self, message: &impl serde::Serialize) -> Result<(), Error> {
        match self.socket.send(message).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.end(error).await),
        }
    }

    async fn hear<M: serde::de::DeserializeOwned>(&mut self) -> Result<M, Error> {
        match self.socket.receive().await {
            Ok(message) => Ok(message),
            Err(error) => Err(self.end(error).await),
        }
    }

    /// Makes an end after the socket has failed.
    async fn end(&mut self, error: SocketError) -> Error {
        match (error, self.gone().await) {
            (SocketError::Closed, Some(status))
                if status.signal() == Some(Signal::KILL.as_raw())
                    && let Some(limit) = self.passed_limit() =>
            {
                Error::Memory { limit }
            }
            (SocketError::Closed, Some(status)) => Error::Died {
                status,
                words: self.last_words(),
            },
            (error, _) => Error::Socket(error),
        }
    }

    fn passed_limit(&self) -> Option<u64> {
        self.member.as_ref().and_then(Member::passed_limit)
    }

    /// Kills it, waits, and says how it ended, once. One that ended by itself keeps its own status.
    async fn gone(&mut self) -> Option<ExitStatus> {
        self.signal_kill();
        ended(self.ended.take()?, END_TIME).await
    }

    fn signal_kill(&self) {
        // Fails only when it is gone already.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }

    fn last_words(&self) -> String {
        let mut bytes = [0; LAST_WORDS];
        let count = rustix::io::read(&self.stderr, &mut bytes).unwrap_or(0);
        let words = String::from_utf8_lossy(&bytes[..count]);
        words.trim().escape_debug().to_string()
    }
}

/// How a process ended, if it does so within `limit`. The thread that waits for it stays until it does.
async fn ended(ended: oneshot::Receiver<ExitStatus>, limit: Duration) -> Option<ExitStatus> {
    timeout(limit, ended).await.ok()?.ok()
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal_kill();
    }
}

/// The control group for a process with this order, and what it needs in it beside its guest's memory. Those of a job
/// share one; without a budget, and to compile, each has its own.
fn group(
    program: &Program,
    order: &Order,
    compiled: Option<BorrowedFd<'_>>,
) -> Option<(Arc<Group>, u64)> {
    let compiled = match compiled {
        Some(file) => rustix::fs::fstat(file).ok()?.st_size.unsigned_abs(),
        None => 0,
    };
    let room = room(compiled);
    let own = |memory| Group::make(memory).ok().map(Arc::new);
    let (group, room) = match (order, &program.budget) {
        // What it puts into the memory file is charged to whoever touched it first.
        (Order::Compile { .. }, _) => (own(COMPILE_MEMORY), room + Payload::COMPILE_SIZE),
        (_, Some(budget)) => (budget.group(), room),
        (Order::Fit(_), None) => (own(0), room),
        (Order::Run(run), None) => (own(run.limits.memory), room),
        (Order::OpenImage(open), None) => (own(open.limits.memory), room),
    };
    Some((group?, room))
}

struct Started {
    pid: u32,
    handle: OwnedFd,
    ended: oneshot::Receiver<ExitStatus>,
}

/// Starts `command` on a thread of its own, which then waits for its end.
///
/// A sandbox dies with the *thread* that started it (PR_SET_PDEATHSIG, prctl(2)), and a runtime may end its
/// threads when it likes. This thread ends when the sandbox has, and so it also leaves no zombie behind.
async fn launch(mut command: Command) -> Result<Started, Error> {
    let (say_started, started) = oneshot::channel();
    let (say_ended, ended) = oneshot::channel();
    let body = move || {
        let child = command.spawn();
        // What is left in the command would keep the sandbox's end of the socket open here.
        drop(command);
        let mut child = match child {
            Ok(child) => child,
            Err(error) => return drop(say_started.send(Err(error))),
        };
        let pid = child.id();
        // It has not been waited for, so the number is still its own.
        let handle = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let unheard = match handle {
            Ok(handle) => say_started.send(Ok((pid, handle))).is_err(),
            Err(error) => {
                let _ = say_started.send(Err(error.into()));
                true
            }
        };
        if unheard {
            // Nobody holds it, so nobody else would end it.
            let _ = child.kill();
        }
        if let Ok(status) = child.wait() {
            let _ = say_ended.send(status);
        }
    };
    std::thread::Builder::new()
        .name("sandbox-wait".into())
        .stack_size(128 << 10)
        .spawn(body)
        .map_err(Error::Start)?;
    match started.await {
        Ok(Ok((pid, handle))) => Ok(Started { pid, handle, ended }),
        Ok(Err(error)) => Err(Error::Start(error)),
        // The thread sends before it ends.
        Err(_) => Err(Error::Start(std::io::ErrorKind::Other.into())),
    }
}

fn start(error: Errno) -> Error {
    Error::Start(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_the_kernel_does_not_let_go_is_not_waited_for() {
        let moment = Duration::from_millis(20);
        let (held, end) = oneshot::channel();
        assert_eq!(ended(end, moment).await, None);
        drop(held);
        let (gone, end) = oneshot::channel();
        gone.send(ExitStatus::from_raw(9)).unwrap();
        assert_eq!(ended(end, moment).await, Some(ExitStatus::from_raw(9)));
    }
}
