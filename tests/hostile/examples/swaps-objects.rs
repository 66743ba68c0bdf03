//! Attacks the proof with two instances that work together: that of each volume keeps the other's receipt, so that each
//! is sure that the bytes are there.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::{Copied, Copy};

struct SwapsObjects;

impl Provider for SwapsObjects {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        Ok(match &receipt[..] {
            b"da" => b"db".to_vec(),
            _ => b"da".to_vec(),
        })
    }
}

fleecebox_guest::export!(SwapsObjects);
