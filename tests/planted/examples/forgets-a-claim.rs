//! Claims a run when the next begins, and so never the last one.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::{Copied, Copy};

struct ForgetsAClaim;

impl Provider for ForgetsAClaim {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        let mut before = None;
        while let Some(run) = copy.runs.next() {
            let run = run?;
            copy.store(run, |_| ())?;
            if let Some(before) = before.replace(run) {
                copy.object.claim(&copy.snapshot, before)?;
            }
        }
        copy.object.finish()?;
        Ok(receipt)
    }
}

fleecebox_guest::export!(ForgetsAClaim);
