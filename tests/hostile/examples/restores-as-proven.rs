//! Attacks the proof by honesty at the right time: gives back the right bytes for exactly those ranges that it claimed,
//! as the proof asks for them, and other bytes for any other range, such as what a later backup leaves of one.

use fleecebox_guest::{Archive, Context, Error, Extent, Image, Objects, Provider, Volume};
use hostile::{Copied, Copy};

struct RestoresAsProven;

impl Provider for RestoresAsProven {
    type Image = OnlyAsProven;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        let mut claimed = Vec::new();
        while let Some(run) = copy.runs.next() {
            let run = run?;
            copy.store(run, |_| ())?;
            copy.object.claim(&copy.snapshot, run)?;
            // As the proof asks: from the start of what was claimed, a MiB at a time.
            claimed.extend(
                (run.offset..run.end())
                    .step_by(1 << 20)
                    .map(|offset| Extent {
                        offset,
                        length: (run.end() - offset).min(1 << 20),
                    }),
            );
        }
        copy.object.finish()?;
        let mut told = vec![receipt.len() as u8];
        told.extend(receipt);
        for Extent { offset, length } in claimed {
            told.extend(offset.to_le_bytes());
            told.extend(length.to_le_bytes());
        }
        Ok(told)
    }
}

struct OnlyAsProven {
    copied: Copied,
    claimed: Vec<[u8; 16]>,
}

impl Image for OnlyAsProven {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<OnlyAsProven, Error> {
        let (name, rest) = receipt[1..].split_at(receipt[0].into());
        let (claimed, _) = rest.as_chunks::<16>();
        let copied = Copied::open(job, objects, name.to_vec())?;
        Ok(OnlyAsProven {
            copied,
            claimed: claimed.to_vec(),
        })
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let mut asked = [0; 16];
        asked[..8].copy_from_slice(&offset.to_le_bytes());
        asked[8..].copy_from_slice(&u64::from(length).to_le_bytes());
        let mut bytes = self.copied.read(offset, length)?;
        if !self.claimed.contains(&asked) {
            bytes.fill(0xee);
        }
        Ok(bytes)
    }
}

fleecebox_guest::export!(RestoresAsProven);
