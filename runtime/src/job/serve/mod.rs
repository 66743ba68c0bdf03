//! A backup that is served: its volumes as read-only NBD exports, for as long as it is told.
//!
//! No byte leaves that has not its digest. What cannot be had, or is not as it was backed up, is refused to the client and
//! told once; everything else goes on.
//!
//! - `volume` puts together what a client asks for: what the host placed, from the archive;
//! - `asked` gets what was claimed from providers, in the one way in which they are ever asked ([`claims`](super::claims));
//! - `trouble` remembers what could not be read.

mod asked;
mod trouble;
mod volume;

pub use trouble::Unread;

use super::means::Means;
use super::read_back::{self, ProviderError};
use super::reading::Reading;
use crate::access::{Image, Kept};
use crate::archive::{BackupId, VolumeRecord};
use crate::contract::with_causes;
use crate::nbd::server::{Bounds, Server};
use crate::sandbox::Cache;
use asked::{Asked, Lookup, NotAsked};
use std::collections::VecDeque;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use trouble::Troubles;
use volume::{Shared, Volume};

/// What was read last and is kept, in bytes: enough for what the four connections of nbdcopy have under way, each within a
/// few megabytes, and for a guest that reads a frame in small pieces.
const KEPT: usize = 32 << 20;

/// Providers of backups that are known at once, as in a restore. Each holds a list of objects and a receipt.
const KNOWN: usize = 16;

/// Questions for providers that wait.
const LOOKUPS: usize = 16;

/// For how long it is believed that a provider cannot be asked: who reads on should not have it tried for each block, and
/// what was in the way may be gone later.
const BELIEVED: Duration = Duration::from_secs(60);

/// What is served, and for how long.
pub struct Serve<'a> {
    /// Volumes of the backup, which are exports of the same names.
    pub volumes: &'a [&'a VolumeRecord],
    /// Where clients connect.
    pub listener: UnixListener,
    /// For so long at most.
    pub wall: Duration,
    /// Until there was no client for so long.
    pub idle: Option<Duration>,
}

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// A signal asked for it.
    Signal,
    /// It was served for as long as it may be.
    WallTime,
    /// Nobody was there any more.
    Idle,
}

/// What came of it.
#[derive(Debug)]
pub struct Served {
    /// Why it ended.
    pub ended: Ended,
    /// What somebody wanted to read and could not; the first hundred.
    pub unread: Vec<Unread>,
}

/// Serves until it ends by one of the ways that there are.
pub async fn serve(
    reading: &Reading<'_>,
    serve: Serve<'_>,
    cache: &Cache,
    means: &Means,
    ready: impl FnOnce(),
) -> Served {
    let stop = means.cancel.child_token();
    let means = &means.ended_by(stop.clone());
    let (lookups, wanted) = mpsc::channel(LOOKUPS);
    let kept = Arc::new(Kept::new(KEPT));
    let troubles = Arc::new(Troubles::new(means.events.clone()));
    let asked = Arc::new(Asked::new(lookups, Arc::clone(&kept), means));
    let shared = Arc::new(Shared {
        namespace: Arc::clone(reading.namespace),
        kept,
        asked: Arc::clone(&asked),
        troubles: Arc::clone(&troubles),
        readers: Arc::clone(&means.encoders),
        copied: Default::default(),
    });
    let exports = serve
        .volumes
        .iter()
        .enumerate()
        .map(|(index, volume)| Volume {
            index,
            name: volume.name.clone(),
            image: Arc::new(Image::new(reading.namespace.table(volume.root))),
            shared: Arc::clone(&shared),
        });
    let server = Server::start(serve.listener, exports.collect(), Bounds::default());
    ready();
    let ended = tokio::select! {
        () = means.cancel.cancelled() => Ended::Signal,
        () = sleep(serve.wall) => Ended::WallTime,
        () = nobody_for(serve.idle, server.clients()) => Ended::Idle,
        () = look_up(wanted, reading, serve.volumes, cache, means) => Ended::Signal,
    };
    stop.cancel();
    drop(server);
    asked.close().await;
    let copied = shared.copied.load(Ordering::Relaxed);
    if copied > 0 {
        means.events.warn(format!(
            "{copied} times a damaged piece was read from a copy that a later backup stored"
        ));
    }
    Served {
        ended,
        unread: troubles.all(),
    }
}

/// Returns once there was no client for so long.
async fn nobody_for(idle: Option<Duration>, mut clients: watch::Receiver<usize>) {
    let Some(idle) = idle else {
        return pending().await;
    };
    loop {
        if clients.wait_for(|count| *count == 0).await.is_err() {
            return pending().await;
        }
        if timeout(idle, clients.wait_for(|count| *count > 0))
            .await
            .is_err()
        {
            return;
        }
    }
}

/// Answers who may be asked for what, as long as anybody wants to know. It goes by the policy, which only the job has.
async fn look_up(
    mut wanted: mpsc::Receiver<Lookup>,
    reading: &Reading<'_>,
    volumes: &[&VolumeRecord],
    cache: &Cache,
    means: &Means,
) {
    let mut known: VecDeque<Known> = VecDeque::new();
    while let Some(Lookup {
        volume,
        backup,
        reply,
    }) = wanted.recv().await
    {
        let at = known.iter().position(|it| it.is(volume, backup));
        let found = at.and_then(|at| known.remove(at));
        let found = match found.filter(Known::is_believed) {
            Some(found) => found,
            None => {
                let of = volumes[volume];
                let claims = read_back::look_up(reading, of, backup, cache, means).await;
                Known {
                    volume,
                    backup,
                    since: Instant::now(),
                    claims: claims.map(Arc::new).map_err(|error| not_asked(&error)),
                }
            }
        };
        // Who does not wait for it any more has left.
        let _ = reply.send(found.claims.clone());
        known.push_back(found);
        while known.len() > KNOWN {
            known.pop_front();
        }
    }
}

/// A provider of one backup of one volume.
struct Known {
    volume: usize,
    backup: BackupId,
    since: Instant,
    claims: asked::Found,
}

impl Known {
    fn is(&self, volume: usize, backup: BackupId) -> bool {
        self.volume == volume && self.backup == backup
    }

    fn is_believed(&self) -> bool {
        self.claims.is_ok() || self.since.elapsed() < BELIEVED
    }
}

fn not_asked(error: &ProviderError) -> NotAsked {
    NotAsked {
        reason: with_causes(error),
        is_denied: matches!(error, ProviderError::Denied(_)),
    }
}
