//! Attacks the processor of whoever reads for it: its image asks for one byte here and one byte there of an object that the
//! host has to decode a MiB of each time, while it uses next to nothing itself.

use fleecebox_guest::{
    Archive, Context, Encoding, Error, Image, Objects, Provider, StoredObject, Volume,
};
use hostile::{Copied, Copy};
use std::io::{Read, Seek, SeekFrom, Write};

/// What the host decodes at once.
const FRAME: u64 = 1 << 20;

/// Some seconds of the host's, and some tenths of its own.
const TURNS: u64 = 40_000;

struct LetsTheHostWork;

impl Provider for LetsTheHostWork {
    type Image = Idle;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, name) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        let mut work = archive.create(&work(&name), Encoding::Zstd)?;
        let odd = |turn: u64| turn.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let bytes: Vec<u8> = (0..2 * FRAME / 8).flat_map(odd).collect();
        work.write_all(&bytes)?;
        work.finish()?;
        Ok(name)
    }
}

fn work(name: &[u8]) -> String {
    format!("{}-work", String::from_utf8_lossy(name))
}

struct Idle {
    work: StoredObject,
    copied: Copied,
}

impl Image for Idle {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Idle, Error> {
        Ok(Idle {
            work: objects.open(&work(&receipt))?,
            copied: Copied::open(job, objects, receipt)?,
        })
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        for turn in 0..TURNS {
            self.work.seek(SeekFrom::Start(turn % 2 * FRAME))?;
            self.work.read_exact(&mut [0])?;
        }
        self.copied.read(offset, length)
    }
}

fleecebox_guest::export!(LetsTheHostWork);
