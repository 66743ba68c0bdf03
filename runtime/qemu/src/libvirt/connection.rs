//! One connection to libvirt's daemon: calls of several tasks, answered by their serial numbers, and what it tells of its
//! own accord.

use super::message::{self, Incoming, Notice, Program, Refusal};
use super::xdr::{Reader, Writer};
use super::{LibvirtError, Uri};
use crate::monitor::Event;
use crate::socket;
use fleecebox_contract::with_causes;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long the socket may take to take a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long the daemon may take for what is asked of it. One that was just started looks at each QEMU of the host first;
/// to start a domain or to end it takes seconds.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// Calls queued before callers wait.
const CALLS_QUEUED: usize = 16;

/// `REMOTE_PROC_CONNECT_OPEN`, `REMOTE_PROC_AUTH_LIST` and `REMOTE_PROC_AUTH_POLKIT`.
const OPEN: u32 = 1;
const AUTH_LIST: u32 = 66;
const AUTH_POLKIT: u32 = 70;

/// `remote_auth_type`.
const NO_LOGIN: u32 = 0;
const POLKIT: u32 = 2;
/// `REMOTE_AUTH_TYPE_LIST_MAX`.
const LOGINS_CAP: u32 = 20;

/// Where what the daemon tells of its own accord goes.
#[derive(Debug, Clone)]
pub(super) struct Ears {
    /// Events of QEMU's monitor; their end is not the connection's to decide.
    pub(super) events: broadcast::WeakSender<Event>,
    /// Cancelled when the domain's QEMU has ended.
    pub(super) stopped: CancellationToken,
}

#[derive(Debug)]
pub(super) struct Connection {
    calls: mpsc::Sender<Outgoing>,
    waiting: Arc<Mutex<Waiting>>,
    next_serial: AtomicU32,
    ended: CancellationToken,
    tasks: [AbortHandle; 2],
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    /// Follows them.
    descriptor: Option<OwnedFd>,
}

#[derive(Debug)]
enum Waiting {
    Open(HashMap<u32, oneshot::Sender<Result<Vec<u8>, Refusal>>>),
    Lost { reason: String },
}

/// A call and what to call it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Procedure {
    pub(super) program: Program,
    pub(super) number: u32,
    /// For errors.
    pub(super) name: &'static str,
}

pub(super) const fn remote(number: u32, name: &'static str) -> Procedure {
    Procedure {
        program: Program::Remote,
        number,
        name,
    }
}

pub(super) const fn qemu(number: u32, name: &'static str) -> Procedure {
    Procedure {
        program: Program::Qemu,
        number,
        name,
    }
}

impl Connection {
    /// Connects, and opens what `uri` means.
    pub(super) async fn open(uri: &Uri, ears: Option<Ears>) -> Result<Self, LibvirtError> {
        let path = uri.socket();
        let connected = socket::connect(&path, CONNECT_LIMIT).await;
        let stream = connected.map_err(|source| LibvirtError::Connect {
            socket: path,
            source,
        })?;
        let connection = Self::over(stream, ears);
        connection.log_in().await?;
        let arguments = Writer::default().some_text(uri.name()).number(0).done();
        connection
            .call(remote(OPEN, "to open the connection"), arguments)
            .await?;
        Ok(connection)
    }

    fn over(stream: UnixStream, ears: Option<Ears>) -> Self {
        let (reader, writer) = stream.into_split();
        let waiting = Arc::new(Mutex::new(Waiting::Open(HashMap::new())));
        let (calls, queue) = mpsc::channel(CALLS_QUEUED);
        let ended = CancellationToken::new();
        // A writer of its own: a caller that goes away in mid-call must not leave half a message.
        let write = tokio::spawn(write_calls(writer, queue, waiting.clone(), ended.clone()));
        let read = tokio::spawn(read_messages(
            BufReader::new(reader),
            ears,
            waiting.clone(),
            ended.clone(),
        ));
        Self {
            calls,
            waiting,
            next_serial: AtomicU32::new(1),
            ended,
            tasks: [write.abort_handle(), read.abort_handle()],
        }
    }

    /// Root, and whom the socket's group lets in, are mostly let in without; polkit is asked by the daemon itself.
    async fn log_in(&self) -> Result<(), LibvirtError> {
        let list = remote(AUTH_LIST, "for the ways to log in");
        let answer = self.call(list, Vec::new()).await?;
        let mut reader = Reader::new(&answer);
        let count = reader.number()?.min(LOGINS_CAP);
        let ways: Result<Vec<u32>, _> = (0..count).map(|_| reader.number()).collect();
        let ways = ways?;
        if ways.is_empty() || ways.contains(&NO_LOGIN) {
            return Ok(());
        }
        if !ways.contains(&POLKIT) {
            return Err(LibvirtError::Login);
        }
        let ask = remote(AUTH_POLKIT, "to be let in by polkit");
        match self.call(ask, Vec::new()).await {
            Err(LibvirtError::Refused { .. }) => Err(LibvirtError::Login),
            answer => answer.map(drop),
        }
    }

    /// Calls, and gives the daemon its usual time.
    pub(super) async fn call(
        &self,
        procedure: Procedure,
        arguments: Vec<u8>,
    ) -> Result<Vec<u8>, LibvirtError> {
        self.call_within(CALL_LIMIT, procedure, arguments).await
    }

