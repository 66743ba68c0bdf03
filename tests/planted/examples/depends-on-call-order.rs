//! Reads its object from the beginning to the end, whatever it is asked for: so the bytes are right as long as all is
//! asked for in ascending order.

use std::io::{Read, Seek, SeekFrom};

use fleecebox_guest::{
    Archive, Context, Error, Extent, Image, Objects, Provider, StoredObject, Volume,
};
use hostile::Copy;

struct DependsOnCallOrder;

impl Provider for DependsOnCallOrder {
    type Image = Tape;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        Ok(receipt)
    }
}

struct Tape {
    object: StoredObject,
    runs: Vec<(Extent, u64)>,
    run: usize,
    given: u64,
}

impl Image for Tape {
    fn open(_job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Tape, Error> {
        let name = String::from_utf8(receipt).map_err(|_| Error::other("not a receipt"))?;
        let (object, runs) = planted::index(&objects, &name)?;
        Ok(Tape {
            object,
            runs,
            run: 0,
            given: 0,
        })
    }

    fn read(&mut self, _offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let &(run, position) = self.runs.get(self.run).ok_or(Error::OutOfRange)?;
        let mut bytes = vec![0; length as usize];
        self.object.seek(SeekFrom::Start(position + self.given))?;
        self.object.read_exact(&mut bytes)?;
        self.given += u64::from(length);
        if self.given >= run.length {
            self.given = 0;
            self.run += 1;
        }
        Ok(bytes)
    }
}

fleecebox_guest::export!(DependsOnCallOrder);
