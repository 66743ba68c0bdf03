//! The messages. Everything that comes from a sandbox is a claim to be checked, never a fact.

use super::octets;
use fleecebox_contract::{
    Context, Encoding, ErrorCode, GuestLimits, Interface, LogLevel, RawRange, VolumeInfo, Wasi,
    World,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

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
