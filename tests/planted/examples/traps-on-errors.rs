//! Takes it for granted that every call succeeds and that every handle is granted.

use fleecebox_guest::{Archive, Context, Encoding, Error, Provider, Volume};
use hostile::Copied;
use std::io::Write;

struct TrapsOnErrors;

impl Provider for TrapsOnErrors {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let name = volume.snapshot.info().name;
        let reader = volume.reader.unwrap();
        let mut object = archive.create(&name, Encoding::Zstd).unwrap();
        for run in volume.dirty.data_runs() {
            let run = run.unwrap();
            object.write_all(&run.offset.to_le_bytes()).unwrap();
            object.write_all(&run.length.to_le_bytes()).unwrap();
            for piece in run.pieces(reader.max_read().into()) {
                let bytes = reader.read(piece.offset, piece.length as u32).unwrap();
                object.write_all(&bytes).unwrap();
            }
            object.claim(&volume.snapshot, run).unwrap();
        }
        object.finish().unwrap();
        Ok(name.into_bytes())
    }
}

fleecebox_guest::export!(TrapsOnErrors);
