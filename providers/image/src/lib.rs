//! `image`: a provider that reads the bytes and keeps them in a stream of its own, one object per volume.
//!
//! It claims what it stores, and gives it back through `restore`. `format` describes the stream.
//!
//! Settings, all optional:
//!
//! | key | meaning | unless set |
//! |---|---|---|
//! | `encoding` | `"zstd"` or `"identity"` | `"zstd"` |

mod format;
mod reader;
mod receipt;
mod writer;

use fleecebox_guest::{
    Archive, Context, Encoding, Error, Image, Objects, Provider, StoredObject, Volume,
};
use reader::Reader;
use receipt::Receipt;
use writer::Writer;

struct Streamed;

/// Bytes read before they are claimed. The host keeps the digests of what was read last, and reads anew what was
/// claimed too late.
const CLAIM: u64 = 1 << 30;

#[derive(serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Settings {
    encoding: Encoding,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            encoding: Encoding::Zstd,
        }
    }
}

impl Provider for Streamed {
    type Image = Opened;

    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let settings: Settings = job.settings()?;
        let reader = volume.reader.ok_or_else(|| {
            Error::other("image has to read the volume, and the policy grants no reader")
        })?;
        let info = volume.snapshot.info();
        let object = archive.create(&info.name, settings.encoding)?;
        let mut stream = Writer::new(object, info.size)?;
        for run in volume.dirty.data_runs() {
            for part in run?.pieces(CLAIM) {
                let pieces = part
                    .pieces(reader.max_read().into())
                    // A piece is no longer than the grid, which came from a u32.
                    .map(|piece| reader.read(piece.offset, piece.length as u32));
                stream.record(part, pieces)?;
                stream.output().claim(&volume.snapshot, part)?;
            }
        }
        let size = stream.finish()?.finish()?;
        job.info(format_args!("{size} bytes in `{}`", info.name));
        Ok(Receipt { object: info.name }.to_bytes())
    }
}

struct Opened(Reader<StoredObject>);

impl Image for Opened {
    fn open(_job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Opened, Error> {
        let receipt = Receipt::from_bytes(receipt)?;
        Ok(Opened(Reader::open(objects.open(&receipt.object)?)?))
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        Ok(self.0.read(offset, length)?)
    }
}

fleecebox_guest::export!(Streamed);
