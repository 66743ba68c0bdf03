//! Gives an object a name that is one byte longer than the contract allows.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct NamesAnObjectAtLength;

impl BlindProvider for NamesAnObjectAtLength {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let mut object = archive.create(&"n".repeat(129), Encoding::Zstd)?;
        for run in volume.dirty.data_runs() {
            object.splice(&volume.snapshot, run?)?;
        }
        object.finish()?;
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(NamesAnObjectAtLength);
