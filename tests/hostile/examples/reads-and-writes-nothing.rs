//! Attacks coverage by effort: reads everything, so that all looks busy, and keeps none of it.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::Copied;

struct ReadsAndWritesNothing;

impl Provider for ReadsAndWritesNothing {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let reader = volume
            .reader
            .ok_or_else(|| Error::other("no reader is granted"))?;
        let _unused = archive;
        for run in volume.dirty.data_runs() {
            for piece in run?.pieces(reader.max_read().into()) {
                std::hint::black_box(reader.read(piece.offset, piece.length as u32)?);
            }
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export!(ReadsAndWritesNothing);
