//! Attacks what is left behind: panics when half of what changed is stored.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct TrapsHalfWay;

impl BlindProvider for TrapsHalfWay {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let chunk_size: u64 = volume.snapshot.info().block_size.into();
        let mut chunks = Vec::new();
        for run in volume.dirty.data_runs() {
            chunks.extend(run?.pieces(chunk_size));
        }
        for (index, chunk) in chunks.iter().enumerate() {
            assert!(index < chunks.len() / 2, "half-way");
            archive.put(&volume.snapshot, *chunk, Encoding::Zstd)?;
        }
        panic!("there was nothing to store")
    }
}

fleecebox_guest::export_blind!(TrapsHalfWay);
