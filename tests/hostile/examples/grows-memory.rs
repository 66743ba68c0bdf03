//! Attacks the memory of the machine: takes more and more, and touches all of it.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct GrowsMemory;

impl BlindProvider for GrowsMemory {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _held = (volume, archive, Encoding::Zstd);
        let mut hoard = Vec::new();
        loop {
            hoard.push(std::hint::black_box(vec![0xa5_u8; 1 << 20]));
        }
    }
}

fleecebox_guest::export_blind!(GrowsMemory);
