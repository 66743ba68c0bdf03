//! Attacks coverage by silence: touches nothing, and says that all is well.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Error};

struct CoversNothing;

impl BlindProvider for CoversNothing {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _held = (job, volume, archive);
        Ok(b"all is well".to_vec())
    }
}

fleecebox_guest::export_blind!(CoversNothing);
