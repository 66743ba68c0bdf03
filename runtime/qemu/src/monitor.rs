//! QMP over a unix socket of QEMU's, or through libvirt, which has it: nobody who gives a command knows which.
//!
//! The types of commands are qapi's; the transport is our own. Each line is read as plain JSON first,
//! so that an event, a field or an enum value that we do not know hurts nobody who did not ask for it.

use super::address::Address;
use super::libvirt::{self, Definition, LibvirtError};
use super::line::{self, Read};
use super::{process, socket};
use fleecebox_contract::with_causes;
use qapi::qmp::QmpCommand;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

/// Longest line taken from QEMU. Its longest answers are the schema (about 250 KiB) and the list of
/// block nodes (about 1 KiB each): room for some ten thousand nodes.
const LINE_CAP: usize = 16 << 20;

/// Longest greeting taken; real ones have about 200 bytes.
const GREETING_CAP: usize = 64 << 10;

/// How long a socket has to show that it is a monitor.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// How long a connection that is closed without a word is tried again: QEMU 10.0.2 now and then does
/// that to a client that comes just when the last one goes.
const RECONNECT_LIMIT: Duration = Duration::from_secs(1);

/// Pause between two such tries.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

/// How long QEMU has to answer a command. A transaction drains its disks, so slow storage counts here.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Events kept for a subscriber that is behind.
const EVENTS_KEPT: usize = 256;

/// Commands queued before callers wait.
const COMMANDS_QUEUED: usize = 16;

/// Why talking to a monitor failed.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The socket cannot be connected to.
    #[error("cannot connect to the monitor socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its backlog is full: it serves one client at a time.
    #[error(
        "the monitor {path} is held by another client, and others wait for it; a monitor serves one at a time: give Fleecebox one of its own"
    )]
    Held {
        /// The socket.
        path: PathBuf,
    },
    /// The peer did not greet as the QMP specification asks of a server.
    #[error("{socket} is not a QMP monitor")]
    NotQmp {
        /// Which socket.
        socket: String,
        /// What came instead.
        #[source]
        reason: NotQmp,
    },
    /// QEMU answered with an error.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command's name.
        command: String,
        /// QMP's error class, such as `GenericError`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// The answer is not of the shape that the command promises.
    #[error("the answer to {command} cannot be understood")]
    Answer {
        /// The command's name.
        command: String,
        /// What does not fit.
        source: serde_json::Error,
    },
    /// The command cannot be written as JSON.
    #[error("{command} cannot be encoded")]
    Encode {
        /// The command's name.
        command: String,
        /// What does not fit.
        source: serde_json::Error,
    },
    /// A descriptor or socket for QEMU cannot be made.
    #[error("nothing can be opened on QEMU's behalf")]
    Descriptor {
        /// What the system said.
        source: io::Error,
    },
    /// QEMU was told a path, and another file was there by then.
    #[error("QEMU opened another file than the one that was at {} before: somebody replaced it meanwhile", .path.display())]
    OtherFile {
        /// The path.
        path: PathBuf,
    },
    /// Nothing came within the time limit. The command may still be carried out later.
    #[error("no answer to {what} within {} s", .limit.as_secs())]
    TimedOut {
        /// The command, or the event waited for.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// The subscriber was too slow and events were dropped; ask QEMU for its state instead.
    #[error("{count} events were missed")]
    EventsMissed {
        /// How many.
        count: u64,
    },
    /// The connection is gone.
    #[error("the connection to the monitor was lost: {reason}")]
    Lost {
        /// How it ended.
        reason: String,
    },
    /// What passes commands on went away meanwhile, and is there again. The command may have been carried out.
    #[error(
        "the way to the monitor was interrupted at {what}, and it is not known whether QEMU carried that out"
    )]
    Unanswered {
        /// The command.
        what: String,
    },
    /// libvirt, which has the monitor, did not pass the command on.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
}

