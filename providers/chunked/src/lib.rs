//! `chunked`: a deduplicating provider that never sees a byte.
//!
//! It puts what changed as chunks of fixed size, cut at the same places of the volume in every backup. The host
//! stores each chunk once, whichever volume, VM or backup it comes from, and restores by itself.
//!
//! Settings, all optional:
//!
//! | key | meaning | unless set |
//! |---|---|---|
//! | `chunk-size` | length of a chunk in bytes: a multiple of the volume's block size, at most 1 MiB | 1 MiB, or one block if that is more |
//! | `encoding` | `"zstd"` or `"identity"` | `"zstd"` |
//! | `discard` | whether to give snapshot space back during the backup | `false` |

mod finished;
mod receipt;
mod settings;

use finished::Finished;
use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Error};
use receipt::Receipt;
use settings::Settings;

struct Chunked;

impl BlindProvider for Chunked {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let settings: Settings = job.settings()?;
        let chunk_size = settings.chunk_size(volume.snapshot.info().block_size)?;
        if let Some(base) = base {
            warn_of_another_grid(&job, &base, chunk_size);
        }
        let discarder = volume.discarder.filter(|_| settings.discard);
        if settings.discard && discarder.is_none() {
            job.warn("`discard` is set, but the policy does not grant it");
        }

        let mut finished = Finished::default();
        let mut receipt = Receipt::new(chunk_size);
        for run in volume.dirty.data_runs() {
            for chunk in run?.pieces(chunk_size.into()) {
                archive.put(&volume.snapshot, chunk, settings.encoding)?;
                receipt.count(chunk);
                if let Some(discarder) = &discarder
                    && let Some(range) = finished.add(chunk)
                {
                    discarder.discard(range)?;
                }
            }
        }
        job.info(format_args!(
            "{} bytes in {} chunks",
            receipt.bytes, receipt.chunks
        ));
        Ok(receipt.to_bytes())
    }
}

fleecebox_guest::export_blind!(Chunked);

/// The host needs no receipt to restore, so that an odd one costs no more than deduplication.
fn warn_of_another_grid(job: &Context, base: &[u8], chunk_size: u32) {
    match Receipt::from_bytes(base) {
        Ok(base) if base.chunk_size == chunk_size => {}
        Ok(base) => job.warn(format_args!(
            "chunks were {} bytes long and are now {chunk_size}: they share nothing with the base's",
            base.chunk_size
        )),
        Err(error) => job.warn(format_args!("the base's receipt: {error}")),
    }
}
