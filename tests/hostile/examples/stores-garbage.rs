//! Attacks the proof of claims: claims everything, but what it stores is not what the volume holds.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::{Copied, Copy};

struct StoresGarbage;

impl Provider for StoresGarbage {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|bytes| bytes.fill(0xbd))?;
        copy.object.finish()?;
        Ok(receipt)
    }
}

fleecebox_guest::export!(StoresGarbage);
