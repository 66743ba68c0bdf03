//! Where a disk's bytes are as of the point in time, whoever took it.

use std::path::PathBuf;

/// An NBD export of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The disk, as its VM names it.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Of the NBD server.
    pub socket: PathBuf,
    /// Its export there.
    pub export: String,
    /// The meta context that tells what changed since another point in time; without it all is to be read.
    pub dirty_context: Option<String>,
}

impl Source {
    /// The same, to be read in full.
    pub fn in_full(self) -> Self {
        Self {
            dirty_context: None,
            ..self
        }
    }
}