impl MonitorError {
    /// Whether QEMU answered and said no, so that its state is known to be unchanged by the command.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Libvirt(error) => error.is_refusal(),
            error => matches!(error, Self::Refused { .. }),
        }
    }

    /// Whether there is no QMP monitor at the other end, or nothing at all.
    pub fn is_no_monitor(&self) -> bool {
        match self {
            Self::Libvirt(error) => error.is_mistake(),
            error => matches!(
                error,
                Self::Connect { .. } | Self::Held { .. } | Self::NotQmp { .. }
            ),
        }
    }

    /// Whether nothing listens on the socket, or libvirt says that the VM is off: there is no QEMU.
    pub fn is_nobody(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        match self {
            Self::Libvirt(error) => error.is_nobody(),
            Self::Connect { source, .. } => [ConnectionRefused, NotFound].contains(&source.kind()),
            _ => false,
        }
    }

    /// Whether no further command can succeed on this connection.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }

    /// Whether QEMU does not have what the command is about.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }

    /// Whether QEMU does not know the command.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }
}

/// What came where QMP's greeting should have been.
#[derive(Debug, thiserror::Error)]
pub enum NotQmp {
    /// Nothing at all.
    #[error("it said nothing for {} s (another client may hold it)", .limit.as_secs())]
    Silent {
        /// The limit.
        limit: Duration,
    },
    /// The connection ended.
    #[error("it closed the connection")]
    Closed,
    /// Something that is not a greeting.
    #[error("it did not greet as one")]
    OtherGreeting,
    /// It greeted, but did not take `qmp_capabilities`.
    #[error("it refused the handshake")]
    Handshake(#[source] Box<MonitorError>),
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// An event as QEMU sent it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Such as `BLOCK_EXPORT_DELETED`; may be one that this program has never heard of.
    #[serde(rename = "event")]
    pub name: String,
    /// What comes with it, null where nothing does.
    #[serde(default)]
    pub data: Value,
    /// When QEMU sent it, on its own clock; never used for a decision.
    #[serde(default)]
    pub timestamp: Value,
}

/// Events from the moment of [`Monitor::events`] on.
#[derive(Debug)]
pub struct Events(Option<broadcast::Receiver<Event>>);

impl Events {
    /// The first event that `matches`, skipping others.
    ///
    /// # Errors
    /// [`MonitorError::TimedOut`], [`MonitorError::EventsMissed`], [`MonitorError::Lost`].
    pub async fn wait_for(
        &mut self,
        limit: Duration,
        mut matches: impl FnMut(&Event) -> bool,
    ) -> Result<Event, MonitorError> {
        let search = async {
            loop {
                let event = self.next().await?;
                if matches(&event) {
                    return Ok(event);
                }
            }
        };
        timeout(limit, search).await.unwrap_or_else(|_| {
            Err(MonitorError::TimedOut {
                what: "an event".into(),
                limit,
            })
        })
    }

    /// Returns when anything happened, or after `pause`: for callers who then ask QEMU for its state.
    pub(super) async fn nudge(&mut self, pause: Duration) {
        if let Ok(Err(MonitorError::Lost { .. })) = timeout(pause, self.next()).await {
            // This must not turn the caller's loop into a spin; its next command tells.
            sleep(pause).await;
        }
    }

