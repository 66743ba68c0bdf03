//! How much a provider may have, and which handles.

use super::size;
use crate::archive::ZstdLevel;
use crate::contract::{MAX_COMPONENT, MAX_RECEIPT, Wasi};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::time::Duration;

/// Limits on a provider. Each has a default that suits an honest one.
///
/// `wall-seconds`, `receipt-bytes` and `progress-per-minute` hold for each run, which is one volume of one backup; all
/// others for the backup as a whole. Where a provider may not see the bytes, each volume has its part of `output-bytes`,
/// `read-bytes`, `objects` and `memory` beforehand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Limits {
    /// Sum of the linear memories of all instances that there are at the same time, in bytes.
    #[serde(deserialize_with = "size::bytes")]
    pub memory: u64,
    /// CPU time of all sandbox processes, in seconds.
    pub cpu_seconds: u64,
    /// Time from start to end of one run, waits included, in seconds.
    pub wall_seconds: u64,
    /// Bytes stored, counted before encoding so that it does not tell how well they compress.
    #[serde(deserialize_with = "size::bytes")]
    pub output_bytes: u64,
    /// Bytes of volumes read on the provider's behalf, the host's own copies included.
    #[serde(deserialize_with = "size::bytes")]
    pub read_bytes: u64,
    /// Objects created.
    pub objects: u32,
    /// Bytes logged; what is beyond is dropped and counted.
    #[serde(deserialize_with = "size::bytes")]
    pub log_bytes: u64,
    /// Length of what one `run` returns, in bytes.
    #[serde(deserialize_with = "size::bytes")]
    pub receipt_bytes: u32,
    /// Length of the component, in bytes.
    #[serde(deserialize_with = "size::bytes")]
    pub component_bytes: u64,
    /// Bytes of volumes read in a second, over all volumes together. None: as fast as it goes.
    #[serde(deserialize_with = "size::optional")]
    pub bandwidth: Option<NonZeroU64>,
    /// Bytes that the fleecing images may take up together. Beyond it the job is given up and the guest goes on.
    #[serde(deserialize_with = "size::optional")]
    pub fleecing_bytes: Option<u64>,
    /// How long the snapshot may live, in seconds. After it the job is given up and the guest goes on.
    pub snapshot_seconds: Option<u64>,
    /// Bytes of its volume that a run must cover in a minute of its own time, until nothing is left to be covered.
    #[serde(deserialize_with = "size::optional")]
    pub progress_per_minute: Option<u64>,
    /// The highest level at which what the provider stores is compressed. None: the archive's, whatever it is.
    pub zstd_level: Option<ZstdLevel>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // A Python provider needs some 60 MiB before its first line, for each volume.
            memory: 1 << 30,
            // A provider that hashes a TiB within its own memory needs hours; one that spins should not get them all.
            cpu_seconds: 4 * 3600,
            wall_seconds: 24 * 3600,
            // More than any disk: a cap for operators who want one.
            output_bytes: 1 << 50,
            read_bytes: 1 << 50,
            // An object costs a file; a provider that wants more wants `put`.
            objects: 10_000,
            log_bytes: 1 << 20,
            // It is kept in the manifest.
            receipt_bytes: MAX_RECEIPT as u32,
            component_bytes: MAX_COMPONENT,
            bandwidth: None,
            fleecing_bytes: None,
            snapshot_seconds: None,
            progress_per_minute: None,
            zstd_level: None,
        }
    }
}

/// What counts as no limit, in seconds: a year more than which no job runs, and no clock overflows by.
const LONGEST: u64 = 366 * 24 * 3600;

impl Limits {
    /// [`Limits::wall_seconds`], at most a year.
    pub fn wall(&self) -> Duration {
        Duration::from_secs(self.wall_seconds.min(LONGEST))
    }

    /// [`Limits::cpu_seconds`], at most a year.
    pub fn cpu(&self) -> Duration {
        Duration::from_secs(self.cpu_seconds.min(LONGEST))
    }

    /// At which level is compressed in an archive that wants `level`.
    pub fn zstd_level(&self, level: ZstdLevel) -> ZstdLevel {
        self.zstd_level.map_or(level, |most| most.min(level))
    }
}

/// Which optional handles a provider is granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Grant {
    /// `content.reader`: the bytes of the disk. Meaningless for a blind provider, whose world has no such handle.
    pub read: bool,
    /// `volume.discarder`: giving snapshot space back early.
    pub discard: bool,
    /// Whether the host gives finished ranges back by itself. What is given back can no longer be read.
    pub trim_finished: bool,
    /// Parts of WASI that its component may import.
    pub wasi: BTreeSet<Wasi>,
}

impl Grant {
    /// The parts of WASI that count: by a clock, one that may not read could tell which blocks are equal and how well
    /// they compress.
    pub fn wasi(&self) -> BTreeSet<Wasi> {
        let seen = |part: &Wasi| self.read || *part != Wasi::Clocks;
        self.wasi.iter().copied().filter(seen).collect()
    }
}

impl Default for Grant {
    fn default() -> Self {
        Self {
            read: true,
            discard: true,
            trim_finished: true,
            wasi: BTreeSet::new(),
        }
    }
}
