//! Counts its objects in memory, as if all volumes were backed up by one instance.

use std::sync::atomic::{AtomicU32, Ordering};

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

static OBJECTS: AtomicU32 = AtomicU32::new(0);

struct NamesObjectsByACounter;

impl BlindProvider for NamesObjectsByACounter {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        for run in volume.dirty.data_runs() {
            let number = OBJECTS.fetch_add(1, Ordering::Relaxed);
            let mut object = archive.create(&format!("object-{number}"), Encoding::Zstd)?;
            object.splice(&volume.snapshot, run?)?;
            object.finish()?;
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(NamesObjectsByACounter);