    async fn next(&mut self) -> Result<Event, MonitorError> {
        let lost = || MonitorError::Lost {
            reason: "no further events".into(),
        };
        let receiver = self.0.as_mut().ok_or_else(lost)?;
        receiver.recv().await.map_err(|e| match e {
            broadcast::error::RecvError::Lagged(count) => MonitorError::EventsMissed { count },
            broadcast::error::RecvError::Closed => lost(),
        })
    }
}

/// One connection to a QMP monitor, ready for commands. QEMU serves one client per socket.
///
/// All methods take `&self`; commands of several tasks are answered by their ids. Dropping it closes
/// the connection and leaves QEMU as it is.
#[derive(Debug)]
pub struct Monitor {
    link: Link,
    peer: Option<i32>,
}

/// The way to it.
#[derive(Debug)]
enum Link {
    Socket(SocketLink),
    Libvirt(libvirt::Link),
}

/// Over a socket of QEMU's.
#[derive(Debug)]
struct SocketLink {
    commands: mpsc::Sender<Outgoing>,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::WeakSender<Event>,
    next_id: AtomicU64,
    tasks: [AbortHandle; 2],
}

/// One command on its way.
#[derive(Debug)]
struct Outgoing {
    line: Vec<u8>,
    /// Goes along with its first byte.
    descriptor: Option<OwnedFd>,
}

/// Who waits for which answer.
#[derive(Debug)]
enum Waiting {
    Open(HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>),
    Lost { reason: String },
}

#[derive(Debug, PartialEq, Deserialize)]
pub(super) struct Refusal {
    #[serde(default)]
    pub(super) class: String,
    #[serde(default)]
    pub(super) desc: String,
}

impl Monitor {
    /// Reaches the monitor of a VM.
    ///
    /// # Errors
    /// As [`Monitor::connect`], and [`MonitorError::Libvirt`].
    pub async fn reach(address: &Address) -> Result<Self, MonitorError> {
        let domain = match address {
            Address::Socket(path) => return Self::connect(path).await,
            Address::Libvirt(domain) => domain,
        };
        let link = libvirt::Link::open(domain, EVENTS_KEPT).await?;
        let mut monitor = Self {
            link: Link::Libvirt(link),
            peer: None,
        };
        monitor.peer = process::behind(&monitor).await;
        Ok(monitor)
    }

    /// Connects to the socket at `path` and negotiates.
    ///
    /// # Errors
    /// [`MonitorError::Connect`], [`MonitorError::NotQmp`].
    pub async fn connect(path: &Path) -> Result<Self, MonitorError> {
        let deadline = Instant::now() + RECONNECT_LIMIT;
        loop {
            let stream =
                socket::connect(path, GREETING_LIMIT)
                    .await
                    .map_err(|source| match source.kind() {
                        io::ErrorKind::WouldBlock => MonitorError::Held { path: path.into() },
                        _ => MonitorError::Connect {
                            path: path.into(),
                            source,
                        },
                    })?;
            match Self::over(stream, &path.display().to_string()).await {
                Err(MonitorError::NotQmp {
                    reason: NotQmp::Closed,
                    ..
                }) if Instant::now() < deadline => sleep(RECONNECT_PAUSE).await,
                result => return result,
            }
        }
    }

    /// Negotiates on a connected socket; `name` is for error messages.
    ///
    /// # Errors
    /// [`MonitorError::NotQmp`], and [`MonitorError::Lost`] from one that greeted and then went.
    pub async fn over(stream: UnixStream, name: &str) -> Result<Self, MonitorError> {
        let not_qmp = |reason| MonitorError::NotQmp {
            socket: name.into(),
            reason,
        };
        let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        timeout(GREETING_LIMIT, greeting(&mut reader))
            .await
            .unwrap_or(Err(NotQmp::Silent {
                limit: GREETING_LIMIT,
            }))
            .map_err(not_qmp)?;

        let link = Link::Socket(SocketLink::start(reader, writer));
        let monitor = Self { link, peer };
        monitor
            .within(GREETING_LIMIT, "qmp_capabilities", json!({}), None)
            .await
            .map_err(|error| match error.is_lost() {
                true => error,
                false => not_qmp(NotQmp::Handshake(Box::new(error))),
            })?;
        Ok(monitor)
    }

    /// Runs a command with qapi's types. Unknown fields of the answer are ignored.
    ///
    /// # Errors
    /// Any [`MonitorError`] but those of connecting; [`MonitorError::Answer`] where qapi does not know
    /// an enum value: use [`Monitor::query`] with a more tolerant type there.
    pub async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok, MonitorError> {
        let arguments = serde_json::to_value(&command).map_err(|source| MonitorError::Encode {
            command: C::NAME.into(),
            source,
        })?;
        self.query(C::NAME, arguments).await
    }

