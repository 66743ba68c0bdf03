//! The QEMU guest agent: freeze and thaw of the guest's file systems.
//!
//! Its answers come from the guest and are never believed further than "it says so": they are capped
//! in length and time, and nothing but the time of the point in time depends on them.

use super::address::Address;
use super::libvirt::{self, Domain, LibvirtError};
use super::line::{self, Read};
use super::socket;
use fleecebox_contract::with_causes;
use qapi::qga::{
    QgaCommand, guest_fsfreeze_freeze, guest_fsfreeze_status, guest_fsfreeze_thaw,
    guest_sync_delimited,
};
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, sleep, timeout};

/// Most bytes taken from the guest for one answer, rubbish before it included. Real answers to the
/// commands used here have less than 200.
const ANSWER_CAP: usize = 256 << 10;

/// Most characters of a guest's error message that are passed on.
const MESSAGE_CAP: usize = 200;

/// Pause between two looks at whether the guest has thawed.
const PAUSE: Duration = Duration::from_millis(100);

/// Sent before, and returned before the answer of, `guest-sync-delimited`: no byte of JSON.
const SYNC_MARK: u8 = 0xff;

/// How long the agent may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For an answer to what needs no work.
    pub answer: Duration,
    /// For freezing, which writes the guest's caches out.
    pub freeze: Duration,
    /// For thawing, however often it has to be asked.
    pub thaw: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(5),
            freeze: Duration::from_secs(30),
            thaw: Duration::from_secs(60),
        }
    }
}

/// Whether the guest's file systems are to be frozen at the point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Freeze {
    /// There is no backup without; the default, where the VM has an agent
    #[default]
    Required,
    /// An agent that does not answer or refuses is told of and done without
    IfAvailable,
    /// The agent is not asked
    Never,
}

/// Why the agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket cannot be connected to.
    #[error("cannot connect to the agent socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("the connection to the guest agent failed")]
    Io(#[from] io::Error),
    /// QEMU closed the connection.
    #[error("the connection to the guest agent was closed")]
    Closed,
    /// The agent did not answer in time; it may carry the command out later.
    #[error("the guest agent did not answer {command} within {} s", .limit.as_secs_f32())]
    Silent {
        /// The command.
        command: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The agent answered with an error.
    #[error("the guest agent refused {command}: {description}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Whether the agent has the command at all, and allows it.
        known: bool,
        /// The guest's words: shortened, control characters escaped.
        description: String,
    },
    /// What came is no answer to the command.
    #[error("the guest agent answered {command} with something else")]
    Nonsense {
        /// The command.
        command: &'static str,
    },
    /// More came than any answer needs.
    #[error("the guest agent sent more than {cap} bytes as the answer to {command}")]
    TooMuch {
        /// The command.
        command: &'static str,
        /// The cap.
        cap: usize,
    },
    /// libvirt, which has the agent's socket, did not pass the command on, or the agent refused it.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The guest does not say that it is thawed.
    #[error("the guest's file systems may still be frozen after {} s", .limit.as_secs_f32())]
    StillFrozen {
        /// How long it was tried.
        limit: Duration,
        /// What the last try met.
        source: Box<AgentError>,
    },
    /// It was asked to thaw, and nothing but its word is known.
    #[error("the agent says so")]
    SaysSo,
}

/// One connection to the guest agent's socket, which QEMU serves one client on, or the way there through libvirt.
#[derive(Debug)]
pub struct Agent {
    link: Link,
    limits: Limits,
    /// The next answer is the one to the next command. Not so after a time-out.
    in_step: bool,
}

#[derive(Debug)]
enum Link {
    Socket(BufReader<OwnedReadHalf>, OwnedWriteHalf),
    /// Which keeps the answers and the commands in step by itself.
    Libvirt(libvirt::Address, Domain),
}

impl Agent {
    /// Reaches the agent of a VM. Whether one listens in the guest shows with the first command.
    ///
    /// # Errors
    /// [`AgentError::Connect`], [`AgentError::Libvirt`].
    pub async fn reach(address: &Address, limits: Limits) -> Result<Self, AgentError> {
        match address {
            Address::Socket(path) => Self::connect(path, limits).await,
            Address::Libvirt(domain) => Ok(Self {
                link: Link::Libvirt(domain.clone(), Domain::find(domain).await?),
                limits,
                in_step: true,
            }),
        }
    }

