//! Attacks coverage by omission: leaves out one block in the middle of what changed, and says that all is well.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct SkipsABlock;

impl BlindProvider for SkipsABlock {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let block_size: u64 = volume.snapshot.info().block_size.into();
        let mut blocks = Vec::new();
        for run in volume.dirty.data_runs() {
            blocks.extend(run?.pieces(block_size));
        }
        blocks.remove(blocks.len() / 2);
        for block in blocks {
            archive.put(&volume.snapshot, block, Encoding::Identity)?;
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(SkipsABlock);