    /// Runs a command by name, with the caller's own type of answer.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, MonitorError> {
        let answer = self.execute_raw(command, arguments).await?;
        serde_json::from_value(answer).map_err(|source| MonitorError::Answer {
            command: command.into(),
            source,
        })
    }

    /// Runs a command by name, for what qapi drops or does not know.
    ///
    /// # Errors
    /// As [`Monitor::execute`], but for [`MonitorError::Answer`].
    pub async fn execute_raw(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, MonitorError> {
        self.within(COMMAND_LIMIT, command, arguments, None).await
    }

    /// Runs a command that takes a descriptor: `add-fd` or `getfd`.
    ///
    /// # Errors
    /// As [`Monitor::execute_raw`].
    pub(super) async fn execute_with(
        &self,
        descriptor: OwnedFd,
        command: &str,
        arguments: Value,
    ) -> Result<Value, MonitorError> {
        let descriptor = Some(descriptor);
        self.within(COMMAND_LIMIT, command, arguments, descriptor)
            .await
    }

    /// The process that listens on the monitor, by its id here: QEMU, or a relay before it.
    pub(super) fn peer(&self) -> Option<i32> {
        self.peer.filter(|&pid| pid > 0)
    }

    /// What whoever manages the VM would define it anew by, with the name of such a file; nothing where that is not known.
    ///
    /// # Errors
    /// [`MonitorError::Libvirt`], [`MonitorError::Lost`].
    pub async fn configuration(&self) -> Result<Option<(&'static str, String)>, MonitorError> {
        match &self.link {
            Link::Socket(_) => Ok(None),
            Link::Libvirt(link) => {
                let xml = link.up().await?.stored_definition().await?;
                Ok(Some(("domain.xml", xml)))
            }
        }
    }

    /// What whoever manages the VM knows of it at this time; nothing where nobody does.
    ///
    /// # Errors
    /// As [`Monitor::configuration`].
    pub async fn described(&self) -> Result<Option<Definition>, MonitorError> {
        match &self.link {
            Link::Socket(_) => Ok(None),
            Link::Libvirt(link) => {
                let xml = link.up().await?.running_definition().await?;
                let read = Definition::read(&xml).map_err(LibvirtError::from)?;
                Ok(Some(read))
            }
        }
    }

    /// Whether the connection is gone, so that no command can succeed on it.
    pub fn is_lost(&self) -> bool {
        // Not by the events: they end a moment after the first caller was told.
        match &self.link {
            Link::Socket(link) => matches!(*lock(&link.waiting), Waiting::Lost { .. }),
            Link::Libvirt(link) => link.is_lost(),
        }
    }

    /// Waits until the connection is gone: QEMU ended, or let go of it. Says how.
    pub async fn lost(&self) -> MonitorError {
        let mut events = self.events();
        while !events.next().await.is_err_and(|error| error.is_lost()) {}
        match &self.link {
            Link::Socket(link) => link.gone(),
            Link::Libvirt(link) => link.gone(),
        }
    }

    /// Events from now on. Subscribe before the command that causes what you wait for.
    pub fn events(&self) -> Events {
        Events(match &self.link {
            Link::Socket(link) => link.events.upgrade().map(|sender| sender.subscribe()),
            Link::Libvirt(link) => link.events(),
        })
    }

    async fn within(
        &self,
        limit: Duration,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, MonitorError> {
        let exchanged = async {
            match &self.link {
                Link::Socket(link) => link.exchange(command, arguments, descriptor).await,
                Link::Libvirt(link) => link.exchange(command, arguments, descriptor).await,
            }
        };
        let answer = timeout(limit, exchanged).await;
        answer.unwrap_or_else(|_| {
            Err(MonitorError::TimedOut {
                what: command.into(),
                limit,
            })
        })
    }
}

impl SocketLink {
    fn start(reader: BufReader<OwnedReadHalf>, writer: OwnedWriteHalf) -> Self {
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let weak_events = events.downgrade();
        let waiting = Arc::new(Mutex::new(Waiting::Open(HashMap::new())));
        let (commands, queue) = mpsc::channel(COMMANDS_QUEUED);
        // A writer of its own: a caller that goes away in mid-command must not leave half a line.
        let write = tokio::spawn(write_commands(writer, queue, waiting.clone()));
        let read = tokio::spawn(read_messages(reader, events, waiting.clone()));
        Self {
            commands,
            waiting,
            events: weak_events,
            next_id: AtomicU64::new(1),
            tasks: [write.abort_handle(), read.abort_handle()],
        }
    }

    async fn exchange(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, MonitorError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        tracing::debug!(target: "fleecebox::qmp", "-> {line}");
        line.push('\n');

        let (sender, answer) = oneshot::channel();
        match &mut *lock(&self.waiting) {
            Waiting::Open(waiting) => {
                // Those who were not answered in time: nobody else takes them out.
                waiting.retain(|_, waiter| !waiter.is_closed());
                waiting.insert(id, sender);
            }
            // Without a sender, the answer below is that the connection is lost.
            Waiting::Lost { .. } => drop(sender),
        }
        self.commands
            .send(Outgoing {
                line: line.into_bytes(),
                descriptor,
            })
            .await
            .map_err(|_| self.gone())?;
        match answer.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(refusal)) => Err(MonitorError::Refused {
                command: command.into(),
                class: refusal.class,
                description: refusal.desc,
            }),
            Err(_) => Err(self.gone()),
        }
    }

