//! Attacks an incremental as the component that has taken the place of the one that made the base: stores everything
//! honestly, but returns the receipt of the base, which another component wrote in another job.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::{Copied, Copy};

struct ReplaysAReceipt;

impl Provider for ReplaysAReceipt {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, _receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        base.ok_or_else(|| Error::other("there is no receipt to replay"))
    }
}

fleecebox_guest::export!(ReplaysAReceipt);
