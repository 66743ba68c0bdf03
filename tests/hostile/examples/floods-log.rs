//! Attacks the operator's terminal and log: writes lines without end that steer a terminal, imitate the host's own
//! lines, and hold the disk's content.

use fleecebox_guest::{Archive, Context, Error, Provider, Volume};
use hostile::Copied;

struct FloodsLog;

impl Provider for FloodsLog {
    type Image = Copied;

    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let _unused = archive;
        let reader = volume
            .reader
            .ok_or_else(|| Error::other("no reader is granted"))?;
        for run in volume.dirty.data_runs() {
            let run = run?;
            let bytes = reader.read(run.offset, 4096)?;
            job.info("\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\rfleecebox: backup done\n");
            job.warn("\u{202e}look-alikes \u{0430}\u{0435}\u{0440}");
            job.error("x".repeat(1 << 20));
            job.debug(String::from_utf8_lossy(&bytes));
        }
        for _ in 0..20_000 {
            job.error("");
        }
        Err(Error::other("\u{1b}[2J\nfleecebox: backup done"))
    }
}

fleecebox_guest::export!(FloodsLog);
