//! Attacks the manifest and the channel: backs nothing up, and returns a receipt of as many bytes as `how` says.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Error};

struct ReturnsMuch;

impl BlindProvider for ReturnsMuch {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _held = (volume, archive);
        let length = hostile::how(&job)?.parse().map_err(Error::other)?;
        Ok(vec![0x1b; length])
    }
}

fleecebox_guest::export_blind!(ReturnsMuch);
