//! The messages. Everything that comes from a sandbox is a claim to be checked, never a fact.

use super::octets;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most bytes that `run` may return, and so the most that a `base` or a receipt can have: these travel inside a
/// message and are kept in the manifest. Enough for a provider to say what it did, not for the backup itself.
pub const MAX_RECEIPT: usize = 1 << 20;

/// Most bytes in a name that a guest passes. The contract's names are one plain component, and no file system takes
/// a longer one than this.
pub const MAX_NAME: usize = 255;

/// Most bytes in one `log` message or in the text of one `error-code.other`; what is longer is cut.
pub const MAX_TEXT: usize = 4 << 10;

/// Most regions in one answer: about 20 bytes each inside a message.
pub const MAX_REGIONS: u32 = 4096;

/// What a sandbox process says first of all. It is given its order after that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Empty where the kernel offers everything.
    pub missing: Vec<Gap>,
}

/// A part of a sandbox process's confinement that this system does not offer. What it would forbid, other parts forbid
/// too: each gap is one defence less, not an open door.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Gap {
    /// Landlock's rules on files.
    #[error("no rules on files (Landlock, Linux 6.2)")]
    Files,
    /// Landlock's rules on TCP.
    #[error("no rules on network ports (Landlock, Linux 6.7)")]
    Tcp,
    /// Landlock's scopes of signals and of abstract unix sockets.
    #[error("no rules on signals and socket names (Landlock, Linux 6.12)")]
    Scopes,
    /// Seccomp filters.
    #[error("no list of system calls (seccomp)")]
    SystemCalls,
    /// Another user than root, who started it.
    #[error("no user of its own instead of root")]
    User,
    /// A control group.
    #[error(
        "no limit of the kernel's on the memory of all its processes together (control groups; with systemd, run the job alone in a unit with Delegate=yes)"
    )]
    Group,
}

/// What is missing, in one line.
pub fn listed(missing: &[Gap]) -> String {
    let gaps: Vec<_> = missing.iter().map(Gap::to_string).collect();
    gaps.join("; ")
}

/// What the job process asks a fresh sandbox process to do, once.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Compile the component in the payload (`length` bytes) and say what it is. Runs none of its code.
    Compile {
        /// Length of the component in the payload file, in bytes.
        length: u64,
    },
    /// Load a compiled component, which arrives in a file of its own, and say whether it fits its world. Runs none of its
    /// code.
    Fit(Fit),
    /// Run `run` once on one volume. The compiled component arrives in a file of its own.
    Run(Run),
    /// Open `restore.image` and serve [`ImageRead`]s until the socket closes.
    OpenImage(OpenImage),
}

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
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

/// What a component is held against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Fit {
    /// The world that it was inspected to be for.
    pub world: World,
    /// The parts of WASI that it may use.
    pub wasi: BTreeSet<Wasi>,
}

/// `backup.run` or `blind-backup.run`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Run {
    /// The world that the component was inspected to be for.
    pub world: World,
    /// The parts of WASI that it may use.
    #[serde(default)]
    pub wasi: BTreeSet<Wasi>,
    /// Limits on the guest's code.
    pub limits: GuestLimits,
    /// `job.context`.
    pub context: Context,
    /// `volume.snapshot.info`.
    pub volume: VolumeInfo,
    /// Whether a `reader` is granted; only in [`World::Provider`].
    pub reader: bool,
    /// Whether a `discarder` is granted.
    pub discarder: bool,
    /// What `run` returned for this volume in the base.
    #[serde(with = "octets::optional")]
    pub base: Option<Vec<u8>>,
    /// `content.reader.max-read`, in bytes.
    pub max_read: u32,
    /// `archive.output-stream.max-write`, in bytes.
    pub max_write: u32,
}

/// `restore.image.open`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct OpenImage {
    /// The parts of WASI that it may use.
    #[serde(default)]
    pub wasi: BTreeSet<Wasi>,
    /// Limits on the guest's code.
    pub limits: GuestLimits,
    /// `job.context`.
    pub context: Context,
    /// What `run` returned for this volume.
    #[serde(with = "octets")]
    pub receipt: Vec<u8>,
    /// Largest answer to one `image.read` or `objects.read`, in bytes.
    pub max_read: u32,
    /// What it learns of time and chance, as far as it is granted any.
    #[serde(default)]
    pub still: Still,
}

/// Time and chance as an image meets them: the same whenever and wherever it is opened, so that a proof cannot be told
/// from a restore by them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Still {
    /// When all clocks stand, in seconds since 1970.
    pub seconds: u64,
    /// What all random bytes are made from.
    #[serde(with = "hex::serde")]
    pub seed: [u8; 32],
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

