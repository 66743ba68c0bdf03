//! The one place of this module that opens a path: the unix socket of a monitor or of an agent.

use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

/// Pause between two tries while the listener's backlog is full.
const RETRY: Duration = Duration::from_millis(50);

/// Connects; a full backlog (`EAGAIN`, see unix(7)) is tried again until `limit` is over.
pub(super) async fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + limit;
    loop {
        match UnixStream::connect(path).await {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                sleep(RETRY).await;
            }
            result => return result,
        }
    }
}
