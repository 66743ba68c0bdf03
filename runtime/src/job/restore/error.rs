//! Why a volume is not restored.

use super::super::read_back::{Finding, ReadBackError};
use std::io;
use std::path::PathBuf;

/// Why a volume is not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It cannot go where it is to go.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// It does not come back as it was backed up.
    #[error("volume {volume}")]
    Found {
        /// Its name.
        volume: String,
        /// What is wrong.
        #[source]
        finding: Finding,
    },
    /// Reading it ended early.
    #[error(transparent)]
    ReadBack(ReadBackError),
}

/// Why a volume cannot go where it is to go.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The path leads to nothing that may be written.
    #[error("{path} cannot be written", path = path.display())]
    Place {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: PlaceError,
    },
    /// A file or device is there, and nobody said that it may go.
    #[error("{path} exists; --force overwrites it", path = path.display())]
    Exists {
        /// As it was given.
        path: PathBuf,
    },
    /// A block device holds raw bytes.
    #[error("{path} is a block device, which takes the raw format only", path = path.display())]
    RawOnly {
        /// As it was given.
        path: PathBuf,
    },
    /// A folder is there.
    #[error("{path} is a folder", path = path.display())]
    Folder {
        /// As it was given.
        path: PathBuf,
    },
    /// Something else than a file or a block device is there.
    #[error("{path} is {kind}, which is never overwritten nor replaced", path = path.display())]
    NeverReplaced {
        /// As it was given.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Somebody would lose it.
    #[error(
        "{path} is in use: {users}. Whoever uses it would lose it; end that, or write to it all the same with --even-if-in-use",
        path = path.display(),
        users = users.join("; ")
    )]
    InUse {
        /// As it was given.
        path: PathBuf,
        /// Who has it, each in words.
        users: Vec<String>,
    },
    /// The device is smaller than the volume.
    #[error("{path} has {available} bytes, the volume {size}", path = path.display())]
    TooSmall {
        /// As it was given.
        path: PathBuf,
        /// Of the device.
        available: u64,
        /// Of the volume.
        size: u64,
    },
    /// Another file got the name while this one was made.
    #[error(
        "{path} is there by now, and was not when this began; nothing was changed",
        path = path.display()
    )]
    Appeared {
        /// As it was given.
        path: PathBuf,
    },
    /// The size of a device cannot be told.
    #[error("{path}", path = path.display())]
    Measure {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A device cannot be made to read as zeroes.
    #[error("{path} cannot be zeroed", path = path.display())]
    Zero {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The bytes do not go there.
    #[error("{path} cannot be written", path = path.display())]
    Write {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be made durable, or get its name.
    #[error("{path} cannot be completed", path = path.display())]
    Complete {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be made a qcow2 image.
    #[error(transparent)]
    Qcow2(#[from] ConvertError),
    /// A signal asked for the end.
    #[error("cancelled")]
    Cancelled,
}

impl DestinationError {
    /// Whether the user can mend it.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Place { .. }
            | Self::Exists { .. }
            | Self::RawOnly { .. }
            | Self::Folder { .. }
            | Self::NeverReplaced { .. }
            | Self::TooSmall { .. }
            | Self::Appeared { .. } => true,
            Self::InUse { .. }
            | Self::Measure { .. }
            | Self::Zero { .. }
            | Self::Write { .. }
            | Self::Complete { .. }
            | Self::Qcow2(_)
            | Self::Cancelled => false,
        }
    }
}

/// Why a path leads to no place for a file.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The system says no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It ends with a slash, and there is nothing.
    #[error("there is no such folder")]
    NoFolder,
    /// It has no last component.
    #[error("it names no file")]
    NoFile,
    /// Another user's link would decide where root writes.
    #[error(
        "{name} is a symbolic link of user {user}'s to {target}, which is not followed; name what it points to",
        target = target.display()
    )]
    OthersLink {
        /// Of the link.
        name: String,
        /// Whose it is.
        user: u32,
        /// Where it leads.
        target: PathBuf,
    },
}

impl From<rustix::io::Errno> for PlaceError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

/// Why there is no qcow2 image.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The program is not there.
    #[error("qemu-img, which writes qcow2, cannot be run (Debian: qemu-utils)")]
    NotRun(#[source] io::Error),
    /// It cannot be spoken to.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It failed.
    #[error("qemu-img could not write qcow2: {said}")]
    Failed {
        /// How, in its own words.
        said: String,
    },
}
