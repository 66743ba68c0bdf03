//! Attacks coverage by omission: leaves out the last run of what changed, and says that all is well.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct SkipsARange;

impl BlindProvider for SkipsARange {
    fn run(
        _job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let mut object = archive.create(&volume.snapshot.info().name, Encoding::Zstd)?;
        let mut before = None;
        for run in volume.dirty.data_runs() {
            if let Some(run) = before.replace(run?) {
                object.splice(&volume.snapshot, run)?;
            }
        }
        object.finish()?;
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(SkipsARange);
