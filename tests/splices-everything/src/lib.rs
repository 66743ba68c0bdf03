//! The benchmark's provider: splices all that changed into one object, so that what is measured is the host.
//!
//! Settings: `encoding`, `"zstd"` or `"identity"`.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct SplicesEverything;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    encoding: Encoding,
}

impl BlindProvider for SplicesEverything {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let settings: Settings = job.settings()?;
        let name = volume.snapshot.info().name;
        let mut object = archive.create(&name, settings.encoding)?;
        for run in volume.dirty.data_runs() {
            object.splice(&volume.snapshot, run?)?;
        }
        object.finish()?;
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(SplicesEverything);
