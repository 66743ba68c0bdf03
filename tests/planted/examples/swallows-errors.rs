//! Does not look at what a call returns.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error, MAX_PUT};

struct SwallowsErrors;

impl BlindProvider for SwallowsErrors {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        for run in volume.dirty.data_runs().map_while(Result::ok) {
            for chunk in run.pieces(MAX_PUT) {
                let _ = archive.put(&volume.snapshot, chunk, Encoding::Zstd);
            }
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(SwallowsErrors);
