//! The digest of a block: BLAKE3 of its bytes as of the point in time.

use serde::{Deserialize, Serialize};
use std::fmt;

/// BLAKE3 of one block. The volume's short last block is hashed at its own length.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Digest(#[serde(with = "hex")] pub [u8; 32]);

impl Digest {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// The digests of consecutive blocks of `block` bytes; the last may be short.
pub fn of_blocks(bytes: &[u8], block: u32) -> Vec<Digest> {
    bytes.chunks(block as usize).map(Digest::of).collect()
}
