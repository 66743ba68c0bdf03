//! The words of `wit/provider.wit`.

use serde::{Deserialize, Serialize};

/// Which of the contract's two worlds a component is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum World {
    /// Sees the bytes; exports `backup` and `restore`.
    Provider,
    /// Cannot see the bytes; exports `blind-backup`.
    BlindProvider,
}

impl World {
    /// As in `wit/provider.wit`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Provider => "provider",
            Self::BlindProvider => "blind-provider",
        }
    }
}

/// A part of WASI that a component may be granted. There are no others: no files, no sockets, no HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wasi {
    /// The time of day, and timers.
    Clocks,
    /// Random bytes.
    Random,
    /// Standard output and error, which go to the job's log; with them an input that has ended, no arguments and no
    /// environment.
    Output,
}

impl Wasi {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Clocks, Self::Random, Self::Output];

    /// As the configuration names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clocks => "clocks",
            Self::Random => "random",
            Self::Output => "output",
        }
    }
}

/// Limits that the sandbox process enforces on its own guest code.
///
/// The job process bounds a run's wall-clock time from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct GuestLimits {
    /// Sum of all linear memories, in bytes.
    pub memory: u64,
    /// CPU time that the guest's thread may use in one call of an export (`run`, `image.open`, one `image.read`),
    /// in milliseconds. For an open image the sum is bounded by whoever makes the calls.
    pub cpu_ms: u64,
}

/// The parts of `job.context` that need no call.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Context {
    /// Opaque and unique.
    pub id: String,
    /// The provider's settings (TOML).
    pub settings: String,
}

/// `volume.volume-info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VolumeInfo {
    /// Stable across backups.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// A power of two, in bytes.
    pub block_size: u32,
    /// What is tracked.
    pub mode: BitmapMode,
}

/// `volume.bitmap-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapMode {
    /// Nothing is tracked.
    None,
    /// Tracking starts with this backup.
    New,
    /// Only what changed since the base.
    Reuse,
}

/// `types.encoding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// As it is.
    Identity,
    /// Zstandard frames.
    Zstd,
}

/// A range as a guest passed it: anything at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RawRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// `job.level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// For the provider's author.
    Debug,
    /// Progress worth keeping.
    Info,
    /// Something is odd.
    Warn,
    /// Something failed.
    Error,
}

/// `types.error-code`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The job was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The range was discarded.
    #[error("discarded")]
    Discarded,
    /// An object of that name exists in this backup.
    #[error("exists")]
    Exists,
    /// Storage or the snapshot failed.
    #[error("io")]
    Io,
    /// Not a single plain component.
    #[error("invalid-name")]
    InvalidName,
    /// Not part of what this backup covers.
    #[error("not-dirty")]
    NotDirty,
    /// There is no such object.
    #[error("not-found")]
    NotFound,
    /// Not a range of whole blocks of the volume.
    #[error("out-of-range")]
    OutOfRange,
    /// A limit of the policy.
    #[error("quota-exceeded({0})")]
    QuotaExceeded(Quota),
    /// More than the host takes at once.
    #[error("too-large")]
    TooLarge,
    /// Anything else.
    #[error("{}", .0.as_deref().unwrap_or("other"))]
    Other(Option<String>),
}

/// `types.quota`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quota {
    /// Number of objects.
    Objects,
    /// Bytes stored, before encoding.
    OutputBytes,
    /// Bytes read.
    ReadBytes,
}

impl std::fmt::Display for Quota {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Objects => "objects",
            Self::OutputBytes => "output-bytes",
            Self::ReadBytes => "read-bytes",
        })
    }
}
