//! Attacks the archive: makes a million objects.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct MakesObjects;

impl BlindProvider for MakesObjects {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let name = volume.snapshot.info().name;
        for number in 0..1_000_000 {
            match archive.create(&format!("{name}-{number}"), Encoding::Identity) {
                Ok(object) => drop(object.finish()?),
                Err(error) => {
                    job.info(format_args!("{number} objects are made"));
                    return Err(error);
                }
            }
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(MakesObjects);
