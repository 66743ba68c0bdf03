//! Whether the storage of a VM's disks answers, asked before anything is sent to QEMU that would wait for it.
//!
//! To remove an export, a node or a block job, QEMU drains all of its disks in its main loop: while one request of one
//! disk hangs, the guest, the monitor and all other disks stand still with it. Requests themselves do not: those over
//! NBD are answered by coroutines. So each disk has an export of its own from the point in time on ([`Role::Probe`]),
//! which is the last thing to go, and a flush and a few reads over it tell whether a drain would end. What the flush
//! writes out, no drain has to wait for any more.
//!
//! Storage may still begin to hang between an answer and the commands after it, which take milliseconds.
//!
//! [`Role::Probe`]: crate::qemu::ids::Role::Probe

use super::signals::Signals;
use crate::event::Events;
use crate::extent::Extent;
use crate::nbd::{self, Connection};
use crate::qemu::snapshot::Probe;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, sleep_until};

/// How long a job that ends by itself waits. A flush of all that a guest has written may take minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long one waits that somebody asked to end.
const CANCELLED: Duration = Duration::from_secs(30);

/// Between two words on what is waited for.
const TOLD: Duration = Duration::from_secs(5);

/// Before an export whose server did not answer is asked again.
const PAUSE: Duration = Duration::from_millis(500);

/// Reads spread over a disk: some of them are not in the host's page cache, and some meet data.
const READS: u64 = 8;

/// Longest read: a sector of any disk.
const READ: u64 = 4096;

/// Disks whose storage did not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unanswered(pub Vec<String>);

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the storage of {} does not answer", self.0.join(", "))
    }
}

/// The disks' own exports.
#[derive(Debug, Clone)]
pub struct Storage {
    /// Of the NBD server.
    socket: PathBuf,
    probes: Vec<Probe>,
    flush: bool,
}

impl Storage {
    /// That of the disks of `probes`, which an NBD server on `socket` exports.
    pub fn new(socket: &Path, probes: Vec<Probe>) -> Self {
        Self {
            socket: socket.into(),
            probes,
            flush: true,
        }
    }

    /// Asked by reads alone, which a host's cache may answer: for who has no time for a flush.
    pub fn in_haste(self) -> Self {
        Self {
            flush: false,
            ..self
        }
    }

    /// Waits until all of it answers, and says every few seconds what is waited for, and why.
    ///
    /// # Errors
    /// [`Unanswered`], when a job has waited long enough, or is to end at once.
    pub async fn wait(&self, events: &Events, signals: &Signals) -> Result<(), Unanswered> {
        let since = Instant::now();
        let told = async {
            let mut ended = signals.end.is_cancelled().then_some(since);
            let mut told = since + TOLD;
            loop {
                tokio::select! {
                    () = sleep_until(told) => {}
                    () = signals.at_once.cancelled() => return,
                    () = signals.end.cancelled(), if ended.is_none() => ended = Some(Instant::now()),
                }
                let now = Instant::now();
                let enough = match ended {
                    Some(ended) => now.duration_since(ended) >= CANCELLED,
                    None => now.duration_since(since) >= PATIENCE,
                };
                if enough {
                    return;
                }
                if now >= told {
                    events.warn(format!(
                        "waiting for the storage of the VM's disks for {} s: nothing can be taken from the VM before it answers without stopping the VM",
                        now.duration_since(since).as_secs()
                    ));
                    told = now + TOLD;
                }
            }
        };
        self.answers(told).await
    }

    /// Waits until all of it answers, or until `end`.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn answers(&self, end: impl Future<Output = ()>) -> Result<(), Unanswered> {
        let asked = self.probes.iter().map(|probe| async move {
            answer(&self.socket, &probe.export, self.flush).await;
            &probe.disk
        });
        let mut asked: FuturesUnordered<_> = asked.collect();
        let mut waits: Vec<&String> = self.probes.iter().map(|probe| &probe.disk).collect();
        tokio::pin!(end);
        while !waits.is_empty() {
            tokio::select! {
                biased;
                answered = asked.next() => match answered {
                    Some(disk) => waits.retain(|&waits| waits != disk),
                    None => break,
                },
                () = &mut end => return Err(Unanswered(waits.into_iter().cloned().collect())),
            }
        }
        Ok(())
    }
}

/// Returns when the storage below `export` answered, be it with an error, or when there is nobody to ask any more.
async fn answer(socket: &Path, export: &str, flush: bool) {
    // A server that does not even greet has a main loop that waits already.
    while let Err(nbd::Error::HandshakeTimeout(_)) = ask(socket, export, flush).await {
        sleep(PAUSE).await;
    }
}

async fn ask(socket: &Path, export: &str, flush: bool) -> Result<(), nbd::Error> {
    let stream = UnixStream::connect(socket).await?;
    let connection = Connection::connect(stream, export, None).await?;
    let flushed = match flush {
        true => connection.flush().await,
        false => Ok(()),
    };
    let info = *connection.info();
    let random = getrandom::u64().unwrap_or_default();
    for part in 0..READS {
        let Some(extent) = sector(info.size, info.min_block, part, random) else {
            break;
        };
        // An error is an answer as well.
        let _ = connection.read(extent, Vec::new()).await;
    }
    connection.disconnect().await;
    flushed
}

/// A sector in this `part` of a disk of `size` bytes.
fn sector(size: u64, min_block: u32, part: u64, random: u64) -> Option<Extent> {
    let share = size / READS;
    let within = random.rotate_left(part as u32 * 8).checked_rem(share);
    let at = share * part + within.unwrap_or(0);
    let block = u64::from(min_block).max(1);
    let start = at / block * block;
    let end = start.saturating_add(READ.max(block)).min(size);
    Extent::between(start, end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_whole_blocks_inside_the_disk() {
        for size in [1, 511, 512, 4096, 65_536 + 512, 1 << 40] {
            for block in [1, 512, 4096] {
                for part in 0..READS {
                    let extent = sector(size, block, part, u64::MAX / 3).unwrap();
                    assert!(extent.is_whole_blocks(block, size) && extent.end() <= size);
                }
            }
        }
        assert_eq!(sector(0, 1, 0, 7), None);
    }
}
