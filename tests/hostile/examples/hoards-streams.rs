//! Attacks what the job process keeps for each open object: opens more and more of them.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct HoardsStreams;

impl BlindProvider for HoardsStreams {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let name = volume.snapshot.info().name;
        let mut streams = Vec::new();
        loop {
            match archive.create(&format!("{name}-{}", streams.len()), Encoding::Zstd) {
                Ok(stream) => streams.push(stream),
                Err(error) => {
                    job.info(format_args!("{} streams are open", streams.len()));
                    return Err(error);
                }
            }
        }
    }
}

fleecebox_guest::export_blind!(HoardsStreams);
