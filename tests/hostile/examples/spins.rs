//! Attacks the time that a job may take: never returns.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct Spins;

impl BlindProvider for Spins {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _held = (volume, archive, Encoding::Zstd);
        loop {
            std::hint::spin_loop();
        }
    }
}

fleecebox_guest::export_blind!(Spins);
