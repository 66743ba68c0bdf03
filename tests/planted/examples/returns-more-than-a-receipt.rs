//! Backs up as it should, and returns one byte more than the contract allows.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error, MAX_PUT};

struct ReturnsMoreThanAReceipt;

impl BlindProvider for ReturnsMoreThanAReceipt {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        for run in volume.dirty.data_runs() {
            for chunk in run?.pieces(MAX_PUT) {
                archive.put(&volume.snapshot, chunk, Encoding::Zstd)?;
            }
        }
        Ok(vec![0; (64 << 10) + 1])
    }
}

fleecebox_guest::export_blind!(ReturnsMoreThanAReceipt);
