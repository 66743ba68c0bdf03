//! Writes to a live disk all the while, from a thread.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::latency;
use crate::{NbdClient, NbdError, Random, eventually};

/// The smallest and the largest piece that is written at once, in bytes.
const PIECE: Range<u64> = 4 << 10..256 << 10;
/// Pieces begin and end at sectors, as a guest's do.
const SECTOR: u64 = 512;

/// What a [`Writer`] does.
#[derive(Clone, Debug)]
pub struct Load {
    /// The same seed gives the same sequence of offsets, lengths, kinds and bytes.
    pub seed: u64,
    /// Writes per second, as far as the server keeps up.
    pub rate: u32,
    /// Where it may write, in bytes; `None` is the whole disk. At least one region must hold a
    /// piece of 4 KiB, smaller ones are left alone.
    pub regions: Option<Vec<Range<u64>>>,
}

/// A thread that overwrites, zeroes and trims random pieces until it is stopped or dropped.
#[derive(Debug)]
pub struct Writer {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<Result<WriterReport, NbdError>>>,
}

/// What a [`Writer`] did.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriterReport {
    /// Requests that the server said yes to.
    pub writes: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// The longest that one took.
    pub worst_latency: Duration,
}

#[derive(Debug, Default)]
struct Progress {
    stop: AtomicBool,
    writes: AtomicU64,
}

impl Writer {
    /// Starts writing.
    ///
    /// # Errors
    /// When no region holds a piece.
    pub fn start(disk: NbdClient, load: Load) -> Result<Self> {
        let mut regions = load.regions.clone().unwrap_or_default();
        if load.regions.is_none() {
            regions.push(0..disk.size());
        }
        regions.retain(|region| region.end.saturating_sub(region.start) >= PIECE.start);
        if regions.is_empty() {
            bail!(
                "no region of {:?} holds {} bytes",
                load.regions,
                PIECE.start
            );
        }
        let progress = Arc::new(Progress::default());
        let of_thread = Arc::clone(&progress);
        let thread = std::thread::spawn(move || write(disk, &load, &regions, &of_thread));
        Ok(Self {
            progress,
            thread: Some(thread),
        })
    }

    /// Requests done so far.
    pub fn writes(&self) -> u64 {
        self.progress.writes.load(Ordering::Relaxed)
    }

    /// Waits until `more` further requests are done.
    ///
    /// # Errors
    /// When that takes longer than half a minute, as it does if QEMU stalls or is gone.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        let goal = self.writes() + more;
        let limit = Duration::from_secs(30);
        eventually("writes to go on", limit, || {
            Ok((self.writes() >= goal).then_some(()))
        })
    }

    /// Finishes the request in flight and ends.
    ///
    /// # Errors
    /// The request that failed, if one did.
    pub fn stop(mut self) -> Result<WriterReport> {
        match self.join() {
            Some(report) => Ok(report?),
            None => bail!("the writer's thread panicked"),
        }
    }

    fn join(&mut self) -> Option<Result<WriterReport, NbdError>> {
        self.progress.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take()?.join().ok();
        if let Some(Ok(report)) = &ended {
            latency::record("storage daemon", report.worst_latency);
        }
        ended
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // A test that drops the writer does not ask how it went.
        let _ = self.join();
    }
}

fn write(
    mut disk: NbdClient,
    load: &Load,
    regions: &[Range<u64>],
    progress: &Progress,
) -> Result<WriterReport, NbdError> {
    let mut random = Random::new(load.seed);
    let mut buffer = vec![0; PIECE.end as usize];
    let mut report = WriterReport::default();
    let interval = Duration::from_secs(1) / load.rate.max(1);
    let mut due = Instant::now();
    while !progress.stop.load(Ordering::Relaxed) {
        let region = &regions[random.below(regions.len() as u64) as usize];
        let piece = random_piece(&mut random, region);
        let length = (piece.end - piece.start) as u32;
        let started = Instant::now();
        // Mostly data, as on a real disk, yet enough of the others to meet every path in QEMU.
        match random.below(8) {
            0 => disk.write_zeroes(piece.start, length)?,
            1 => disk.trim(piece.start, length)?,
            _ => {
                let bytes = &mut buffer[..length as usize];
                random.fill(bytes);
                disk.write(piece.start, bytes)?;
            }
        }
        report.worst_latency = report.worst_latency.max(started.elapsed());
        report.bytes += u64::from(length);
        report.writes += 1;
        progress.writes.store(report.writes, Ordering::Relaxed);
        due += interval;
        match due.checked_duration_since(Instant::now()) {
            Some(early) => std::thread::sleep(early),
            // Not made up for later: a burst after a stall is not what the rate asked for.
            None => due = Instant::now(),
        }
    }
    disk.flush()?;
    Ok(report)
}

/// Whole sectors within `region`, which holds at least the smallest piece.
fn random_piece(random: &mut Random, region: &Range<u64>) -> Range<u64> {
    let sectors = (region.end - region.start) / SECTOR;
    let longest = (PIECE.end / SECTOR).min(sectors);
    let shortest = PIECE.start / SECTOR;
    let length = shortest + random.below(longest - shortest + 1);
    let start = region.start + random.below(sectors - length + 1) * SECTOR;
    start..start + length * SECTOR
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_piece_stays_within_its_region_and_its_bounds(
            seed: u64,
            start in 0u64..1 << 40,
            length in PIECE.start..1 << 30,
        ) {
            let region = start..start + length;
            let piece = random_piece(&mut Random::new(seed), &region);
            prop_assert!(region.start <= piece.start && piece.end <= region.end);
            prop_assert!((PIECE.start..=PIECE.end).contains(&(piece.end - piece.start)));
        }
    }
}
