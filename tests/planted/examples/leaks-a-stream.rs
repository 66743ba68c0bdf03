//! Writes an index beside the data, and neither finishes nor drops it.

use std::io::Write;

use fleecebox_guest::{Archive, Context, Encoding, Error, Provider, Volume};
use hostile::{Copied, Copy};

struct LeaksAStream;

impl Provider for LeaksAStream {
    type Image = Copied;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let name = volume.snapshot.info().name;
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        let mut index = archive.create(&format!("{name}.index"), Encoding::Zstd)?;
        index.write_all(b"everything is in one object")?;
        std::mem::forget(index);
        Ok(receipt)
    }
}

fleecebox_guest::export!(LeaksAStream);