/// What the sandbox sends: one granted call, or that it is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// `volume.dirty-regions.next`.
    NextRegions {
        /// As the guest passed it.
        limit: u32,
    },
    /// The guest's memories are to grow. Answered with [`Answer::Unit`], or with an error where the job would have more
    /// than it may.
    Grow {
        /// By how much.
        bytes: u64,
    },
    /// `volume.discarder.discard`.
    Discard(RawRange),
    /// `content.reader.read`.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
    },
    /// `archive.writer.put`.
    Put(RawRange, Encoding),
    /// `archive.writer.create`.
    Create {
        /// As the guest passed it.
        name: String,
        /// For the whole object.
        encoding: Encoding,
    },
    /// `archive.output-stream.write`: the bytes lie in the payload.
    Write {
        /// From [`Answer::Stream`].
        stream: u32,
        /// Number of bytes in the payload.
        length: u32,
    },
    /// `archive.output-stream.splice`.
    Splice {
        /// From [`Answer::Stream`].
        stream: u32,
        /// Of the volume.
        range: RawRange,
    },
    /// `archive.output-stream.claim`.
    Claim {
        /// From [`Answer::Stream`].
        stream: u32,
        /// Of the volume.
        range: RawRange,
    },
    /// `archive.output-stream.finish`.
    Finish {
        /// From [`Answer::Stream`].
        stream: u32,
    },
    /// The guest dropped the stream unfinished. Answered with [`Answer::Unit`].
    DropStream {
        /// From [`Answer::Stream`].
        stream: u32,
    },
    /// `job.context.attachment`.
    Attachment {
        /// As the guest passed it.
        name: String,
    },
    /// `job.context.log`.
    Log {
        /// As the guest chose it.
        level: LogLevel,
        /// As the guest passed it.
        message: String,
    },
    /// `stored.objects.size`.
    ObjectSize {
        /// As the guest passed it.
        name: String,
    },
    /// `stored.objects.read`.
    ObjectRead {
        /// As the guest passed it.
        name: String,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
    },
    /// The order is done, one way or the other. For [`Order::OpenImage`] it is sent once after `open` and then
    /// once per [`ImageRead`].
    Done(Outcome),
}

impl Call {
    /// The contract's name of the function, with its resource.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NextRegions { .. } => "dirty-regions.next",
            Self::Discard(_) => "discarder.discard",
            Self::Read { .. } => "reader.read",
            Self::Put(..) => "writer.put",
            Self::Create { .. } => "writer.create",
            Self::Write { .. } => "output-stream.write",
            Self::Splice { .. } => "output-stream.splice",
            Self::Claim { .. } => "output-stream.claim",
            Self::Finish { .. } => "output-stream.finish",
            Self::DropStream { .. } => "output-stream (dropped)",
            Self::Attachment { .. } => "context.attachment",
            Self::Log { .. } => "context.log",
            Self::ObjectSize { .. } => "objects.size",
            Self::ObjectRead { .. } => "objects.read",
            Self::Grow { .. } => "memory.grow",
            Self::Done(_) => "(return)",
        }
    }

    /// Whether the contract lets it fail.
    pub fn can_fail(&self) -> bool {
        !matches!(
            self,
            Self::Grow { .. }
                | Self::DropStream { .. }
                | Self::Attachment { .. }
                | Self::Log { .. }
                | Self::Done(_)
        )
    }
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

/// How an order ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// [`Order::Compile`]: the compiled component lies in the payload.
    Compiled {
        /// Length of the compiled component in the payload file, in bytes.
        length: u64,
        /// What the component imports and exports.
        interface: Interface,
    },
    /// [`Order::Fit`]: it does.
    Fits,
    /// [`Order::Run`]: what `run` returned.
    Receipt(#[serde(with = "octets")] Vec<u8>),
    /// [`Order::OpenImage`]: the image is open.
    Opened,
    /// [`ImageRead`]: the bytes lie in the payload.
    Bytes {
        /// Number of bytes.
        length: u32,
    },
    /// The guest returned an error.
    GuestError(ErrorCode),
    /// The guest did not return: it trapped, passed a limit, or cannot be run.
    Failed(Failure),
}

/// What a component imports and exports, by full interface name, such as `fleecebox:provider/volume@0.1.0`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// In the component's order.
    pub imports: Vec<String>,
    /// In the component's order.
    pub exports: Vec<String>,
}

/// Why a guest did not return.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// The bytes are no component; with the parser's reason.
    #[error("it is not a component that can be run: {0}")]
    NotAComponent(String),
    /// The compiled form is of another version of the runtime or another kind of processor: compile again.
    #[error("its compiled form is not for this program on this machine")]
    Stale,
    /// It does not export what its world says, or imports what is not linked; with the reason.
    #[error("it does not fit its world: {0}")]
    CannotLink(String),
    /// It trapped; with the trap's first line.
    #[error("it trapped: {0}")]
    Trapped(String),
    /// What it returned is larger than the host takes.
    #[error("it returned {length} bytes where {limit} are allowed")]
    TooLarge {
        /// In bytes.
        length: u64,
        /// In bytes.
        limit: u64,
    },
    /// It passed its memory limit.
    #[error("it needs more memory than its limit allows")]
    Memory,
    /// It passed its CPU-time limit.
    #[error("it used more CPU time than its limit allows")]
    CpuTime,
}

/// The job's answer to one [`Call`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done; nothing to give back.
    Unit,
    /// For [`Call::NextRegions`]: (offset, length, is-zero).
    Regions(Vec<(u64, u64, bool)>),
    /// For [`Call::Read`], [`Call::ObjectRead`], [`Call::Attachment`]: the bytes lie in the payload.
    Bytes {
        /// Number of bytes.
        length: u32,
    },
    /// For [`Call::Attachment`]: there is none.
    Nothing,
    /// For [`Call::Create`].
    Stream(u32),
    /// For [`Call::Finish`] and [`Call::ObjectSize`], in bytes.
    Size(u64),
    /// The call failed in a way that the guest may see.
    Error(ErrorCode),
}

/// For an open image, in place of an answer: read these bytes next.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ImageRead {
    /// First byte of the volume.
    pub offset: u64,
    /// Number of bytes.
    pub length: u32,
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
