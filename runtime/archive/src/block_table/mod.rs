//! The block table of one volume in one backup: per block its digest and where its bytes are.
//!
//! It is a tree of small pages. A leaf lists [`FAN_OUT`] blocks as runs, an inner page refers to [`FAN_OUT`] pages
//! below it. A reference names the backup whose `pages` object holds the page, where, and the page's
//! digest, so an incremental writes only the pages on the way to what it changed and refers to its
//! base's for the rest. What is all zero has no page: a sparse volume costs nothing, however large.

mod page;
mod pages;
mod reader;
mod walk;
mod writer;

pub(super) use pages::PagesFile;
pub use reader::BlockTable;
pub(super) use walk::{LeafRef, LostPage, Reached, Walk, file as pages_file};
pub use writer::BlockTableWriter;

use super::error::Error;
use super::frame::Frame;
use super::name::BackupId;
use fleecebox_contract::digest::Digest;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Blocks of a leaf, and pages below an inner page.
pub(super) const FAN_OUT: u64 = 128;

/// Smallest block size, in bytes: smaller ones would make tables larger than what they save.
pub const MIN_BLOCK_SIZE: u32 = 4 << 10;

/// Largest block size, in bytes: a block lies in one frame.
pub const MAX_BLOCK_SIZE: u32 = super::frame::FRAME_LIMIT;

/// Where the bytes of one block are, and what they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nowhere: it reads as zeroes.
    Zero,
    /// In a frame that the host stored.
    Placed {
        /// Of the block's bytes.
        digest: Digest,
        /// Holds the whole block.
        frame: Frame,
        /// Where in the decoded frame the block begins, in bytes.
        skip: u32,
    },
    /// The provider says that it holds the block in that backup.
    Claimed {
        /// Of the block's bytes as of the point in time.
        digest: Digest,
        /// Whose `image` gives it back.
        backup: BackupId,
    },
}

/// Neighbouring blocks that one rule describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Indices of the blocks, not empty.
    pub blocks: Range<u64>,
    /// Where they are.
    pub content: RunContent,
}

/// Where the blocks of a [`Run`] are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunContent {
    /// They read as zeroes.
    Zero,
    /// One after the other in one frame.
    Placed {
        /// Holds all of them.
        frame: Frame,
        /// Where in the decoded frame the first one begins, in bytes.
        skip: u32,
        /// One per block.
        digests: Vec<Digest>,
    },
    /// Claimed in one backup.
    Claimed {
        /// Whose `image` gives them back.
        backup: BackupId,
        /// One per block.
        digests: Vec<Digest>,
    },
}

/// The root of a table, as a manifest keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRoot {
    shape: Shape,
    page: Option<PageRef>,
}

impl TableRoot {
    /// Size of the volume, in bytes.
    pub fn size(&self) -> u64 {
        self.shape.size
    }

    /// In bytes: a power of two from [`MIN_BLOCK_SIZE`] to [`MAX_BLOCK_SIZE`].
    pub fn block_size(&self) -> u32 {
        self.shape.block_size
    }

    /// Number of blocks, a short last one included.
    pub fn blocks(&self) -> u64 {
        self.shape.blocks()
    }

    /// Length of block `block` in bytes; less than the block size for a short last one, 0 past the end.
    pub fn block_length(&self, block: u64) -> u32 {
        self.shape.block_length(block)
    }
}

/// A page in the `pages` object of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PageRef {
    backup: BackupId,
    offset: u64,
    length: u32,
    digest: Digest,
}

impl PageRef {
    /// Whether the page has these bytes.
    fn is_of(&self, bytes: &[u8]) -> bool {
        self.digest == Digest::of(bytes)
    }
}

/// The volume that a table describes, and with it the form of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawShape", into = "RawShape")]
pub(super) struct Shape {
    size: u64,
    block_size: u32,
}

#[derive(Serialize, Deserialize)]
struct RawShape {
    size: u64,
    block_size: u32,
}

/// The block size is no power of two within the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a block size of {0} bytes is not supported")]
pub(super) struct NotABlockSize(u32);

impl Shape {
    fn new(size: u64, block_size: u32) -> Result<Self, NotABlockSize> {
        let limits = MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE;
        if block_size.is_power_of_two() && limits.contains(&block_size) {
            Ok(Self { size, block_size })
        } else {
            Err(NotABlockSize(block_size))
        }
    }

    fn blocks(self) -> u64 {
        self.size.div_ceil(self.block_size.into())
    }

    fn block_length(self, block: u64) -> u32 {
        let start = block.saturating_mul(self.block_size.into());
        let rest = self.size.saturating_sub(start);
        // Not above the block size, so it fits.
        rest.min(self.block_size.into()) as u32
    }

    /// Bytes of some neighbouring blocks.
    fn length(self, blocks: Range<u64>) -> u64 {
        let size = u64::from(self.block_size);
        let end = blocks.end.saturating_mul(size).min(self.size);
        end.saturating_sub(blocks.start.saturating_mul(size))
    }

    /// Blocks that the leaf of this number lists.
    fn leaf_blocks(self, leaf: u64) -> Range<u64> {
        let start = leaf.saturating_mul(FAN_OUT);
        start..start.saturating_add(FAN_OUT).min(self.blocks()).max(start)
    }

    /// Levels of inner pages above the leaves: the root is at this level.
    fn height(self) -> u32 {
        (0..)
            .find(|&level| span(level) >= self.blocks())
            .unwrap_or(u32::MAX)
    }
}

/// Blocks below a page of a level; leaves are level 0.
fn span(level: u32) -> u64 {
    FAN_OUT.saturating_pow(level.saturating_add(1))
}

impl TryFrom<RawShape> for Shape {
    type Error = NotABlockSize;

    fn try_from(raw: RawShape) -> Result<Self, NotABlockSize> {
        Self::new(raw.size, raw.block_size)
    }
}

impl From<Shape> for RawShape {
    fn from(shape: Shape) -> Self {
        Self {
            size: shape.size,
            block_size: shape.block_size,
        }
    }
}

impl From<NotABlockSize> for Error {
    fn from(NotABlockSize(actual): NotABlockSize) -> Self {
        Self::BlockSize { actual }
    }
}
