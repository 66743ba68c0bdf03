//! Shortens names, takes another where two are the same then, and forgets to say so in the receipt.

use std::io::Write;

use fleecebox_guest::{Archive, Context, Encoding, Error, Provider, Volume};
use hostile::Copied;

struct MixesUpTwoVolumes;

impl Provider for MixesUpTwoVolumes {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let reader = volume.reader.ok_or(Error::other("no reader is granted"))?;
        let short = format!("disk{}", volume.snapshot.info().name.len());
        let mut object = match archive.create(&short, Encoding::Identity) {
            Err(Error::Exists) => archive.create(&format!("{short}-b"), Encoding::Identity)?,
            created => created?,
        };
        for run in volume.dirty.data_runs() {
            let run = run?;
            object.write_all(&run.offset.to_le_bytes())?;
            object.write_all(&run.length.to_le_bytes())?;
            for piece in run.pieces(reader.max_read().into()) {
                object.write_all(&reader.read(piece.offset, piece.length as u32)?)?;
            }
            object.claim(&volume.snapshot, run)?;
        }
        object.finish()?;
        Ok(short.into_bytes())
    }
}

fleecebox_guest::export!(MixesUpTwoVolumes);
