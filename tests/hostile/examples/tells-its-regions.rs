//! Attacks nothing: logs each region that it is given and stores it, so that a test can compare the list.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error, RegionKind};

struct TellsItsRegions;

impl BlindProvider for TellsItsRegions {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let block_size: u64 = volume.snapshot.info().block_size.into();
        for region in volume.dirty {
            let region = region?;
            let range = region.range;
            job.info(format_args!("region {} {}", range.offset, range.length));
            if region.kind == RegionKind::Data {
                for piece in range.pieces(block_size) {
                    archive.put(&volume.snapshot, piece, Encoding::Zstd)?;
                }
            }
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(TellsItsRegions);
