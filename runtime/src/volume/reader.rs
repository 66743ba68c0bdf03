//! Reads and trims of one frozen disk, spread over several NBD connections.

use super::bandwidth::Bandwidth;
use crate::extent::Extent;
use crate::nbd::{self, Connection};
use futures_util::future::try_join_all;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections per disk. Two to four are best on two cores; more only queue in QEMU's one main loop.
const CONNECTIONS: usize = 4;

/// Length of one request, in bytes. Requests of 256 KiB to 1 MiB are best; 4 MiB halves the speed.
pub const PIECE: u64 = 1 << 20;

/// Bytes of one disk that are read but not stored yet. Enough for four requests on each connection; it bounds the
/// job's memory, since whoever reads holds a [`Permit`] until the bytes are gone.
const IN_FLIGHT: usize = 24 << 20;

/// Longest wait for one answer. Storage that is slower than this under a copy of at most a few MiB is gone; the guest's
/// own drivers give up sooner.
const REQUEST_TIME: Duration = Duration::from_secs(180);

/// The right to hold some bytes of the disk in memory; kept until these are stored or dropped.
pub type Permit = OwnedSemaphorePermit;

/// One frozen disk behind an NBD export. Requests run side by side.
#[derive(Debug)]
pub struct Reader {
    connections: Vec<Connection>,
    next: AtomicUsize,
    in_flight: Arc<Semaphore>,
    bandwidth: Option<Arc<Bandwidth>>,
}

impl Reader {
    /// Connects to `export` of the NBD server on the unix socket `socket`. Bytes are read within `bandwidth`.
    pub async fn connect(
        socket: &Path,
        export: &str,
        bandwidth: Option<Arc<Bandwidth>>,
    ) -> Result<Self, nbd::Error> {
        let first = connect(socket, export, None).await?;
        // Without multi-conn a flush or trim on one connection says nothing about the others.
        let wanted = if first.info().can_multi_conn {
            CONNECTIONS
        } else {
            1
        };
        let mut connections = vec![first];
        while connections.len() < wanted {
            connections.push(connect(socket, export, None).await?);
        }
        Ok(Self {
            connections,
            next: AtomicUsize::new(0),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
            bandwidth,
        })
    }

    /// Size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.connections[0].info().size
    }

    /// Waits until `length` more bytes may be held in memory. A length beyond the bound waits for all of it.
    pub async fn permit(&self, length: u64) -> Permit {
        let amount = length.min(IN_FLIGHT as u64) as u32;
        Arc::clone(&self.in_flight)
            .acquire_many_owned(amount)
            .await
            .expect("the semaphore is never closed")
    }

    /// The bytes of `extent`, exactly as many.
    pub async fn read(&self, extent: Extent) -> Result<Vec<u8>, nbd::Error> {
        if extent.len() <= PIECE {
            return self.read_piece(extent).await;
        }
        let pieces = try_join_all(extent.pieces(PIECE).map(|piece| self.read_piece(piece))).await?;
        Ok(pieces.concat())
    }

    async fn read_piece(&self, extent: Extent) -> Result<Vec<u8>, nbd::Error> {
        self.read_from(self.connection(), extent).await
    }

    /// Reads on the connection that was made first: the one whose life proves that the snapshot was never replaced.
    pub async fn read_on_first(&self, extent: Extent) -> Result<Vec<u8>, nbd::Error> {
        self.read_from(&self.connections[0], extent).await
    }

    /// The one place where bytes of a volume come in.
    async fn read_from(&self, from: &Connection, extent: Extent) -> Result<Vec<u8>, nbd::Error> {
        if let Some(bandwidth) = &self.bandwidth {
            bandwidth.take(extent.len()).await;
        }
        in_time(from.read(extent, Vec::new())).await
    }

    /// Gives `extent` of the fleecing image back. All reads of it must have ended: a trim that overtakes a read
    /// makes it return zeroes.
    pub async fn trim(&self, extent: Extent) -> Result<(), nbd::Error> {
        if self.connections[0].info().can_trim {
            in_time(self.connection().trim(extent)).await?;
        }
        Ok(())
    }

    /// Closes every connection; whoever still waits for an answer gets an error at once.
    pub async fn disconnect(&self) {
        for connection in &self.connections {
            connection.clone().disconnect().await;
        }
    }

    fn connection(&self) -> &Connection {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &self.connections[turn % self.connections.len()]
    }
}

/// Waits for an answer for [`REQUEST_TIME`].
pub(super) async fn in_time<T>(
    request: impl Future<Output = Result<T, nbd::Error>>,
) -> Result<T, nbd::Error> {
    match tokio::time::timeout(REQUEST_TIME, request).await {
        Ok(answered) => answered,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "QEMU did not answer a request in time",
        )
        .into()),
    }
}

/// One connection, with at most one meta context: QEMU's server breaks when it is asked for two.
pub async fn connect(
    socket: &Path,
    export: &str,
    context: Option<&str>,
) -> Result<Connection, nbd::Error> {
    let stream = UnixStream::connect(socket).await?;
    Connection::connect(stream, export, context).await
}
