//! Remembers in memory where it wrote each run, and relies on that when it gives them back.

use std::io::{Read, Seek, SeekFrom};
use std::sync::Mutex;

use fleecebox_guest::{
    Archive, Context, Error, Extent, Image, Objects, Provider, StoredObject, Volume,
};
use hostile::Copy;

static RUNS: Mutex<Vec<(Extent, u64)>> = Mutex::new(Vec::new());

struct KeepsStateBetweenInstances;

impl Provider for KeepsStateBetweenInstances {
    type Image = Remembered;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        let mut position = 0;
        while let Some(run) = copy.runs.next() {
            let run = run?;
            copy.store(run, |_| ())?;
            copy.object.claim(&copy.snapshot, run)?;
            let mut runs = RUNS.lock().map_err(|_| Error::other("poisoned"))?;
            runs.push((run, position + 16));
            position += 16 + run.length;
        }
        copy.object.finish()?;
        Ok(receipt)
    }
}

struct Remembered(StoredObject);

impl Image for Remembered {
    fn open(_job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Remembered, Error> {
        let name = String::from_utf8(receipt).map_err(|_| Error::other("not a receipt"))?;
        Ok(Remembered(objects.open(&name)?))
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let runs = RUNS.lock().map_err(|_| Error::other("poisoned"))?;
        let (run, position) = *runs
            .iter()
            .find(|(run, _)| run.offset <= offset && offset + u64::from(length) <= run.end())
            .ok_or(Error::OutOfRange)?;
        let mut bytes = vec![0; length as usize];
        self.0
            .seek(SeekFrom::Start(position + offset - run.offset))?;
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fleecebox_guest::export!(KeepsStateBetweenInstances);
