//! The stream. All numbers are little-endian; offsets are of the volume, positions of the stream, both in bytes.
//!
//! ```text
//! header   "FBIMAGE1"  size of the volume: u64
//! record   "DATA"      offset: u64  length: u64  bytes                     as many as there are runs of data
//! page     "PAGE"      count: u32   count × (offset: u64  length: u64  position of the bytes: u64)
//! root     "ROOT"      count: u32   count × (first offset: u64  position of the page: u64)
//! trailer  position of the root: u64  "FBIMAGE1"
//! ```
//!
//! Records ascend and do not overlap; zeroes are not stored. After every [`ENTRIES_PER_PAGE`] records, and after the
//! last, a page lists the records since the page before. The root lists all pages. So neither writing nor reading
//! keeps more in memory than the root and one page, however large and fragmented the volume is, and a reader finds
//! any offset by two binary searches. A reader that has lost the end can walk the stream from its start.

use std::io;

use fleecebox_guest::Error;

pub(crate) const MAGIC: [u8; 8] = *b"FBIMAGE1";
pub(crate) const RECORD: [u8; 4] = *b"DATA";
pub(crate) const PAGE: [u8; 4] = *b"PAGE";
pub(crate) const ROOT: [u8; 4] = *b"ROOT";

/// Magic and size.
pub(crate) const HEADER_LENGTH: u64 = 8 + 8;
/// Tag, offset and length.
pub(crate) const RECORD_HEADER_LENGTH: u64 = 4 + 8 + 8;
/// Tag and count, before a list.
pub(crate) const LIST_HEADER_LENGTH: u64 = 4 + 4;
/// Offset, length and position.
pub(crate) const ENTRY_LENGTH: u64 = 8 + 8 + 8;
/// Offset and position.
pub(crate) const ROOT_ENTRY_LENGTH: u64 = 8 + 8;
/// Position and magic.
pub(crate) const TRAILER_LENGTH: u64 = 8 + 8;

/// A page of 96 KiB, and a root of 32 KiB for a TiB of which every other 64 KiB block is stored.
pub(crate) const ENTRIES_PER_PAGE: usize = if cfg!(test) { 4 } else { 4096 };

/// Where one run of the volume lies in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) position: u64,
}

/// Where one page lies in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RootEntry {
    pub(crate) first_offset: u64,
    pub(crate) position: u64,
}

/// Why a stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormatError {
    /// It does not begin or does not end as a stream does.
    #[error("the object is not a complete image stream")]
    NotAnImage,
    /// A list is not where it should be, or does not hold what it should.
    #[error("the image stream's index is damaged at position {position}")]
    Damaged { position: u64 },
    /// That byte of the volume is in no record.
    #[error("the image stream holds nothing for offset {offset}")]
    NotStored { offset: u64 },
    /// The object could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<FormatError> for Error {
    fn from(error: FormatError) -> Error {
        match error {
            FormatError::Io(error) => error.into(),
            error => Error::other(error),
        }
    }
}
