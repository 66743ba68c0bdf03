//! One NBD connection that is asked one thing at a time, so that the answer always fits into the socket.
//!
//! QEMU's main loop drains a disk for a bitmap, a job or a reset, and a drain waits until every reply of every export of
//! that disk has been sent. A client that stops reading (SIGSTOP, a frozen cgroup, a debugger, a machine short of
//! processor time) with more asked for than the socket takes would thus stop the monitor, the guest's writes and at last
//! its processors, for as long as it does not read; not even its `shutdown` of the socket ends that, as QEMU 10.0.2 waits
//! for room in it. Nothing that this process could do later helps, so nothing larger is ever asked for.

use crate::buffer::Buffer;
use crate::extent::Extent;
use crate::nbd::{self, Connection};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Longest answer, in bytes. What QEMU sends waits in its end of the socket, for which Linux gives 208 KiB
/// (`net.core.wmem_default`), its own book-keeping included; QEMU from 10.1 on asks for more.
pub const REPLY: u64 = 128 << 10;

/// Longest wait for one answer. Storage that is slower than this under a copy of at most a few MiB is gone; the guest's
/// own drivers give up sooner.
const REQUEST_TIME: Duration = Duration::from_secs(180);

/// A connection and the turn to ask.
#[derive(Debug, Clone)]
pub struct Lane {
    connection: Connection,
    turn: Arc<Mutex<()>>,
}

impl Lane {
    /// Nothing else may use `connection`.
    pub fn new(connection: Connection) -> Self {
        Self {
            connection,
            turn: Arc::default(),
        }
    }

    /// What the server said about the export.
    pub fn info(&self) -> &nbd::ExportInfo {
        self.connection.info()
    }

    /// Reads `extent`, by one answer after the other.
    pub async fn read(&self, extent: Extent) -> Result<Buffer, nbd::Error> {
        self.ask(move |connection| async move {
            let mut bytes = Buffer::for_bytes(extent.len() as usize);
            for piece in extent.pieces(REPLY) {
                let before = std::mem::take(&mut *bytes);
                *bytes = in_time(&connection, connection.read(piece, before)).await?;
            }
            Ok(bytes)
        })
        .await
    }

    /// What the meta context of the connection says about `extent`, which has at most [`REPLY`] bytes' worth of runs.
    pub async fn block_status(&self, extent: Extent) -> Result<Vec<nbd::StatusRun>, nbd::Error> {
        self.ask(move |connection| async move {
            in_time(&connection, connection.block_status(extent)).await
        })
        .await
    }

    /// As [`Connection::trim`].
    pub async fn trim(&self, extent: Extent) -> Result<(), nbd::Error> {
        self.ask(
            move |connection| async move { in_time(&connection, connection.trim(extent)).await },
        )
        .await
    }

    /// Closes the connection; whoever still waits for an answer gets an error at once.
    pub async fn disconnect(&self) {
        self.connection.clone().disconnect().await;
    }

    /// Waits for the turn and asks. Whoever asked may go away meanwhile; the turn ends with the answer all the same.
    async fn ask<T, F>(&self, requests: impl FnOnce(Connection) -> F) -> Result<T, nbd::Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, nbd::Error>> + Send + 'static,
    {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let requests = requests(self.connection.clone());
        let answered = tokio::spawn(async move {
            let answer = requests.await;
            drop(turn);
            answer
        });
        answered.await.map_err(io::Error::other)?
    }
}

/// The answer to one request on `connection`, which is given up where it takes too long.
async fn in_time<T>(
    connection: &Connection,
    request: impl Future<Output = Result<T, nbd::Error>>,
) -> Result<T, nbd::Error> {
    match tokio::time::timeout(REQUEST_TIME, request).await {
        Ok(answer) => answer,
        Err(_) => {
            // The answer may still come, so that nothing more may be asked.
            connection.clone().disconnect().await;
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "QEMU did not answer a request in time",
            )
            .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// Header of a structured or extended reply chunk and the offset in it.
    const HEADER: usize = 32 + 8;

    #[test]
    fn the_longest_answer_fits_into_a_socket_that_nobody_reads() {
        let (mut server, _client) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let answer = vec![0; HEADER + REPLY as usize];
        server.write_all(&answer).unwrap();
        // Half as much more is what it could not take: the bound is not far from what there is.
        assert!(server.write_all(&answer[HEADER..]).is_err());
    }
}
