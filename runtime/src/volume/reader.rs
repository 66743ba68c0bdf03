//! Reads and trims of one frozen disk, spread over several NBD connections.

use super::bandwidth::Bandwidth;
use super::lane::Lane;
use crate::buffer::Buffer;
use crate::extent::Extent;
use crate::nbd::{self, Connection};
use futures_util::future::try_join_all;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections per disk, each of which waits for one answer at a time ([`super::lane`]). More only queue in QEMU's one
/// main loop.
const CONNECTIONS: usize = 8;

/// Connections that a whole job reads by, one for each disk at least. QEMU's server takes 100 (`nbd-server-start`), and it
/// may serve others too; whoever connects beyond that waits until another leaves.
const ALL_CONNECTIONS: usize = 64;

/// Connections beside them by which a whole job asks what is dirty and zero, one for each disk at least.
const ALL_ASKING: usize = 24;

/// Bytes that are best read together: by one connection, into one place, while the others do the same.
pub const PIECE: u64 = 1 << 20;

/// Bytes of one disk that are read but not stored yet. More than the
/// connections hold; it bounds the job's memory, since what is stored is read under a
/// [`Permit`], which is held until the bytes are gone. What is read ahead for the provider has a bound of its own.
const IN_FLIGHT: usize = 24 << 20;

/// The right to hold some bytes of the disk in memory; kept until these are stored or dropped.
pub type Permit = OwnedSemaphorePermit;

/// One frozen disk behind an NBD export. Requests run side by side.
#[derive(Debug)]
pub struct Reader {
    lanes: Vec<Lane>,
    next: AtomicUsize,
    in_flight: Arc<Semaphore>,
    bandwidth: Option<Arc<Bandwidth>>,
}

impl Reader {
    /// Connects to `export` of the NBD server on the unix socket `socket`, for a job that reads so many `disks` side by
    /// side. Bytes are read within `bandwidth`.
    pub async fn connect(
        socket: &Path,
        export: &str,
        disks: usize,
        bandwidth: Option<Arc<Bandwidth>>,
    ) -> Result<Self, nbd::Error> {
        let first = connect(socket, export, None).await?;
        // Without multi-conn a flush or trim on one connection says nothing about the others.
        let wanted = if first.info().can_multi_conn {
            share(ALL_CONNECTIONS, disks)
        } else {
            1
        };
        let mut lanes = vec![first];
        while lanes.len() < wanted {
            lanes.push(connect(socket, export, None).await?);
        }
        Ok(Self {
            lanes,
            next: AtomicUsize::new(0),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
            bandwidth,
        })
    }

    /// Size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.lanes[0].info().size
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
    pub async fn read(&self, extent: Extent) -> Result<Buffer, nbd::Error> {
        self.read_over(&self.lanes, extent).await
    }

    /// Reads on the connection that was made first: the one whose life proves that the snapshot was never replaced.
    pub async fn read_on_first(&self, extent: Extent) -> Result<Buffer, nbd::Error> {
        self.read_over(&self.lanes[..1], extent).await
    }

    async fn read_over(&self, lanes: &[Lane], extent: Extent) -> Result<Buffer, nbd::Error> {
        if extent.len() <= PIECE {
            return self.read_from(self.turn(lanes), extent).await;
        }
        let pieces = extent.pieces(PIECE);
        let pieces = pieces.map(|piece| self.read_from(self.turn(lanes), piece));
        let mut bytes = Buffer::for_bytes(extent.len() as usize);
        for piece in try_join_all(pieces).await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// The one place where bytes of a volume come in.
    async fn read_from(&self, lane: &Lane, extent: Extent) -> Result<Buffer, nbd::Error> {
        if let Some(bandwidth) = &self.bandwidth {
            bandwidth.take(extent.len()).await;
        }
        lane.read(extent).await
    }

    /// Gives `extent` of the fleecing image back. All reads of it must have ended: a trim that overtakes a read
    /// makes it return zeroes.
    pub async fn trim(&self, extent: Extent) -> Result<(), nbd::Error> {
        if self.lanes[0].info().can_trim {
            self.turn(&self.lanes).trim(extent).await?;
        }
        Ok(())
    }

    /// Closes every connection; whoever still waits for an answer gets an error at once.
    pub async fn disconnect(&self) {
        for lane in &self.lanes {
            lane.disconnect().await;
        }
    }

    /// Each in its turn: as QEMU answers in the order of the requests, none of them waits for long.
    fn turn<'a>(&self, lanes: &'a [Lane]) -> &'a Lane {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &lanes[turn % lanes.len()]
    }
}

/// Connections by which one of `disks` is asked what is dirty and zero.
pub fn asking(disks: usize) -> usize {
    share(ALL_ASKING, disks)
}

fn share(all: usize, disks: usize) -> usize {
    (all / disks.max(1)).clamp(1, CONNECTIONS)
}

/// One connection, with at most one meta context: QEMU's server breaks when it is asked for two.
pub async fn connect(
    socket: &Path,
    export: &str,
    context: Option<&str>,
) -> Result<Lane, nbd::Error> {
    let stream = UnixStream::connect(socket).await?;
    let connection = Connection::connect(stream, export, context).await?;
    Ok(Lane::new(connection))
}
