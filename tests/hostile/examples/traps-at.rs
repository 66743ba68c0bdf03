//! Attacks what is left behind: traps right after one of the host's calls, which `how` names, and is honest otherwise.

use std::io::{Read, Write};

use fleecebox_guest::{
    Archive, Context, Encoding, Error, Extent, Image, Objects, Provider, Volume,
};
use hostile::Copied;

struct TrapsAt;

fn at(how: &str, call: &str) {
    assert!(how != call, "this call was {call}");
}

impl Provider for TrapsAt {
    type Image = TrapsInRestore;

    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let how = hostile::how(&job)?;
        at(&how, "settings");
        job.info("about to trap");
        at(&how, "log");
        let _ = job.attachment("guest-config");
        at(&how, "attachment");
        let info = volume.snapshot.info();
        at(&how, "info");
        let mut blocks = Vec::new();
        for run in volume.dirty.data_runs() {
            at(&how, "next");
            blocks.extend(run?.pieces(info.block_size.into()));
        }
        let (Some(reader), Some(discarder)) = (volume.reader, volume.discarder) else {
            return Err(Error::other("no reader or no discarder is granted"));
        };
        let [first, second, ref rest @ ..] = blocks[..] else {
            return Err(Error::other("fewer than two blocks are dirty"));
        };
        archive.put(&volume.snapshot, first, Encoding::Zstd)?;
        at(&how, "put");
        discarder.discard(first)?;
        at(&how, "discard");
        let mut spliced = archive.create(&format!("{}.spliced", info.name), Encoding::Zstd)?;
        at(&how, "create");
        spliced.splice(&volume.snapshot, second)?;
        at(&how, "splice");
        spliced.finish()?;
        at(&how, "finish");
        let mut object = archive.create(&info.name, Encoding::Identity)?;
        for &Extent { offset, length } in rest {
            let bytes = reader.read(offset, length as u32)?;
            at(&how, "read");
            object.write_all(&offset.to_le_bytes())?;
            at(&how, "write");
            object.write_all(&length.to_le_bytes())?;
            object.write_all(&bytes)?;
            object.claim(&volume.snapshot, Extent { offset, length })?;
            at(&how, "claim");
        }
        if how == "drop" {
            drop(object);
            panic!("this call was drop");
        }
        object.finish()?;
        at(&how, "return");
        Ok(info.name.into_bytes())
    }
}

struct TrapsInRestore {
    how: String,
    objects: Objects,
    name: String,
}

impl Image for TrapsInRestore {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<TrapsInRestore, Error> {
        let how = hostile::how(&job)?;
        at(&how, "image-open");
        let name = String::from_utf8_lossy(&receipt).into_owned();
        objects.open(&name)?;
        at(&how, "object-size");
        // Reads through the honest half, so that only the trap is at fault.
        drop(Copied::open(job, objects.clone(), receipt)?);
        Ok(TrapsInRestore { how, objects, name })
    }

    fn read(&mut self, _offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        at(&self.how, "image-read");
        let mut bytes = vec![0; length as usize];
        self.objects.open(&self.name)?.read_exact(&mut bytes[..1])?;
        at(&self.how, "object-read");
        Ok(bytes)
    }
}

fleecebox_guest::export!(TrapsAt);
