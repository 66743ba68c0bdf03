//! Attacks the meaning of a claim: claims everything in an object that it never finishes, and never drops either.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::{Copied, Copy};

struct UnfinishedStreams;

impl Provider for UnfinishedStreams {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        std::mem::forget(copy.object);
        Ok(receipt)
    }
}

fleecebox_guest::export!(UnfinishedStreams);
