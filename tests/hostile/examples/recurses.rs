//! Attacks the stack of the process that it runs in: calls itself without end.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Error};

struct Recurses;

#[allow(unconditional_recursion)] // is what it is for
fn descend(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 64]);
    descend(depth + 1) + frame[(depth % 64) as usize]
}

impl BlindProvider for Recurses {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _held = (job, volume, archive);
        Ok(vec![descend(0) as u8])
    }
}

fleecebox_guest::export_blind!(Recurses);
