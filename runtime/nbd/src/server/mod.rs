//! A server for [`Export`]s, on a unix socket: newstyle handshake, structured replies, block status, trim.
//!
//! It believes no client, and keeps them apart:
//! - nothing is allocated because a client said a length, but what its share of memory allows;
//! - each has a bounded number of requests under way and of bytes in memory; what is more is not read from its socket;
//! - a handshake, the rest of a request and the taking of a reply have to come to an end in time;
//! - places are bounded, for each user and in all; a newcomer gets that of who has been idle longest, if anybody has been
//!   for long. Nobody else is cut off for being idle: a VM over an image may be silent for hours.
//!
//! A client that breaks the protocol or leaves ends only its own connection.

mod negotiation;
mod places;
#[cfg(test)]
mod tests;
mod transmission;

use super::assembly::StatusRun;
use super::error::ErrorCode;
use fleecebox_contract::extent::Extent;
use places::{Place, Places};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use transmission::Transmission;

/// The meta context that every export has: what is allocated.
pub const ALLOCATION: &str = "base:allocation";
/// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`, of `base:allocation`.
pub const HOLE: u64 = 3;
/// Of `qemu:dirty-bitmap:…`.
pub const DIRTY: u64 = 1;

/// When no connection can be accepted for now (too many open files, say), so long until the next try.
const AGAIN: Duration = Duration::from_millis(100);

/// What a server has for its clients.
pub trait Export: Send + Sync + 'static {
    /// By which clients choose it.
    fn name(&self) -> &str;

    /// In bytes.
    fn size(&self) -> u64;

    /// What is best asked for, in bytes: a power of two from 512 to 32 MiB. Any range is served.
    fn preferred_block(&self) -> u32;

    /// Whether its space can be given back. One that cannot do that is read-only; neither can be written.
    fn can_trim(&self) -> bool;

    /// The meta contexts that it has; `base:allocation` is one.
    fn contexts(&self) -> Vec<String>;

    /// The bytes of a range that lies within it, exactly as many. Dropped where the client leaves.
    fn read(&self, extent: Extent) -> impl Future<Output = Result<Vec<u8>, Refused>> + Send;

    /// Gives back the space of a range that lies within it.
    fn trim(&self, extent: Extent) -> impl Future<Output = Result<(), Refused>> + Send;

    /// What one of its contexts says of a range that lies within it, from its start on: at least one run, and at most
    /// `most`, none beyond the range.
    fn status(
        &self,
        context: &str,
        extent: Extent,
        most: usize,
    ) -> impl Future<Output = Result<Vec<StatusRun>, Refused>> + Send;
}

/// Why an export does not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// For programs.
    pub code: ErrorCode,
    /// For people; may be empty. The first 4096 bytes are sent.
    pub message: String,
    /// Where the first byte is that cannot be had, if that is known.
    pub at: Option<u64>,
}

impl From<ErrorCode> for Refused {
    fn from(code: ErrorCode) -> Self {
        Self {
            code,
            message: String::new(),
            at: None,
        }
    }
}

/// What clients may cost.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// At once.
    pub clients: usize,
    /// Of those, of one user.
    pub of_one_user: usize,
    /// Requests of one client under way at once.
    pub requests: usize,
    /// Longest read, and bytes in memory for one client's reads at once: the largest block size that is told to clients.
    pub bytes: u32,
    /// From the connection to the choice of an export.
    pub handshake: Duration,
    /// From a request's first byte to its last.
    pub request: Duration,
    /// From a reply's being ready to its being taken, those before it included.
    pub reply: Duration,
    /// Without a request, until the place may be given to a newcomer.
    pub idle: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            // nbdcopy takes four, QEMU one for each image; no more than 96 MiB in all.
            clients: 24,
            // So that no user who can reach the socket can keep the others out.
            of_one_user: 16,
            // nbdcopy has 64 under way on each of its connections and qemu-img eight; more only wait in the socket here.
            requests: 16,
            // The protocol wants at least 1 MiB; qemu-img convert asks for 2 MiB at once.
            bytes: 4 << 20,
            // A local client needs milliseconds.
            handshake: Duration::from_secs(10),
            request: Duration::from_secs(10),
            // 64 KiB a second at the least.
            reply: Duration::from_secs(64),
            idle: Duration::from_secs(60),
        }
    }
}

/// A server that runs until it is dropped, which also ends its connections.
#[derive(Debug)]
pub struct Server {
    places: Arc<Places>,
    _accepting: JoinSet<()>,
}

impl Server {
    /// Serves whoever can connect. Must be called within a tokio runtime.
    pub fn start<E: Export>(listener: UnixListener, exports: Vec<E>, bounds: Bounds) -> Self {
        let exports: Arc<[Arc<E>]> = exports.into_iter().map(Arc::new).collect();
        let places = Arc::new(Places::new(bounds));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, exports, Arc::clone(&places)));
        Self {
            places,
            _accepting: accepting,
        }
    }

    /// How many clients there are.
    pub fn clients(&self) -> watch::Receiver<usize> {
        self.places.count()
    }
}

async fn accept<E: Export>(listener: UnixListener, exports: Arc<[Arc<E>]>, places: Arc<Places>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(AGAIN).await;
            continue;
        };
        // Whose user the system does not tell is one of those that it does not.
        let user = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
        if let Some(place) = places.take(user) {
            connections.spawn(serve(stream, Arc::clone(&exports), place));
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve<E: Export>(stream: UnixStream, exports: Arc<[Arc<E>]>, place: Place) {
    let talk = async {
        let bounds = place.bounds();
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let negotiated = negotiation::negotiate(&mut reader, &mut writer, &exports, bounds);
        if let Ok(Ok(Some(session))) = timeout(bounds.handshake, negotiated).await {
            Transmission::new(session, writer, place.seat())
                .run(reader)
                .await;
        }
    };
    tokio::select! {
        () = talk => {}
        () = place.given_away() => {}
    }
}
