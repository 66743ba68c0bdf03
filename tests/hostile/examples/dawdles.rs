//! Attacks the end of a run: stores everything as it should, then keeps the job waiting before it says so, so that a
//! test can break the snapshot after its last read.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

/// Some seconds' work, which nobody waits for longer than a test needs.
const TURNS: u64 = 3_000_000_000;

struct Dawdles;

impl BlindProvider for Dawdles {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let block_size: u64 = volume.snapshot.info().block_size.into();
        for run in volume.dirty.data_runs() {
            for piece in run?.pieces(block_size) {
                archive.put(&volume.snapshot, piece, Encoding::Zstd)?;
            }
        }
        job.info("all of it is stored");
        for turn in 0..TURNS {
            std::hint::black_box(turn);
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(Dawdles);