    /// Connects to the socket at `path`. Whether an agent listens in the guest shows with the first command.
    ///
    /// # Errors
    /// [`AgentError::Connect`].
    pub async fn connect(path: &Path, limits: Limits) -> Result<Self, AgentError> {
        match socket::connect(path, limits.answer).await {
            Ok(stream) => Ok(Self::over(stream, limits)),
            Err(source) => Err(AgentError::Connect {
                path: path.into(),
                source,
            }),
        }
    }

    /// Talks over a connected socket.
    pub fn over(stream: UnixStream, limits: Limits) -> Self {
        let (reader, writer) = stream.into_split();
        Self {
            link: Link::Socket(BufReader::new(reader), writer),
            limits,
            in_step: false,
        }
    }

    /// Freezes the guest's file systems; returns how many the guest says it froze. A freeze that
    /// failed is thawed, since one that was given up may still happen.
    ///
    /// # Errors
    /// Why freezing failed; [`AgentError::StillFrozen`] where thawing after that failed too.
    pub async fn freeze(&mut self) -> Result<u64, AgentError> {
        if !self.in_step {
            // While the command was not sent there is nothing to thaw.
            self.sync().await?;
        }
        let limit = self.limits.freeze;
        let frozen = self.call(guest_fsfreeze_freeze {}, limit).await;
        let failure = match frozen.map(|count| count.as_u64()) {
            Ok(Some(count)) => return Ok(count),
            Ok(None) => AgentError::Nonsense {
                command: "guest-fsfreeze-freeze",
            },
            Err(e) => e,
        };
        self.thaw().await?;
        Err(failure)
    }

    /// Thaws, and asks until the guest says that it is thawed. Harmless where nothing is frozen.
    ///
    /// # Errors
    /// [`AgentError::StillFrozen`].
    pub async fn thaw(&mut self) -> Result<(), AgentError> {
        let limit = self.limits.thaw;
        let deadline = Instant::now() + limit;
        let mut last = AgentError::SaysSo;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match timeout(left, self.try_thaw()).await {
                Ok(Ok(true)) => return Ok(()),
                Ok(Ok(false)) => last = AgentError::SaysSo,
                Ok(Err(e @ (AgentError::Closed | AgentError::Io(_)))) => {
                    last = e;
                    break;
                }
                Ok(Err(e)) => last = e,
                Err(_) => {
                    self.in_step = false;
                    break;
                }
            }
            sleep(PAUSE).await;
        }
        let source = Box::new(last);
        Err(AgentError::StillFrozen { limit, source })
    }

    /// One thaw, and whether the guest then says that nothing is frozen. The agent works on one
    /// command at a time, so an earlier freeze is over when it answers.
    async fn try_thaw(&mut self) -> Result<bool, AgentError> {
        let limit = self.limits.answer;
        // Its answer does not matter: the status does.
        match self.call(guest_fsfreeze_thaw {}, limit).await {
            Err(e @ (AgentError::Closed | AgentError::Io(_))) => return Err(e),
            Err(e) => tracing::debug!("thaw: {}", with_causes(&e)),
            Ok(_) => {}
        }
        match self.call(guest_fsfreeze_status {}, limit).await {
            Ok(status) => Ok(status == "thawed"),
            // An agent that cannot tell has not frozen anything either.
            Err(AgentError::Refused { known: false, .. }) => Ok(true),
            Err(e) => Err(e),
        }
    }

    async fn call<C: QgaCommand>(
        &mut self,
        command: C,
        limit: Duration,
    ) -> Result<Value, AgentError> {
        if let Link::Libvirt(address, domain) = &mut self.link {
            return through_libvirt(address, domain, &command, limit).await;
        }
        if !self.in_step {
            self.sync().await?;
        }
        // Until the answer is here, nobody knows what comes next.
        self.in_step = false;
        let answer =
            timeout(limit, self.exchange(&command))
                .await
                .unwrap_or(Err(AgentError::Silent {
                    command: C::NAME,
                    limit,
                }));
        self.in_step = matches!(answer, Ok(_) | Err(AgentError::Refused { .. }));
        answer
    }

    async fn exchange<C: QgaCommand>(&mut self, command: &C) -> Result<Value, AgentError> {
        self.send(&[], command).await?;
        let mut budget = ANSWER_CAP;
        let line = self.receive(b'\n', &mut budget, C::NAME).await?;
        read_answer(C::NAME, &line)
    }

    /// `guest-sync-delimited`: skips everything up to the answer to a random number of ours.
    async fn sync(&mut self) -> Result<(), AgentError> {
        const NAME: &str = "guest-sync-delimited";
        let limit = self.limits.answer;
        // Positive and below 2^53, so that no JSON parser on the way can bend it.
        let id = getrandom::u64().map_err(io::Error::other)? >> 11;
        let search = async {
            let command = guest_sync_delimited { id: id as i64 };
            self.send(&[SYNC_MARK], &command).await?;
            let mut budget = ANSWER_CAP;
            loop {
                self.receive(SYNC_MARK, &mut budget, NAME).await?;
                let line = self.receive(b'\n', &mut budget, NAME).await?;
                let answer: Option<Value> = serde_json::from_slice(&line).ok();
                if answer.is_some_and(|answer| answer["return"] == id) {
                    return Ok(());
                }
            }
        };
        timeout(limit, search)
            .await
            .unwrap_or(Err(AgentError::Silent {
                command: NAME,
                limit,
            }))?;
        self.in_step = true;
        Ok(())
    }

    async fn send<C: QgaCommand>(&mut self, before: &[u8], command: &C) -> io::Result<()> {
        let Link::Socket(_, writer) = &mut self.link else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let mut bytes = before.to_vec();
        bytes.extend(message(command)?.bytes());
        bytes.push(b'\n');
        writer.write_all(&bytes).await
    }

    async fn receive(
        &mut self,
        delimiter: u8,
        budget: &mut usize,
        command: &'static str,
    ) -> Result<Vec<u8>, AgentError> {
        let Link::Socket(reader, _) = &mut self.link else {
            return Err(AgentError::Closed);
        };
        let mut bytes = Vec::new();
        let read = line::read_until(reader, delimiter, *budget, &mut bytes).await?;
        *budget = budget.saturating_sub(bytes.len() + 1);
        match read {
            Read::Whole => Ok(bytes),
            Read::Closed => Err(AgentError::Closed),
            Read::TooLong => Err(AgentError::TooMuch {
                command,
                cap: ANSWER_CAP,
            }),
        }
    }
}

