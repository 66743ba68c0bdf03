//! Gives back one wrong byte in every megabyte but the first.

use fleecebox_guest::{Archive, Context, Error, Image, Objects, Provider, Volume};
use hostile::{Copied, Copy};

struct CorruptsOneByteInRestore;

impl Provider for CorruptsOneByteInRestore {
    type Image = Corrupting;

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

struct Corrupting(Copied);

impl Image for Corrupting {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Self, Error> {
        Ok(Corrupting(Copied::open(job, objects, receipt)?))
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let mut bytes = self.0.read(offset, length)?;
        if offset >= 1 << 20
            && let Some(byte) = bytes.get_mut(77)
        {
            *byte = byte.wrapping_add(1);
        }
        Ok(bytes)
    }
}

fleecebox_guest::export!(CorruptsOneByteInRestore);
