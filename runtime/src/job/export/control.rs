//! The socket on which a held export is told how it ends: one line each way.

use super::{Ended, ExportError, Verdict};
use crate::contract::with_causes;
use cap_std::fs::Dir;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// In the VM's state folder, while an export is held: who connects to it says how it ends.
pub const CONTROL: &str = "export.sock";

/// How long one who connects may take to say so.
const SAY: Duration = Duration::from_secs(5);

/// Longest line on the control socket, in bytes.
const LINE: u64 = 64;

/// The answer on the control socket, as one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// What became of the bitmaps.
    pub verdict: Verdict,
    /// Why it is not what was asked for.
    pub error: Option<String>,
    /// Clean-up that failed; the next run does it.
    pub left: Vec<String>,
}

/// Where a held export is told how it ends.
pub(super) struct Control {
    listener: UnixListener,
    /// Who said it, and waits for the answer.
    asker: tokio::sync::Mutex<Option<UnixStream>>,
}

impl Control {
    /// In the VM's state folder, under its lock: a socket that is there already is a dead export's.
    pub(super) fn listen(folder: &Dir, path: &Path) -> Result<Self, ExportError> {
        let _ = folder.remove_file(CONTROL);
        let listener = UnixListener::bind(through(folder));
        Ok(Self {
            listener: listener.map_err(|source| ExportError::Control {
                path: path.join(CONTROL),
                source,
            })?,
            asker: tokio::sync::Mutex::new(None),
        })
    }

    /// What the first one says who says something that makes sense.
    pub(super) async fn wait(&self) -> Verdict {
        loop {
            let Ok((stream, _)) = self.listener.accept().await else {
                tokio::time::sleep(SAY).await;
                continue;
            };
            let mut line = String::new();
            let mut reader = BufReader::new(stream);
            let said = timeout(SAY, (&mut reader).take(LINE).read_line(&mut line)).await;
            if let (Ok(Ok(_)), Ok(verdict)) = (said, serde_json::from_str(&line)) {
                *self.asker.lock().await = Some(reader.into_inner());
                return verdict;
            }
        }
    }

    pub(super) async fn answer(&self, ended: &Result<Ended, ExportError>) {
        let Some(mut asker) = self.asker.lock().await.take() else {
            return;
        };
        let answer = match ended {
            Ok(ended) => Answer {
                verdict: ended.verdict,
                error: None,
                left: ended.left.clone(),
            },
            Err(error) => Answer {
                verdict: Verdict::Failure,
                error: Some(with_causes(error)),
                left: Vec::new(),
            },
        };
        // Who does not wait for it does not need it.
        if let Ok(mut line) = serde_json::to_vec(&answer) {
            line.push(b'\n');
            let _ = timeout(SAY, asker.write_all(&line)).await;
        }
    }

    pub(super) fn close(self, folder: &Dir) {
        let _ = folder.remove_file(CONTROL);
    }
}

/// The socket in `folder`, by a path that is short enough for a socket whatever the folder's is.
fn through(folder: &Dir) -> PathBuf {
    format!("/proc/self/fd/{}/{CONTROL}", folder.as_raw_fd()).into()
}

/// Tells the export that is held by the VM of the state folder `folder` how it ends, and waits until it has.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] and [`io::ErrorKind::ConnectionRefused`] where none is held; otherwise the export's
/// process ended without an answer.
pub async fn end(folder: &Dir, verdict: Verdict) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(through(folder)).await?;
    let mut line = serde_json::to_vec(&verdict)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    match answer.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(serde_json::from_slice(&answer)?),
    }
}
