//! Attacks the proof of claims: claims everything, stores nothing, and has only excuses when asked for it.

use fleecebox_guest::{Archive, Context, Encoding, Error, Image, Objects, Provider, Volume};

struct ClaimsWithoutBytes;

impl Provider for ClaimsWithoutBytes {
    type Image = Excuse;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let name = volume.snapshot.info().name;
        let mut object = archive.create(&name, Encoding::Identity)?;
        for run in volume.dirty.data_runs() {
            object.claim(&volume.snapshot, run?)?;
        }
        object.finish()?;
        Ok(name.into_bytes())
    }
}

struct Excuse;

impl Image for Excuse {
    fn open(_job: Context, _objects: Objects, _receipt: Vec<u8>) -> Result<Excuse, Error> {
        Ok(Excuse)
    }

    fn read(&mut self, _offset: u64, _length: u32) -> Result<Vec<u8>, Error> {
        Err(Error::other("the bytes were here a moment ago"))
    }
}

fleecebox_guest::export!(ClaimsWithoutBytes);
