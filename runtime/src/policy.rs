//! What a provider is granted and how much of it: values that, once they exist, are valid.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Limits on one run of a provider. Each has a default that suits an honest provider; the configuration's
/// `[provider.NAME.limits]` overrides them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Limits {
    /// Sum of an instance's linear memories, in bytes.
    pub memory: u64,
    /// CPU time of an instance's thread, in seconds.
    pub cpu_seconds: u64,
    /// Time from start to end of one run, waits included, in seconds.
    pub wall_seconds: u64,
    /// Bytes stored per volume, counted before encoding so that it does not tell how well they compress.
    pub output_bytes: u64,
    /// Bytes brought into the provider's memory per volume.
    pub read_bytes: u64,
    /// Objects created per volume.
    pub objects: u32,
    /// Bytes logged per volume; what is beyond is dropped and counted.
    pub log_bytes: u64,
    /// Length of what `run` returns, in bytes.
    pub receipt_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // A Python provider needs some 60 MiB before its first line.
            memory: 256 << 20,
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
            receipt_bytes: 64 << 10,
        }
    }
}

impl Limits {
    /// [`Limits::wall_seconds`].
    pub fn wall(&self) -> Duration {
        Duration::from_secs(self.wall_seconds)
    }

    /// [`Limits::cpu_seconds`].
    pub fn cpu(&self) -> Duration {
        Duration::from_secs(self.cpu_seconds)
    }
}

/// Which optional handles a provider is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Grant {
    /// `content.reader`: the bytes of the disk. Meaningless for a blind provider, whose world has no such handle.
    pub read: bool,
    /// `volume.discarder`: giving snapshot space back early.
    pub discard: bool,
    /// Whether the host gives finished ranges back by itself. What is given back can no longer be read.
    pub trim_finished: bool,
}

impl Default for Grant {
    fn default() -> Self {
        Self {
            read: true,
            discard: true,
            trim_finished: true,
        }
    }
}
