//! Where stored bytes lie.

use super::name::{BackupId, ObjectName, PackName};
use fleecebox_contract::Encoding;
use fleecebox_contract::buffer;
use fleecebox_contract::extent::Extent;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Most bytes in one frame before encoding: as much as is worth decoding to get at one block, and enough that
/// the cost of a frame does not show.
pub const FRAME_LIMIT: u32 = 1 << 20;

/// Most bytes of one frame as stored: what zstd may make of [`FRAME_LIMIT`] bytes that do not compress.
pub const STORED_LIMIT: u32 = FRAME_LIMIT + FRAME_LIMIT / 256;
const _: () = assert!(STORED_LIMIT as usize == buffer::ROOM);

/// A file of the archive that holds frames.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ObjectRef {
    /// What the host packed.
    Pack(PackName),
    /// What a provider created.
    Object {
        /// The backup that holds it.
        backup: BackupId,
        /// Its name there.
        name: ObjectName,
    },
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pack(name) => write!(f, "packs/{name}.pack"),
            Self::Object { backup, name } => write!(f, "backups/{backup}/objects/{name}"),
        }
    }
}

/// A piece of an object that is decoded on its own. One that exists has lengths within the limits; whether the
/// object is as long is seen when it is read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    object: ObjectRef,
    offset: u64,
    stored: u32,
    decoded: u32,
    encoding: Encoding,
}

/// The numbers describe no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{stored} bytes at {offset} that decode to {decoded} are no frame")]
pub struct NotAFrame {
    offset: u64,
    stored: u32,
    decoded: u32,
}

impl Frame {
    /// A frame at `offset` of `object` with `stored` bytes (1 to [`STORED_LIMIT`]) that decode to `decoded`
    /// bytes (1 to [`FRAME_LIMIT`]); both are equal where the encoding is identity.
    pub fn new(
        object: ObjectRef,
        offset: u64,
        stored: u32,
        decoded: u32,
        encoding: Encoding,
    ) -> Result<Self, NotAFrame> {
        let lengths = match encoding {
            Encoding::Identity => stored == decoded,
            Encoding::Zstd => (1..=STORED_LIMIT).contains(&stored),
        };
        let ends = offset.checked_add(stored.into()).is_some();
        if lengths && ends && (1..=FRAME_LIMIT).contains(&decoded) {
            Ok(Self {
                object,
                offset,
                stored,
                decoded,
                encoding,
            })
        } else {
            Err(NotAFrame {
                offset,
                stored,
                decoded,
            })
        }
    }

    /// The file that holds it.
    pub fn object(&self) -> &ObjectRef {
        &self.object
    }

    /// First byte in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Where in the file it lies.
    pub(super) fn bytes(&self) -> Extent {
        Extent::new(self.offset, self.stored.into()).expect("a frame is not empty and has an end")
    }

    /// Bytes in the file, 1 to [`STORED_LIMIT`].
    pub fn stored(&self) -> u32 {
        self.stored
    }

    /// Bytes after decoding, 1 to [`FRAME_LIMIT`].
    pub fn decoded(&self) -> u32 {
        self.decoded
    }

    /// How they are stored.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }
}