    /// Calls, and gives the daemon so much time. The call may still be carried out later.
    pub(super) async fn call_within(
        &self,
        limit: Duration,
        procedure: Procedure,
        arguments: Vec<u8>,
    ) -> Result<Vec<u8>, LibvirtError> {
        let answer = timeout(limit, self.call_with(procedure, arguments, None)).await;
        answer.unwrap_or(Err(LibvirtError::Silent {
            what: procedure.name,
            seconds: limit.as_secs(),
        }))
    }

    /// Calls, and gives the daemon all the time that it takes.
    pub(super) async fn call_with(
        &self,
        procedure: Procedure,
        arguments: Vec<u8>,
        descriptor: Option<OwnedFd>,
    ) -> Result<Vec<u8>, LibvirtError> {
        let serial = self.next_serial.fetch_add(1, Ordering::Relaxed);
        let Procedure {
            program,
            number,
            name,
        } = procedure;
        let descriptors = u32::from(descriptor.is_some());
        let bytes = message::call(program, number, serial, &arguments, descriptors);
        let (sender, answer) = oneshot::channel();
        match &mut *lock(&self.waiting) {
            Waiting::Open(waiting) => {
                // Of those who went away: nobody else takes them out.
                waiting.retain(|_, waiter| !waiter.is_closed());
                waiting.insert(serial, sender);
            }
            // Without a sender, the answer below is that the connection is lost.
            Waiting::Lost { .. } => drop(sender),
        }
        let call = Outgoing { bytes, descriptor };
        self.calls.send(call).await.map_err(|_| self.gone())?;
        match answer.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Refusal { code, message })) => Err(LibvirtError::Refused {
                what: name,
                code,
                message,
            }),
            Err(_) => Err(self.gone()),
        }
    }

    /// Waits until the connection is gone.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Whether it is gone.
    pub(super) fn is_lost(&self) -> bool {
        matches!(*lock(&self.waiting), Waiting::Lost { .. })
    }

    fn gone(&self) -> LibvirtError {
        let reason = match &*lock(&self.waiting) {
            Waiting::Lost { reason } => reason.clone(),
            Waiting::Open(_) => "its tasks ended".into(),
        };
        LibvirtError::Lost { reason }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn write_calls(
    mut writer: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Outgoing>,
    waiting: Arc<Mutex<Waiting>>,
    ended: CancellationToken,
) {
    while let Some(Outgoing { bytes, descriptor }) = queue.recv().await {
        let sent = async {
            writer.write_all(&bytes).await?;
            match descriptor {
                Some(descriptor) => send_descriptor(&writer, &descriptor).await,
                None => Ok(()),
            }
        };
        if let Err(error) = sent.await {
            lose(&waiting, with_causes(&error));
            ended.cancel();
            return;
        }
    }
}

/// With one byte that means nothing, as `virNetSocketSendFD` has it.
async fn send_descriptor(writer: &OwnedWriteHalf, descriptor: &OwnedFd) -> io::Result<()> {
    match socket::send_with(writer.as_ref(), &[0], descriptor.as_fd()).await? {
        1 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

async fn read_messages(
    mut reader: BufReader<OwnedReadHalf>,
    ears: Option<Ears>,
    waiting: Arc<Mutex<Waiting>>,
    ended: CancellationToken,
) {
    let reason = loop {
        let message = match read_message(&mut reader).await {
            Ok(message) => message,
            Err(error) => break with_causes(&error),
        };
        match Incoming::parse(&message) {
            Ok(Incoming::Answer { serial, result }) => {
                let waiter = match &mut *lock(&waiting) {
                    Waiting::Open(waiting) => waiting.remove(&serial),
                    Waiting::Lost { .. } => return,
                };
                if let Some(waiter) = waiter {
                    // A waiter that has gone needs no answer.
                    let _ = waiter.send(result.map(<[u8]>::to_vec));
                }
            }
            Ok(Incoming::Notice(notice)) => {
                if let Some(ears) = &ears {
                    ears.hear(notice);
                }
            }
            Ok(Incoming::Other) => {}
            Err(error) => {
                break format!("it sent what cannot be understood: {}", with_causes(&error));
            }
        }
    };
    lose(&waiting, reason);
    ended.cancel();
}

async fn read_message(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Vec<u8>> {
    let mut first = [0; 4];
    match reader.read_exact(&mut first).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(io::Error::other("libvirt closed it"));
        }
        read => drop(read?),
    }
    let length = message::length(first).map_err(io::Error::other)?;
    // Not made as large as it is said to be before so much has come.
    let mut message = Vec::new();
    let read = reader.take(length as u64).read_to_end(&mut message).await?;
    match read == length {
        true => Ok(message),
        false => Err(io::Error::other(
            "libvirt closed it in the middle of a message",
        )),
    }
}

impl Ears {
    fn hear(&self, notice: Notice) {
        match notice {
            Notice::Event(event) => {
                tracing::debug!(target: "fleecebox::qmp", "event {} {}", event.name, event.data);
                if let Some(events) = self.events.upgrade() {
                    // Without subscribers there is nobody to tell.
                    let _ = events.send(event);
                }
            }
            Notice::Stopped => self.stopped.cancel(),
        }
    }
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
