//! What can go wrong in the archive, told apart by what the caller does about it.

use super::name::{BackupId, NamespaceName};
use std::fmt::Display;
use std::io;

/// Why an operation on the archive failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused. Nothing is known about the content.
    #[error("{path}")]
    Io {
        /// Relative to the archive or namespace.
        path: String,
        /// As the file system said it.
        source: io::Error,
    },
    /// There is no space left, or the quota of the host's user is used up.
    #[error("{path}: the archive is full")]
    Full {
        /// The file that could not grow.
        path: String,
        /// As the file system said it.
        source: io::Error,
    },
    /// There is no such thing. Said only when the directory that would hold it could be read.
    #[error("{what}: not found")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// Something of that name exists.
    #[error("{what}: exists already")]
    Exists {
        /// What was to be made.
        what: String,
    },
    /// An archive is only ever made in an empty directory.
    #[error("the directory is not empty and holds no archive")]
    NotEmpty,
    /// The directory holds no archive.
    #[error("the directory holds no archive (no {file})", file = super::ARCHIVE_FILE)]
    NotAnArchive,
    /// It was never finished: a job was killed while it made it.
    #[error(
        "the namespace {namespace} is half-made (it has no key): a job was killed in its first backup into it; the next one finishes it"
    )]
    HalfMade {
        /// Which.
        namespace: NamespaceName,
    },
    /// The bytes are not what was written.
    #[error("{path}")]
    Damaged {
        /// The damaged file.
        path: String,
        /// What does not fit.
        #[source]
        damage: Damage,
    },
    /// More bytes in one call than the archive takes at once, or none.
    #[error("{actual} bytes at once; 1 to {limit} are taken")]
    TooLarge {
        /// In bytes.
        limit: u64,
        /// In bytes.
        actual: u64,
    },
    /// The range is not within what may be read or set.
    #[error("{offset}+{length} is out of range")]
    OutOfRange {
        /// In bytes, or blocks for a block table.
        offset: u64,
        /// In the same unit.
        length: u64,
    },
    /// A block was said to lie where its frame does not reach.
    #[error("block {block} of {length} bytes does not fit at {skip} of a frame of {decoded} bytes")]
    OutsideFrame {
        /// Index in the volume.
        block: u64,
        /// Of the block, in bytes.
        length: u32,
        /// Where it was said to begin.
        skip: u32,
        /// What the frame holds.
        decoded: u32,
    },
    /// The base's table is of a volume of another size or block size: it can be no base.
    #[error(
        "the base has {base_size} bytes in blocks of {base_block_size}, the volume {size} in blocks of {block_size}"
    )]
    BaseDiffers {
        /// Of the base, in bytes.
        base_size: u64,
        /// Of the base, in bytes.
        base_block_size: u32,
        /// Of the volume, in bytes.
        size: u64,
        /// Of the volume, in bytes.
        block_size: u32,
    },
    /// No block table has blocks of that size.
    #[error("a block size of {actual} bytes is not supported")]
    BlockSize {
        /// In bytes.
        actual: u32,
    },
    /// The object switches between written and spliced bytes more often than a manifest can record.
    #[error("more than {limit} runs of written bytes in one object")]
    TooManyRuns {
        /// Largest number of runs.
        limit: usize,
    },
    /// The manifest would be larger than a reader accepts.
    #[error("a manifest of {actual} bytes; at most {limit} can be read back")]
    ManifestTooLarge {
        /// In bytes.
        limit: u64,
        /// In bytes.
        actual: u64,
    },
    /// A commit was asked for while objects were still being written.
    #[error("{count} objects are unfinished")]
    UnfinishedObjects {
        /// How many.
        count: usize,
    },
    /// An earlier write of this backup failed, so that it can never be committed.
    #[error("an earlier write of this backup failed: {first}")]
    WriterFailed {
        /// Why, in words: the first failure was told to whoever wrote then.
        first: String,
    },
    /// The backup is committed and can not be discarded as a failed one.
    #[error("backup {0} is committed")]
    Committed(BackupId),
    /// The manifest was about to appear and it is not known whether it has, or whether it survives a power
    /// failure. Ask [`super::Namespace::manifest`] later; until then nothing may be undone.
    #[error("it is not known whether the backup was committed")]
    CommitUnknown {
        /// As the file system said it.
        source: io::Error,
    },
    /// The compressor failed.
    #[error("encoding failed")]
    Encode(#[source] io::Error),
    /// A record cannot be written as JSON or as a page.
    #[error("cannot be serialised: {0}")]
    Serialise(String),
    /// The system gives no random bytes.
    #[error("no random bytes")]
    Random(#[source] getrandom::Error),
}

/// What about a file is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It ends too early, or is longer than any such file.
    #[error("{actual} bytes long, expected {expected}")]
    Length {
        /// The length that it must have, or the nearest that is possible.
        expected: u64,
        /// In bytes.
        actual: u64,
    },
    /// It is a folder, a FIFO, a symbolic link or the like.
    #[error("it is not a regular file")]
    NotAFile,
    /// Its digest differs.
    #[error("its digest does not match its content")]
    Digest,
    /// It is not in the form that its place demands; with the rule that it breaks.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// Its JSON cannot be parsed; with the parser's reason.
    #[error("malformed: {0}")]
    Json(String),
    /// It is in a format of another version.
    #[error("format {actual}, expected {expected}")]
    Format {
        /// What this version reads.
        expected: u32,
        /// What it says.
        actual: u64,
    },
    /// It says that it belongs elsewhere.
    #[error("says that it is {actual}, expected {expected}")]
    Foreign {
        /// Where it lies.
        expected: String,
        /// What it says.
        actual: String,
    },
    /// A frame does not decode to the length that was recorded.
    #[error("a frame does not decode")]
    Frame,
}

impl Error {
    /// Whether what was asked for is not there as it was written, and will not be the next time either.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::NotFound { .. })
    }

    /// For `map_err`: an error of the file system at `path`.
    pub(super) fn at(path: impl Display) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            let path = path.to_string();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Self::Full { path, source }
                }
                io::ErrorKind::NotFound => Self::NotFound { what: path },
                io::ErrorKind::AlreadyExists => Self::Exists { what: path },
                _ => Self::Io { path, source },
            }
        }
    }

    /// For `map_err`: the content of `path` is wrong.
    pub(super) fn damaged(path: impl Display) -> impl FnOnce(Damage) -> Self {
        move |damage| Self::Damaged {
            path: path.to_string(),
            damage,
        }
    }
}
