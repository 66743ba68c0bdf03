//! A disk image whose ext4 file system is consistent at every moment, though it is written all
//! the while: only the data of files that already have their blocks is overwritten.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::process::{run, tool};
use crate::{MIB, Random};

/// The file whose blocks may be overwritten.
const DATA_FILE: &str = "data";

/// A raw image with ext4 in which half of the space belongs to one file full of data.
#[derive(Clone, Debug)]
pub struct Ext4Disk {
    /// The raw image, to be given to [`Disk::holding`](crate::Disk::holding).
    pub path: PathBuf,
    /// Where file data lies on the disk, in bytes, in ascending order: for
    /// [`Load::regions`](crate::Load).
    pub data_extents: Vec<Range<u64>>,
}

impl Ext4Disk {
    /// Makes the image at `path`; needs neither mounting nor root. The files' bytes follow from
    /// `size` alone, ext4's own ids do not.
    ///
    /// # Errors
    /// When e2fsprogs is missing or `size` is below 8 MiB.
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        if size < 8 * MIB {
            bail!("a disk of {size} bytes is too small for ext4 with data, 8 MiB is the least");
        }
        let content = TempDir::with_prefix("fleecebox-ext4-")?;
        // mkfs leaves blocks of zeroes out, so every block has to hold something.
        let mut random = Random::new(size);
        let mut file = File::create(content.path().join(DATA_FILE))?;
        let mut piece = vec![0; MIB as usize];
        for _ in 0..size / 2 / MIB {
            random.fill(&mut piece);
            file.write_all(&piece)?;
        }
        File::create(path)?.set_len(size)?;
        let mut mkfs = tool("mkfs.ext4");
        mkfs.args(["-q", "-F", "-b", "4096", "-d"])
            .arg(content.path())
            .arg(path);
        run("e2fsprogs", &mut mkfs)?;
        let request = format!("dump_extents -l /{DATA_FILE}");
        let listing = run(
            "e2fsprogs",
            tool("debugfs").args(["-R", &request]).arg(path),
        )?
        .stdout;
        let data_extents = parse_extents(&String::from_utf8(listing)?, 4096)?;
        let found: u64 = data_extents
            .iter()
            .map(|extent| extent.end - extent.start)
            .sum();
        if found < size / 2 / MIB * MIB {
            bail!("only {found} bytes of data in {}", path.display());
        }
        Ok(Self {
            path: path.into(),
            data_extents,
        })
    }
}

/// Reads debugfs' table, whose rows are
/// `level/depth entry/entries first-logical - last-logical first-physical - last-physical length`.
fn parse_extents(listing: &str, block_size: u64) -> Result<Vec<Range<u64>>> {
    let mut extents = listing
        .lines()
        .skip(1)
        .map(|line| {
            let spaced = line.replace(['/', '-'], " ");
            let numbers: Vec<u64> = spaced
                .split_whitespace()
                .map_while(|word| word.parse().ok())
                .collect();
            let extent = match numbers[..] {
                [_, _, _, _, _, _, first, last, ..] if first <= last => {
                    bytes(first, last, block_size)
                }
                _ => None,
            };
            extent.with_context(|| format!("not a row of debugfs' dump_extents: {line:?}"))
        })
        .collect::<Result<Vec<_>>>()
        .context("reading the blocks of the data file")?;
    extents.sort_by_key(|extent| extent.start);
    Ok(extents)
}

fn bytes(first: u64, last: u64, block_size: u64) -> Option<Range<u64>> {
    Some(first.checked_mul(block_size)?..last.checked_add(1)?.checked_mul(block_size)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_a_listing_of_debugfs() {
        let listing = "Level Entries       Logical      Physical Length Flags\n \
             0/ 0   1/  2     0 -  3807  4385 -  8192   3808 \n \
             0/ 0   2/  2  3808 - 11741     3 -     3      1 Uninit\n";
        assert_eq!(
            parse_extents(listing, 1024).unwrap(),
            [3072..4096, 4385 * 1024..8193 * 1024]
        );
    }

    #[test]
    fn a_row_that_is_none_is_refused() {
        assert!(parse_extents("header\nsomething else\n", 4096).is_err());
    }

    /// Mostly sensible ones, some reversed or beyond any disk.
    fn first_and_last() -> impl Strategy<Value = (u64, u64)> {
        prop_oneof![
            9 => (0..1u64 << 40).prop_flat_map(|first| (Just(first), first..1 << 41)),
            1 => (any::<u64>(), any::<u64>()),
        ]
    }

    proptest! {
        #[test]
        fn extents_come_out_as_they_went_in(
            written in proptest::collection::vec(first_and_last(), 0..4),
        ) {
            let rows: String = written
                .iter()
                .map(|(first, last)| format!(" 0/ 0 1/ 1 0 - 0 {first} - {last} 1\n"))
                .collect();
            let block_size = 4096;
            let fits = |&(first, last): &(u64, u64)| first <= last && last < u64::MAX / block_size;
            match parse_extents(&format!("header\n{rows}"), block_size) {
                Ok(extents) => {
                    let mut expected: Vec<_> = written
                        .iter()
                        .map(|(first, last)| first * block_size..(last + 1) * block_size)
                        .collect();
                    expected.sort_by_key(|extent| extent.start);
                    prop_assert_eq!(extents, expected);
                }
                Err(_) => prop_assert!(!written.iter().all(fits)),
            }
        }
    }
}
