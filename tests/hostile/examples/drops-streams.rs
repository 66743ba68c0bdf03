//! Attacks the meaning of a claim: claims everything in an object that it then throws away, and says that all is well.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::{Copied, Copy};

struct DropsStreams;

impl Provider for DropsStreams {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        drop(copy.object);
        Ok(receipt)
    }
}

fleecebox_guest::export!(DropsStreams);
