//! A blocking client of the QEMU guest agent.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// Sent before, and expected before, the answer to `guest-sync-delimited`.
const DELIMITER: u8 = 0xff;

/// Why the agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent refused the command.
    #[error("the guest agent refused {command}: {description}")]
    Refused {
        /// The command's name.
        command: String,
        /// The agent's own words.
        description: String,
    },
    /// An answer that is no JSON, or not the one to the question.
    #[error("unexpected answer of the guest agent: {0}")]
    Unexpected(String),
    /// No agent behind the socket, or none that answers in time.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What `guest-fsfreeze-status` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeStatus {
    /// All file systems take writes.
    Thawed,
    /// Writes wait.
    Frozen,
}

/// A connection to the agent. QEMU serves one at a time: keep it short while the product runs.
#[derive(Debug)]
pub struct Agent {
    stream: BufReader<UnixStream>,
}

impl Agent {
    /// Connects and discards whatever an earlier client left unread (`guest-sync-delimited`).
    ///
    /// # Errors
    /// When no agent answers within `limit`, which then also holds for each command.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self, AgentError> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        let mut agent = Self {
            stream: BufReader::new(stream),
        };
        let id = std::process::id();
        agent.stream.get_mut().write_all(&[DELIMITER])?;
        agent.send(&json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}))?;
        let mut stale = Vec::new();
        agent.stream.read_until(DELIMITER, &mut stale)?;
        let answer = agent.receive()?;
        if answer["return"] != id {
            return Err(AgentError::Unexpected(answer.to_string()));
        }
        Ok(agent)
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the agent says so, the others when it cannot be asked.
    pub fn execute(&mut self, command: &str) -> Result<Value, AgentError> {
        self.send(&json!({"execute": command}))?;
        let mut answer = self.receive()?;
        match answer.get_mut("return") {
            Some(result) => Ok(result.take()),
            None => Err(AgentError::Refused {
                command: command.into(),
                description: answer["error"]["desc"]
                    .as_str()
                    .unwrap_or("not said")
                    .into(),
            }),
        }
    }

    /// Whether writes wait.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub fn freeze_status(&mut self) -> Result<FreezeStatus, AgentError> {
        let answer = self.execute("guest-fsfreeze-status")?;
        match answer.as_str() {
            Some("thawed") => Ok(FreezeStatus::Thawed),
            Some("frozen") => Ok(FreezeStatus::Frozen),
            _ => Err(AgentError::Unexpected(answer.to_string())),
        }
    }

    fn send(&mut self, message: &Value) -> Result<(), AgentError> {
        Ok(self
            .stream
            .get_mut()
            .write_all(format!("{message}\n").as_bytes())?)
    }

    fn receive(&mut self) -> Result<Value, AgentError> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        serde_json::from_str(&line).map_err(|_| AgentError::Unexpected(line))
    }
}
