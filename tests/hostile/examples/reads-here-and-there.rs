//! Attacks the limit on what is read: asks for a single byte of each block, for which the host has to fetch far more.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::Copied;

struct ReadsHereAndThere;

impl Provider for ReadsHereAndThere {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _unused = archive;
        let block_size = volume.snapshot.info().block_size.into();
        let reader = volume
            .reader
            .ok_or_else(|| Error::other("no reader is granted"))?;
        for run in volume.dirty.data_runs() {
            for block in run?.pieces(block_size) {
                reader.read(block.offset, 1)?;
            }
        }
        Err(Error::other(
            "every block was looked at for the price of a byte",
        ))
    }
}

fleecebox_guest::export!(ReadsHereAndThere);
