//! Attacks the proof by honesty at the right time: stores everything as it should, and gives it back right as long as it
//! takes itself to be in a proof. `how` says by what it tells:
//! - `shape`: the question is one of those that begin where a claim does, a MiB after the other
//! - `order`: nothing that was claimed was passed over
//! - `count`: there have been no more and no fewer questions than there are claimed MiB before this one
//! - `siblings`: there is no object yet of the backup that comes after this one

use fleecebox_guest::{
    Archive, Context, Encoding, Error, Extent, Image, Objects, Provider, Volume,
};
use hostile::{Copied, Copy, how};
use std::io::Write;

struct RestoresAsProven;

impl Provider for RestoresAsProven {
    type Image = OnlyAsProven;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, name) = Copy::begin(volume, &archive)?;
        let number = base.map_or(0, |base| base[0] + 1);
        let mut sibling = archive.create(&sibling(&name, number), Encoding::Identity)?;
        sibling.write_all(b"here")?;
        sibling.finish()?;
        let mut told = vec![number, name.len() as u8];
        told.extend(name);
        while let Some(run) = copy.runs.next() {
            let run = run?;
            copy.store(run, |_| ())?;
            copy.object.claim(&copy.snapshot, run)?;
            for offset in (run.offset..run.end()).step_by(1 << 20) {
                told.extend(offset.to_le_bytes());
                told.extend((run.end() - offset).min(1 << 20).to_le_bytes());
            }
        }
        copy.object.finish()?;
        Ok(told)
    }
}

/// One for each volume and each backup of a chain.
fn sibling(volume: &[u8], number: u8) -> String {
    format!("{}-{number}", String::from_utf8_lossy(volume))
}

struct OnlyAsProven {
    how: String,
    copied: Copied,
    objects_after: bool,
    claimed: Vec<Extent>,
    asked: Vec<Extent>,
}

impl Image for OnlyAsProven {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<OnlyAsProven, Error> {
        let (number, rest) = (receipt[0], &receipt[2..]);
        let (name, claimed) = rest.split_at(receipt[1].into());
        let (claimed, _) = claimed.as_chunks::<16>();
        let number_of = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        Ok(OnlyAsProven {
            how: how(&job)?,
            objects_after: objects.open(&sibling(name, number + 1)).is_ok(),
            copied: Copied::open(job, objects, name.to_vec())?,
            claimed: claimed
                .iter()
                .map(|piece| Extent {
                    offset: number_of(&piece[..8]),
                    length: number_of(&piece[8..]),
                })
                .collect(),
            asked: Vec::new(),
        })
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let question = Extent {
            offset,
            length: length.into(),
        };
        let mut bytes = self.copied.read(offset, length)?;
        if !self.looks_like_a_proof(question) {
            bytes.fill(0xee);
        }
        self.asked.push(question);
        Ok(bytes)
    }
}

impl OnlyAsProven {
    fn looks_like_a_proof(&self, question: Extent) -> bool {
        let before = self
            .claimed
            .iter()
            .filter(|piece| piece.offset < question.offset);
        let asked_for = |byte| {
            let holds = |it: &Extent| it.offset <= byte && byte < it.end();
            self.asked.iter().any(holds)
        };
        match self.how.as_str() {
            "shape" => self.claimed.contains(&question),
            "order" => before.into_iter().all(|piece| {
                asked_for(piece.offset) && asked_for(piece.end().min(question.offset) - 1)
            }),
            "count" => before.count() == self.asked.len(),
            _ => !self.objects_after,
        }
    }
}

fleecebox_guest::export!(RestoresAsProven);
