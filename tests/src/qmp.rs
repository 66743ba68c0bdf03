//! A blocking QMP client: one command at a time, unknown fields and events kept as JSON.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// No command that tests give takes a fraction of this.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The monitor sockets of one QEMU. Each serves one client at a time and makes others wait, hence
/// one for each purpose.
#[derive(Clone, Debug)]
pub struct Monitors {
    /// For the product, directly or through a [`Proxy`](crate::Proxy).
    pub product: PathBuf,
    /// For the test itself.
    pub control: PathBuf,
    /// For the proxy's own commands.
    pub(crate) references: PathBuf,
}

impl Monitors {
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self {
            product: folder.join("qmp.sock"),
            control: folder.join("control.sock"),
            references: folder.join("references.sock"),
        }
    }

    /// Names for the command line, each with its socket.
    pub(crate) fn sockets(&self) -> [(&'static str, &Path); 3] {
        [
            ("product", &self.product),
            ("control", &self.control),
            ("references", &self.references),
        ]
    }
}

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused the command.
    #[error("{command} refused: {description} ({class})")]
    Refused {
        /// The command's name.
        command: String,
        /// QEMU's error class, for example `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// No answer or event within the limit.
    #[error("no {wanted} within {limit:?}")]
    TimedOut {
        /// What was waited for.
        wanted: String,
        /// For how long.
        limit: Duration,
    },
    /// The other side is gone.
    #[error("QEMU closed the monitor")]
    Closed,
    /// What came is no JSON object or no greeting.
    #[error("not QMP: {0}")]
    NotQmp(String),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A connection to a monitor, ready for commands.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves the negotiation mode.
    ///
    /// # Errors
    /// When nobody listens, nobody greets within 30 s, or the greeting is not QMP's.
    pub fn connect(socket: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(socket)?;
        let mut qmp = Self {
            stream,
            unread: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp.message("greeting", Instant::now() + ANSWER_LIMIT, ANSWER_LIMIT)?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::NotQmp(greeting.to_string()));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives a command and waits for its answer; events that come meanwhile are kept.
    ///
    /// # Errors
    /// [`QmpError::Refused`] when QEMU says so, the others when the connection fails.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let line = json!({"execute": command, "arguments": arguments});
        self.stream.write_all(format!("{line}\n").as_bytes())?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut message = self.message(command, deadline, ANSWER_LIMIT)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(result) = message.get_mut("return") {
                return Ok(result.take());
            } else {
                let text = |field: &str| {
                    message["error"][field]
                        .as_str()
                        .unwrap_or("not said")
                        .to_string()
                };
                return Err(QmpError::Refused {
                    command: command.into(),
                    class: text("class"),
                    description: text("desc"),
                });
            }
        }
    }

    /// The first event, of those kept and those to come, that `wanted` accepts; earlier ones are
    /// dropped. `name` is for the error.
    ///
    /// # Errors
    /// [`QmpError::TimedOut`] after `limit`, or when the connection fails.
    pub fn event(
        &mut self,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.message(name, deadline, limit)?,
            };
            if event["event"] == name && wanted(&event) {
                return Ok(event);
            }
        }
    }

    /// The process that listens on the other side.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn peer_pid(&self) -> Result<u32, QmpError> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream).map_err(io::Error::from)?;
        Ok(peer.pid.as_raw_nonzero().get().unsigned_abs())
    }

    fn message(
        &mut self,
        wanted: &str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map_err(|_| QmpError::NotQmp(String::from_utf8_lossy(&line).into_owned()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::TimedOut {
                    wanted: wanted.into(),
                    limit,
                });
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(length) => self.unread.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
