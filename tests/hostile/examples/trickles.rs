//! Attacks the fleecing image: stores one block now and then, while the guest goes on writing.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct Trickles;

impl BlindProvider for Trickles {
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
        for chunk in chunks {
            archive.put(&volume.snapshot, chunk, Encoding::Zstd)?;
            job.info("one block more");
            for _ in 0..1_000_000 {
                job.attachment("nothing to wait for");
            }
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(Trickles);
