//! Chunk id → place, over all packs of a namespace.
//!
//! The packs' own tables are the truth. A cache file spares reading thousands of them; it is used for packs that
//! are there with the length that it recorded, and only if it carries the right keyed digest. A wrong or
//! missing cache costs time, never correctness.

use super::directory;
use super::error::Error;
use super::frame::Frame;
use super::name::{BackupId, PackName};
use super::pack::{self, ChunkId, ENTRY, Place};
use super::store::Store;
use fleecebox_contract::with_causes;
use std::collections::BTreeMap;

/// In `packs/`.
pub(super) const CACHE: &str = "index-cache";

/// Packs that the cache may lack before it is written anew: reading a table takes far less time than writing
/// the cache of a large namespace.
const CACHE_LAG: usize = 16;

const MAGIC: [u8; 8] = *b"FLBXIX01";

/// Of each pack: its name, its length, how many entries follow.
const HEADER: u64 = 16 + 8 + 4;

/// At the end.
const DIGEST: usize = 32;

/// As of the moment when it was loaded.
pub(super) struct Index {
    packs: Vec<PackName>,
    /// Sorted by id. About 36 bytes per chunk: 36 MiB per TiB in chunks of 1 MiB.
    chunks: Vec<(ChunkId, u32, Place)>,
}

/// What is known of one pack.
struct Contents {
    /// Of the whole file, in bytes.
    length: u64,
    chunks: Vec<(ChunkId, Place)>,
}

type Packs = BTreeMap<PackName, Contents>;

impl Index {
    /// Reads the cache and the tables of the packs that it lacks. A pack that cannot be read is left out:
    /// nothing new will refer to it. The cache is made anew for a backup only.
    pub(super) fn load(store: &Store, backup: Option<BackupId>) -> Result<Self, Error> {
        let mut cached = read_cache(store).unwrap_or_default();
        let mut packs = Packs::new();
        let mut news = 0;
        for entry in store.packs.entries().map_err(Error::at("packs"))? {
            let entry = entry.map_err(Error::at("packs"))?;
            let file_name = entry.file_name();
            let Some(name) = file_name.to_str().and_then(PackName::from_file_name) else {
                continue;
            };
            let length = entry.metadata().map_err(Error::at(name))?.len();
            match cached.remove(&name) {
                Some(contents) if contents.length == length => {
                    packs.insert(name, contents);
                }
                _ => {
                    news += 1;
                    match read_pack(store, name) {
                        Ok(chunks) => drop(packs.insert(name, Contents { length, chunks })),
                        Err(error) => {
                            tracing::warn!(error = %with_causes(&error), "left out of the index");
                        }
                    }
                }
            }
        }
        if news + cached.len() >= CACHE_LAG
            && let Some(backup) = backup
            && let Err(error) = write_cache(store, backup, &packs)
        {
            tracing::warn!(error = %with_causes(&error), "the index is not cached");
        }
        Ok(Self::of(packs))
    }

    fn of(packs: Packs) -> Self {
        let names = packs.keys().copied().collect();
        let mut chunks: Vec<_> = packs
            .into_values()
            .zip(0u32..)
            .flat_map(|(contents, number)| {
                let numbered = move |(id, place)| (id, number, place);
                contents.chunks.into_iter().map(numbered)
            })
            .collect();
        chunks.sort_unstable_by_key(|&(id, ..)| id);
        chunks.shrink_to_fit();
        Self {
            packs: names,
            chunks,
        }
    }

    /// Everywhere that it lies: more than once where one of them was found damaged, or by chance.
    pub(super) fn find(&self, id: ChunkId) -> impl Iterator<Item = Frame> {
        let first = self.chunks.partition_point(|&(other, ..)| other < id);
        let all = self.chunks[first..].iter();
        all.take_while(move |&&(other, ..)| other == id)
            .filter_map(|&(_, number, place)| place.frame(self.packs[number as usize]))
    }
}

fn read_pack(store: &Store, name: PackName) -> Result<Vec<(ChunkId, Place)>, Error> {
    let path = name.file_name();
    pack::read_table(&directory::open(&store.packs, &path)?, &path)
}

/// The cache, where there is a sound one.
fn read_cache(store: &Store) -> Option<Packs> {
    let bytes = match directory::read(&store.packs, CACHE, largest_cache(store)?) {
        Err(Error::NotFound { .. }) => return None,
        bytes => bytes.ok(),
    };
    let packs = bytes.and_then(|bytes| parse_cache(&bytes, &store.key));
    if packs.is_none() {
        tracing::warn!("the cache of the index is damaged and is made anew");
    }
    packs
}

