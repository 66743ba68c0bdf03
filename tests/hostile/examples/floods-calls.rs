//! Attacks the memory of the job process through the calls that it has to answer: many objects filled side by side,
//! reads that jump back and forth and ask for next to nothing, claims of ranges that were never read, endless questions.

use std::io::Write;

use fleecebox_guest::{Archive, Context, Encoding, Error, Provider, Volume};
use hostile::Copied;

struct FloodsCalls;

impl Provider for FloodsCalls {
    type Image = Copied;

    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let name = volume.snapshot.info().name;
        let reader = volume
            .reader
            .ok_or_else(|| Error::other("no reader is granted"))?;
        let runs = volume.dirty.data_runs().collect::<Result<Vec<_>, _>>()?;
        for turn in 0..2000 {
            let run = runs[turn * 7 % runs.len()];
            reader.read(run.offset, 1)?;
            job.attachment("guest-config");
        }
        let mut streams = Vec::new();
        for number in 0..16 {
            streams.push(archive.create(&format!("{name}-{number}"), Encoding::Zstd)?);
        }
        let bytes = vec![0x5a; 4 << 20];
        loop {
            for stream in &mut streams {
                stream.write_all(&bytes)?;
                stream.write_all(&bytes[..1])?;
            }
        }
    }
}

fleecebox_guest::export!(FloodsCalls);
