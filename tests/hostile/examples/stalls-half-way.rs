//! Attacks the time that a job may take: spins for ever once half of what changed is stored, so that a test can kill or
//! cancel a job at leisure in the middle of its run.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct StallsHalfWay;

impl BlindProvider for StallsHalfWay {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let chunk_size: u64 = volume.snapshot.info().block_size.into();
        let mut chunks = Vec::new();
        for run in volume.dirty.data_runs() {
            chunks.extend(run?.pieces(chunk_size));
        }
        for chunk in &chunks[..chunks.len() / 2] {
            archive.put(&volume.snapshot, *chunk, Encoding::Zstd)?;
        }
        job.info("half of it is stored");
        loop {
            std::hint::spin_loop();
        }
    }
}

fleecebox_guest::export_blind!(StallsHalfWay);