/// A cache says no more of packs than their own tables do, and some bytes on each.
fn largest_cache(store: &Store) -> Option<u64> {
    let mut largest: u64 = (MAGIC.len() + DIGEST) as u64;
    for entry in store.packs.entries().ok()? {
        let length = entry.ok()?.metadata().map_or(0, |metadata| metadata.len());
        largest = largest.saturating_add(length).saturating_add(HEADER);
    }
    Some(largest)
}

/// ```text
/// magic   { pack, length, count, entries… }…   keyed BLAKE3 of all before
/// 8         16    8       4      29 each       32
/// ```
fn render_cache(packs: &Packs, key: &[u8; 32]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for (name, contents) in packs {
        bytes.extend(name.as_bytes());
        bytes.extend(contents.length.to_le_bytes());
        bytes.extend((contents.chunks.len() as u32).to_le_bytes());
        for &(id, place) in &contents.chunks {
            pack::render_entry(&mut bytes, id, place);
        }
    }
    let digest = blake3::keyed_hash(key, &bytes);
    bytes.extend(digest.as_bytes());
    bytes
}

fn parse_cache(bytes: &[u8], key: &[u8; 32]) -> Option<Packs> {
    let (body, digest) = bytes.split_last_chunk::<DIGEST>()?;
    if blake3::keyed_hash(key, body) != *digest {
        return None;
    }
    parse_packs(body.strip_prefix(&MAGIC)?)
}

fn parse_packs(mut rest: &[u8]) -> Option<Packs> {
    let mut packs = Packs::new();
    while !rest.is_empty() {
        let name: &[u8; 16];
        let length: &[u8; 8];
        let count: &[u8; 4];
        (name, rest) = rest.split_first_chunk()?;
        (length, rest) = rest.split_first_chunk()?;
        (count, rest) = rest.split_first_chunk()?;
        let entries = (u32::from_le_bytes(*count) as usize).checked_mul(ENTRY)?;
        let (entries, after) = rest.split_at_checked(entries)?;
        rest = after;
        let chunks = entries.as_chunks::<ENTRY>().0.iter();
        let chunks = chunks.map(pack::parse_entry).collect::<Option<_>>()?;
        let length = u64::from_le_bytes(*length);
        packs.insert(PackName::from_bytes(*name), Contents { length, chunks });
    }
    Some(packs)
}

/// Not synced: after a power failure the digest tells whether it is whole.
fn write_cache(store: &Store, backup: BackupId, packs: &Packs) -> Result<(), Error> {
    let temporary = directory::temporary(backup, CACHE);
    store
        .packs
        .write(&temporary, render_cache(packs, &store.key))
        .and_then(|()| store.packs.rename(&temporary, &store.packs, CACHE))
        .inspect_err(|_| directory::remove(&store.packs, &temporary))
        .map_err(Error::at(CACHE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleecebox_contract::Encoding;
    use proptest::prelude::*;

    fn packs() -> Packs {
        let place = Place {
            offset: 5,
            stored: 7,
            decoded: 7,
            encoding: Encoding::Identity,
        };
        let contents = |n: u8| Contents {
            length: n.into(),
            chunks: (0..n).map(|i| (ChunkId([i; 16]), place)).collect(),
        };
        (0..4)
            .map(|n| (PackName::from_bytes([n; 16]), contents(n)))
            .collect()
    }

    #[test]
    fn a_cache_is_believed_under_its_own_key_only() {
        let bytes = render_cache(&packs(), &[1; 32]);
        let parsed = parse_cache(&bytes, &[1; 32]).unwrap();
        assert_eq!(Index::of(parsed).chunks, Index::of(packs()).chunks);
        let index = Index::of(packs());
        let places = |n| index.find(ChunkId([n; 16])).count();
        assert_eq!([places(0), places(1), places(2), places(3)], [3, 2, 1, 0]);
        assert!(parse_cache(&bytes, &[2; 32]).is_none());
    }

    proptest! {
        #[test]
        fn a_changed_cache_is_not_believed(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = render_cache(&packs(), &[1; 32]);
            let index = at.index(bytes.len());
            prop_assert!(parse_cache(&bytes[..index], &[1; 32]).is_none());
            bytes[index] ^= flip;
            prop_assert!(parse_cache(&bytes, &[1; 32]).is_none());
        }

        #[test]
        fn arbitrary_lists_of_packs_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Some(packs) = parse_packs(&bytes) {
                prop_assert!(packs.len() * 28 <= bytes.len());
            }
        }
    }
}
