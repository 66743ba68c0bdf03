//! A seeded generator, so that a failing run can be repeated.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use crate::MIB;

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same sequence on every machine.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which must not be 0. The slight bias is of no matter to a test.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }

    /// Fills `bytes` with what does not compress and is never all zero at 8 bytes or more.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let random = (self.bits() | 1).to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }

    /// Makes a file of `mebibytes` that [`Random::fill`] filled.
    ///
    /// # Errors
    /// When there is no room.
    pub fn fill_file(&mut self, path: &Path, mebibytes: u64) -> io::Result<()> {
        let mut file = File::create(path)?;
        let mut piece = vec![0; MIB as usize];
        for _ in 0..mebibytes {
            self.fill(&mut piece);
            file.write_all(&piece)?;
        }
        Ok(())
    }
}
