//! An honest provider, as small as can be, for hostile ones to fall from.
//!
//! Each example of this package is a provider that attacks one promise of the host's. Where only `run` or only
//! `restore` lies, the other half is the honest one from here.

use std::io::{Read, Seek, SeekFrom, Write};

use fleecebox_guest::{
    Archive, Context, DataRuns, DirtyRegions, Encoding, Error, Extent, Image, Objects,
    OutputStream, Reader, Snapshot, StoredObject, Volume,
};

/// The setting `how`, by which one attack comes in several kinds.
pub fn how(job: &Context) -> Result<String, Error> {
    #[derive(serde::Deserialize)]
    struct Settings {
        how: String,
    }
    Ok(job.settings::<Settings>()?.how)
}

/// Where `pattern` lies in all of the instance's memory, but for `pattern` itself.
#[cfg(target_arch = "wasm32")]
pub fn in_memory(pattern: &[u8]) -> Option<usize> {
    let end = core::arch::wasm32::memory_size::<0>() << 16;
    let own = pattern.as_ptr() as usize;
    (1..end.saturating_sub(pattern.len())).find(|&at| {
        // SAFETY: All of a linear memory below its size can be read, and nothing else runs meanwhile.
        let is =
            |i: usize| unsafe { core::ptr::read_volatile((at + i) as *const u8) == pattern[i] };
        at != own && (0..pattern.len()).all(is)
    })
}

/// A native build has no linear memory.
#[cfg(not(target_arch = "wasm32"))]
pub fn in_memory(_pattern: &[u8]) -> Option<usize> {
    None
}

/// A backup in the making: one object that holds, for each run of data, its offset, its length and its bytes.
pub struct Copy {
    /// The volume.
    pub snapshot: Snapshot,
    /// Its bytes.
    pub reader: Reader,
    /// What of it is to be backed up.
    pub runs: DataRuns<DirtyRegions>,
    /// Where it goes.
    pub object: OutputStream,
}

impl Copy {
    /// Begins the volume's object. The receipt is the object's name.
    pub fn begin(volume: Volume, archive: &Archive) -> Result<(Copy, Vec<u8>), Error> {
        let name = volume.snapshot.info().name;
        let copy = Copy {
            object: archive.create(&name, Encoding::Identity)?,
            reader: volume
                .reader
                .ok_or_else(|| Error::other("no reader is granted"))?,
            snapshot: volume.snapshot,
            runs: volume.dirty.data_runs(),
        };
        Ok((copy, name.into_bytes()))
    }

    /// Stores the bytes of a run, as `change` leaves them.
    pub fn store(&mut self, run: Extent, change: impl Fn(&mut [u8])) -> Result<(), Error> {
        self.object.write_all(&run.offset.to_le_bytes())?;
        self.object.write_all(&run.length.to_le_bytes())?;
        for piece in run.pieces(self.reader.max_read().into()) {
            let mut bytes = self.reader.read(piece.offset, piece.length as u32)?;
            change(&mut bytes);
            self.object.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Stores and claims all that there is, with bytes as `change` leaves them.
    pub fn store_and_claim_all(&mut self, change: impl Fn(&mut [u8])) -> Result<(), Error> {
        while let Some(run) = self.runs.next() {
            let run = run?;
            self.store(run, &change)?;
            self.object.claim(&self.snapshot, run)?;
        }
        Ok(())
    }
}

/// What [`struct@Copy`] stored, read back as it is.
pub struct Copied {
    object: StoredObject,
    /// Runs of the volume, each with the position of its bytes in the object.
    runs: Vec<(Extent, u64)>,
}

impl Image for Copied {
    fn open(_job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Copied, Error> {
        let name = String::from_utf8(receipt).map_err(|_| Error::other("not a receipt"))?;
        let mut object = objects.open(&name)?;
        let mut runs = Vec::new();
        let mut position = 0;
        while position < object.size() {
            let mut header = [[0; 8]; 2];
            object.seek(SeekFrom::Start(position))?;
            object.read_exact(header.as_flattened_mut())?;
            let [offset, length] = header.map(u64::from_le_bytes);
            position += 16;
            runs.push((Extent { offset, length }, position));
            position += length;
        }
        Ok(Copied { object, runs })
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let (run, position) = *self
            .runs
            .iter()
            .find(|(run, _)| run.offset <= offset && offset + u64::from(length) <= run.end())
            .ok_or(Error::OutOfRange)?;
        let mut bytes = vec![0; length as usize];
        self.object
            .seek(SeekFrom::Start(position + offset - run.offset))?;
        self.object.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
