//! Counts its objects in memory, as if all volumes were backed up by one instance. It may see the bytes, so that all
//! volumes share the names of objects, although it has the host place them.

use std::sync::atomic::{AtomicU32, Ordering};

use fleecebox_guest::{Archive, Context, Encoding, Error, Provider, Volume};
use hostile::Copied;

static OBJECTS: AtomicU32 = AtomicU32::new(0);

struct NamesObjectsByACounter;

impl Provider for NamesObjectsByACounter {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
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

fleecebox_guest::export!(NamesObjectsByACounter);