    fn gone(&self) -> MonitorError {
        let reason = match &*lock(&self.waiting) {
            Waiting::Lost { reason } => reason.clone(),
            Waiting::Open(_) => "the monitor's tasks ended".into(),
        };
        MonitorError::Lost { reason }
    }
}

impl Drop for SocketLink {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What one line from QEMU is.
#[derive(Debug, PartialEq)]
enum Message {
    Answer {
        id: u64,
        result: Result<Value, Refusal>,
    },
    Event(Event),
    /// None of ours: no JSON, another client's id, or something that later versions invent.
    Unknown,
}

impl Message {
    fn parse(line: &[u8]) -> Self {
        let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else {
            return Self::Unknown;
        };
        if object.contains_key("event") {
            return serde_json::from_value(Value::Object(object))
                .map_or(Self::Unknown, Self::Event);
        }
        let Some(id) = object.get("id").and_then(Value::as_u64) else {
            return Self::Unknown;
        };
        if let Some(value) = object.remove("return") {
            return Self::Answer {
                id,
                result: Ok(value),
            };
        }
        match object.remove("error").map(serde_json::from_value) {
            Some(Ok(refusal)) => Self::Answer {
                id,
                result: Err(refusal),
            },
            _ => Self::Unknown,
        }
    }
}

async fn greeting(reader: &mut BufReader<OwnedReadHalf>) -> Result<(), NotQmp> {
    let mut bytes = Vec::new();
    match line::read_until(reader, b'\n', GREETING_CAP, &mut bytes).await? {
        Read::Whole => match serde_json::from_slice::<Value>(&bytes) {
            Ok(Value::Object(object)) if object.contains_key("QMP") => Ok(()),
            _ => Err(NotQmp::OtherGreeting),
        },
        Read::Closed => Err(NotQmp::Closed),
        Read::TooLong => Err(NotQmp::OtherGreeting),
    }
}

async fn write_commands(
    mut writer: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Outgoing>,
    waiting: Arc<Mutex<Waiting>>,
) {
    while let Some(Outgoing { line, descriptor }) = queue.recv().await {
        let sent = match descriptor {
            None => Ok(0),
            Some(descriptor) => socket::send_with(writer.as_ref(), &line, descriptor.as_fd()).await,
        };
        let sent = match sent {
            Ok(sent) => writer.write_all(line.get(sent..).unwrap_or_default()).await,
            Err(e) => Err(e),
        };
        if let Err(e) = sent {
            lose(&waiting, with_causes(&e));
            return;
        }
    }
}

/// Ends when the connection does; `events` goes with it, which wakes those who wait for one.
async fn read_messages(
    mut reader: BufReader<OwnedReadHalf>,
    events: broadcast::Sender<Event>,
    waiting: Arc<Mutex<Waiting>>,
) {
    let mut bytes = Vec::new();
    let reason = loop {
        bytes.clear();
        match line::read_until(&mut reader, b'\n', LINE_CAP, &mut bytes).await {
            Ok(Read::Whole) => {}
            Ok(Read::Closed) => break "QEMU closed it".to_owned(),
            Ok(Read::TooLong) => break format!("a line of more than {LINE_CAP} bytes came"),
            Err(e) => break with_causes(&e),
        }
        match Message::parse(&bytes) {
            Message::Answer { id, result } => {
                let waiter = match &mut *lock(&waiting) {
                    Waiting::Open(waiting) => waiting.remove(&id),
                    Waiting::Lost { .. } => return,
                };
                if let Some(waiter) = waiter {
                    // A waiter that has gone needs no answer.
                    let _ = waiter.send(result);
                }
            }
            Message::Event(event) => {
                tracing::debug!(target: "fleecebox::qmp", "event {} {}", event.name, event.data);
                // Without subscribers there is nobody to tell.
                let _ = events.send(event);
            }
            Message::Unknown => {
                tracing::debug!(target: "fleecebox::qmp", "skipped an unknown message")
            }
        }
    };
    lose(&waiting, reason);
}

/// Fails all waiters by dropping their senders; the first reason stays.
fn lose(waiting: &Mutex<Waiting>, reason: String) {
    let mut waiting = lock(waiting);
    if matches!(*waiting, Waiting::Open(_)) {
        *waiting = Waiting::Lost { reason };
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // No code panics while it holds the lock, and the map is whole between any two statements.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncBufReadExt;

    /// Connections that QEMU closes on a command: enough to meet each order of our two tasks and the caller.
    const CLOSED: usize = 2000;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn who_is_told_of_the_loss_sees_it() {
        for _ in 0..CLOSED {
            let (ours, qemu) = UnixStream::pair().unwrap();
            let (reader, writer) = ours.into_split();
            let link = SocketLink::start(BufReader::new(reader), writer);
            let monitor = Monitor {
                link: Link::Socket(link),
                peer: None,
            };
            let closing = tokio::spawn(async move {
                let mut line = Vec::new();
                BufReader::new(qemu).read_until(b'\n', &mut line).await
            });
            let error = monitor.execute_raw("stop", json!({})).await.unwrap_err();
            assert!(error.is_lost() && monitor.is_lost(), "{error}");
            closing.await.unwrap().unwrap();
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic_and_what_is_no_message_is_unknown(line in prop::collection::vec(any::<u8>(), 0..200)) {
            // Random bytes are never an object that has the right members.
            prop_assert_eq!(Message::parse(&line), Message::Unknown);
        }

        #[test]
        fn an_answer_reaches_the_id_it_names(id: u64, text: String, extra in "[a-z]{6,9}") {
            let line = json!({ "id": id, "return": { "text": text.clone() }, extra: 1 }).to_string();
            prop_assert_eq!(Message::parse(line.as_bytes()), Message::Answer { id, result: Ok(json!({ "text": text })) });
        }

        #[test]
        fn an_event_of_any_name_is_an_event(name: String, field in "[a-z]{1,9}") {
            let line = json!({ "event": name.clone(), "data": { field.clone(): 1 }, "timestamp": { "seconds": 1, "microseconds": 2 }, "more": 1 }).to_string();
            match Message::parse(line.as_bytes()) {
                Message::Event(event) => {
                    prop_assert_eq!(event.name, name);
                    prop_assert_eq!(event.data, json!({ field: 1 }));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