fn message<C: QgaCommand>(command: &C) -> io::Result<String> {
    let arguments = serde_json::to_value(command)?;
    Ok(json!({ "execute": C::NAME, "arguments": arguments }).to_string())
}

fn read_answer(command: &'static str, answer: &[u8]) -> Result<Value, AgentError> {
    match serde_json::from_slice(answer) {
        Ok(Value::Object(mut answer)) => match (answer.remove("return"), answer.get("error")) {
            (Some(value), _) => Ok(value),
            (None, Some(error)) => Err(refusal(command, error)),
            (None, None) => Err(AgentError::Nonsense { command }),
        },
        _ => Err(AgentError::Nonsense { command }),
    }
}

/// A daemon that was started again meanwhile has to be connected to anew.
async fn through_libvirt<C: QgaCommand>(
    address: &libvirt::Address,
    domain: &mut Domain,
    command: &C,
    limit: Duration,
) -> Result<Value, AgentError> {
    let message = message(command)?;
    if domain.is_lost() {
        *domain = Domain::find(address).await?;
    }
    match domain.agent_command(&message, limit).await {
        Ok(answer) if answer.len() > ANSWER_CAP => Err(AgentError::TooMuch {
            command: C::NAME,
            cap: ANSWER_CAP,
        }),
        Ok(answer) => read_answer(C::NAME, answer.as_bytes()),
        Err(LibvirtError::Refused { message, .. }) if lacks_command(&message) => {
            Err(AgentError::Refused {
                command: C::NAME,
                known: false,
                description: shown(&message),
            })
        }
        Err(error) => Err(error.into()),
    }
}

/// By the agent's own words, which are all of its answer that libvirt passes on.
fn lacks_command(message: &str) -> bool {
    ["has been disabled", "has not been found"]
        .iter()
        .any(|words| message.contains(words))
}

fn refusal(command: &'static str, error: &Value) -> AgentError {
    AgentError::Refused {
        command,
        // An agent that forbids a command says `CommandNotFound` too.
        known: error["class"] != "CommandNotFound",
        description: shown(error["desc"].as_str().unwrap_or_default()),
    }
}

fn shown(description: &str) -> String {
    let some = description.chars().take(MESSAGE_CAP);
    some.flat_map(char::escape_default).collect()
}
