//! Digests of blocks, pages and files.

use crate::extent::Extent;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// A BLAKE3 digest. In text it is 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// A digest that was computed elsewhere.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

// A page holds 128 digests and is read by programs; a manifest holds a few and is read by people.
impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            hex::serde::serialize(self.0, serializer)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            hex::serde::deserialize(deserializer).map(Self)
        } else {
            Deserialize::deserialize(deserializer).map(Self)
        }
    }
}

/// The digests of consecutive blocks of `block` bytes, each as of the point in time; the last may be short.
pub fn of_blocks(bytes: &[u8], block: u32) -> Vec<Digest> {
    bytes.chunks(block as usize).map(Digest::of).collect()
}

/// The first block of `bytes`, which lie at `extent`, that has another digest.
pub fn first_wrong(bytes: &[u8], extent: Extent, block: u32, digests: &[Digest]) -> Option<Extent> {
    let found = of_blocks(bytes, block);
    if found.len() != digests.len() {
        return Some(extent);
    }
    extent
        .pieces(block.into())
        .zip(found.iter().zip(digests))
        .find(|(_, (found, expected))| found != expected)
        .map(|(extent, _)| extent)
}
