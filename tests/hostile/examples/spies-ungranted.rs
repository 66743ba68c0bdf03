//! Attacks a policy that does not grant `read` to a provider whose world could use it: copies the disk into objects of
//! its own, claims a block to see what is answered, and where that is let pass and the host asks for the block, reads all
//! that `stored` serves.
//!
//! What it finds is what it answers with. The pattern to look for comes backwards, in `how`.

use std::io::{Read, Seek, SeekFrom, Write};

use fleecebox_guest::{Archive, Context, Encoding, Error, Image, Objects, Provider, Volume};

struct SpiesUngranted;

impl Provider for SpiesUngranted {
    type Image = Spy;

    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let info = volume.snapshot.info();
        job.info(format_args!("a reader: {}", volume.reader.is_some()));
        let mut blocks = Vec::new();
        for run in volume.dirty.data_runs() {
            blocks.extend(run?.pieces(info.block_size.into()));
        }
        let mut object = archive.create(&info.name, Encoding::Identity)?;
        for (index, &block) in blocks.iter().enumerate() {
            // What is written lies between what is spliced, so that a careless reader of ranges takes both.
            object.write_all(b"mine")?;
            match index {
                0 => object.claim(&volume.snapshot, block)?,
                _ => object.splice(&volume.snapshot, block)?,
            }
        }
        object.write_all(b"mine")?;
        object.finish()?;
        Ok(info.name.into_bytes())
    }
}

struct Spy;

impl Image for Spy {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Spy, Error> {
        let mut pattern = hostile::how(&job)?.into_bytes();
        pattern.reverse();
        let name = String::from_utf8_lossy(&receipt).into_owned();
        let mut object = objects.open(&name)?;
        let (mut served, mut refused) = (0, 0);
        for start in (0..64).chain((64..object.size()).step_by(1021)) {
            for length in [1, 5, 4096] {
                let mut bytes = vec![0; length.min((object.size() - start) as usize)];
                object.seek(SeekFrom::Start(start))?;
                match object.read_exact(&mut bytes).map_err(Error::from) {
                    Ok(()) if bytes.iter().all(|byte| b"mine".contains(byte)) => served += 1,
                    Ok(()) => return Err(Error::other("a byte of the disk was served")),
                    Err(Error::OutOfRange) => refused += 1,
                    Err(error) => return Err(error),
                }
            }
        }
        for other in [
            "da.spliced",
            "../da",
            "manifest.json",
            "pages",
            "objects/da",
        ] {
            if objects.open(other).is_ok() {
                return Err(Error::other(format_args!("'{other}' was served")));
            }
        }
        let found = hostile::in_memory(&pattern).is_some();
        Err(Error::other(format_args!(
            "its own bytes were served: {}, others were refused: {}, bytes of the disk in memory: {found}",
            served > 0,
            refused > 0,
        )))
    }

    fn read(&mut self, _offset: u64, _length: u32) -> Result<Vec<u8>, Error> {
        Err(Error::Io)
    }
}

fleecebox_guest::export!(SpiesUngranted);
