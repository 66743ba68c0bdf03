//! Attacks the clock that ends endless work: does nothing but copy memory in bulk, in which no single instruction of its
//! own passes.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Error};

struct CopiesMemory;

impl BlindProvider for CopiesMemory {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _held = (job, volume, archive);
        let mut bytes = vec![1_u8; 32 << 20];
        let half = bytes.len() / 2;
        loop {
            std::hint::black_box(&mut bytes).copy_within(..half, half);
        }
    }
}

fleecebox_guest::export_blind!(CopiesMemory);
