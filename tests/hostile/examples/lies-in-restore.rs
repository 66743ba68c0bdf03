//! Attacks the proof of claims: stores everything honestly, and flips one bit of each answer when it gives it back.

use fleecebox_guest::{Archive, Context, Error, Image, Objects, Provider, Volume};
use hostile::{Copied, Copy};

struct LiesInRestore;

impl Provider for LiesInRestore {
    type Image = FlipsABit;

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

struct FlipsABit(Copied);

impl Image for FlipsABit {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<FlipsABit, Error> {
        Ok(FlipsABit(Copied::open(job, objects, receipt)?))
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let mut bytes = self.0.read(offset, length)?;
        if let Some(byte) = bytes.last_mut() {
            *byte ^= 1;
        }
        Ok(bytes)
    }
}

fleecebox_guest::export!(LiesInRestore);
