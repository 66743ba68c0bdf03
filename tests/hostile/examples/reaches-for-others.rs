//! Attacks the walls between namespaces: names an object of another tenant's, which exists, in every way that might lead
//! there, and one beside it that does not. Any answer that differs would tell what is there.
//!
//! `how` is the way to that object within the archive.

use fleecebox_guest::{Archive, Context, Encoding, Error, Image, Objects, Provider, Volume};
use hostile::Copy;

struct ReachesForOthers;

/// Ways to `object`, which lies in the archive at `way`.
fn ways(way: &str) -> Vec<String> {
    let object = way.rsplit('/').next().unwrap_or(way);
    let mut ways = vec![
        object.to_string(),
        way.to_string(),
        format!("/{way}"),
        format!("../{object}"),
        format!("{object}\0"),
        format!("./{object}"),
        way.replace('/', "\\"),
        way.replace('/', "%2f"),
        way.replace('/', "\u{2215}"),
    ];
    // From an object's place to the archive's folder, and some more.
    ways.extend((1..8).map(|up| "../".repeat(up) + way));
    ways
}

/// The same of something that does not exist.
fn beside(way: &str) -> String {
    format!("{}0", &way[..way.len() - 1])
}

impl Provider for ReachesForOthers {
    type Image = Reaching;

    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let way = hostile::how(&job)?;
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        for (there, not) in ways(&way).iter().zip(&ways(&beside(&way))) {
            let [there, not] = [there, not].map(|name| {
                let object = archive.create(name, Encoding::Identity).map(drop);
                (object, job.attachment(name))
            });
            if there != not {
                return Err(Error::other(format_args!("{there:?}, not {not:?}")));
            }
        }
        Ok(receipt)
    }
}

struct Reaching;

impl Image for Reaching {
    fn open(job: Context, objects: Objects, _receipt: Vec<u8>) -> Result<Reaching, Error> {
        let way = hostile::how(&job)?;
        let (there, not) = (ways(&way), ways(&beside(&way)));
        let answer = |name: &String| objects.open(name).map(drop);
        let alike = |(there, not): &(&String, &String)| {
            let there = answer(there);
            let refused = matches!(there, Err(Error::NotFound | Error::InvalidName));
            refused && there == answer(not)
        };
        let tried = there.len();
        let nowhere = there.iter().zip(&not).filter(alike).count();
        Err(Error::other(format_args!(
            "tried: {tried}; refused as if nothing were there: {nowhere}"
        )))
    }

    fn read(&mut self, _offset: u64, _length: u32) -> Result<Vec<u8>, Error> {
        Err(Error::NotFound)
    }
}

fleecebox_guest::export!(ReachesForOthers);
