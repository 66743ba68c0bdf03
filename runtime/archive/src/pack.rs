//! The form of a pack: frames, then a table of its own contents, then a footer.
//!
//! ```text
//! frames…   { chunk id, offset, stored length, decoded length, encoding }…   count   BLAKE3 of the table   magic
//!           16          4       4              4               1             4       32                    8
//! ```
//! Numbers are little-endian. A pack is written once and never changes; the index of a namespace is nothing
//! but the sum of these tables.

use super::error::{Damage, Error};
use super::frame::{Frame, ObjectRef};
use super::name::PackName;
use fleecebox_contract::Encoding;
use fleecebox_contract::digest::Digest;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes of frames after which a pack is closed: large enough that a TiB is thousands of files and syncs, small
/// enough that removing or rewriting one is cheap.
pub(super) const PACK_LIMIT: u32 = 64 << 20;

/// A longer file is no pack: what one may hold beyond [`PACK_LIMIT`] is its last frame and its table.
const LARGEST: u64 = 8 * PACK_LIMIT as u64;

const MAGIC: [u8; 8] = *b"FLBXPK01";
pub(super) const ENTRY: usize = 16 + 4 + 4 + 4 + 1;
pub(super) const FOOTER: usize = 4 + 32 + 8;

/// Addresses a chunk by its content. It is a keyed digest, so it tells nobody without the namespace's key
/// which content it stands for. Half of the digest is kept: without the key nobody can search for two
/// chunks of one id, and by chance they meet after 2⁶⁴ chunks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct ChunkId(pub(super) [u8; 16]);

impl ChunkId {
    /// Of `length` bytes whose blocks have these digests. The length tells apart a short last block
    /// and block sizes.
    pub(super) fn of(key: &[u8; 32], length: u32, digests: &[Digest]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(&length.to_le_bytes());
        for digest in digests {
            hasher.update(digest.as_bytes());
        }
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        Self(id)
    }
}

/// Where a chunk lies in its pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) offset: u32,
    pub(super) stored: u32,
    pub(super) decoded: u32,
    pub(super) encoding: Encoding,
}

impl Place {
    /// The same, where `pack` is known and the numbers are those of a frame.
    pub(super) fn frame(self, pack: PackName) -> Option<Frame> {
        let object = ObjectRef::Pack(pack);
        let Self {
            offset,
            stored,
            decoded,
            encoding,
        } = self;
        Frame::new(object, offset.into(), stored, decoded, encoding).ok()
    }
}

/// Appends one entry of a table.
pub(super) fn render_entry(table: &mut Vec<u8>, id: ChunkId, place: Place) {
    table.extend(id.0);
    for number in [place.offset, place.stored, place.decoded] {
        table.extend(number.to_le_bytes());
    }
    table.push(match place.encoding {
        Encoding::Identity => 0,
        Encoding::Zstd => 1,
    });
}

/// One entry; nothing where no such frame can be.
pub(super) fn parse_entry(entry: &[u8; ENTRY]) -> Option<(ChunkId, Place)> {
    let (id, rest) = entry.split_first_chunk::<16>()?;
    let number = |at: usize| {
        let bytes = rest[at..at + 4].iter().rev();
        bytes.fold(0, |n, &b| n << 8 | u32::from(b))
    };
    let place = Place {
        offset: number(0),
        stored: number(4),
        decoded: number(8),
        encoding: match rest[12] {
            0 => Encoding::Identity,
            1 => Encoding::Zstd,
            _ => return None,
        },
    };
    // Any name will do: what matters is whether the lengths are within the limits.
    place.frame(PackName::from_bytes([0; 16]))?;
    Some((ChunkId(*id), place))
}

/// Table and footer.
pub(super) fn render_table(entries: &[(ChunkId, Place)]) -> Vec<u8> {
    let mut table = Vec::with_capacity(entries.len() * ENTRY + FOOTER);
    for &(id, place) in entries {
        render_entry(&mut table, id, place);
    }
    let digest = Digest::of(&table);
    // A pack of `PACK_LIMIT` bytes holds fewer entries than that.
    table.extend((entries.len() as u32).to_le_bytes());
    table.extend(digest.as_bytes());
    table.extend(MAGIC);
    table
}

/// The table of a pack; `path` is for errors.
pub(super) fn read_table(file: &File, path: &str) -> Result<Vec<(ChunkId, Place)>, Error> {
    let length = file.metadata().map_err(Error::at(path))?.len();
    let short = Error::damaged(path);
    let Some(footer_at) = length.checked_sub(FOOTER as u64) else {
        return Err(short(Damage::Length {
            expected: FOOTER as u64,
            actual: length,
        }));
    };
    if length > LARGEST {
        return Err(short(Damage::Length {
            expected: LARGEST,
            actual: length,
        }));
    }
    let mut footer = [0; FOOTER];
    file.read_exact_at(&mut footer, footer_at)
        .map_err(Error::at(path))?;
    let table = table_length(&footer, footer_at).map_err(Error::damaged(path))?;
    let data = footer_at - table as u64;
    let mut bytes = vec![0; table];
    file.read_exact_at(&mut bytes, data)
        .map_err(Error::at(path))?;
    parse_table(&bytes, &footer, data).map_err(Error::damaged(path))
}

/// Length of the table that ends where the footer begins.
fn table_length(footer: &[u8; FOOTER], footer_at: u64) -> Result<usize, Damage> {
    if !footer.ends_with(&MAGIC) {
        return Err(Damage::Malformed("no pack's footer at its end"));
    }
    let count = u32::from_le_bytes([footer[0], footer[1], footer[2], footer[3]]) as usize;
    let length = count * ENTRY;
    if length as u64 > footer_at {
        return Err(Damage::Length {
            expected: (length + FOOTER) as u64,
            actual: footer_at + FOOTER as u64,
        });
    }
    Ok(length)
}

/// The entries of a table, all of which lie within the `data` bytes before it.
fn parse_table(
    table: &[u8],
    footer: &[u8; FOOTER],
    data: u64,
) -> Result<Vec<(ChunkId, Place)>, Damage> {
    if footer[4..36] != *Digest::of(table).as_bytes() {
        return Err(Damage::Digest);
    }
    let (entries, rest) = table.as_chunks::<ENTRY>();
    let inside = |place: &Place| u64::from(place.offset) + u64::from(place.stored) <= data;
    entries
        .iter()
        .map(|entry| parse_entry(entry).filter(|(_, place)| inside(place)))
        .collect::<Option<Vec<_>>>()
        .filter(|_| rest.is_empty())
        .ok_or(Damage::Malformed("a pack's table lists what is no frame"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn pack(count: u8) -> (Vec<u8>, Vec<(ChunkId, Place)>) {
        let entries: Vec<_> = (0..count)
            .map(|n| {
                let place = Place {
                    offset: u32::from(n) * 10,
                    stored: 10,
                    decoded: 30,
                    encoding: Encoding::Zstd,
                };
                (ChunkId([n; 16]), place)
            })
            .collect();
        let mut bytes = vec![1; usize::from(count) * 10];
        bytes.extend(render_table(&entries));
        (bytes, entries)
    }

    #[test]
    fn chunks_that_differ_in_length_or_namespace_differ_in_id() {
        let digests = [Digest::of(b"a")];
        let id = ChunkId::of(&[1; 32], 5, &digests);
        assert_eq!(id, ChunkId::of(&[1; 32], 5, &digests));
        assert_ne!(id, ChunkId::of(&[1; 32], 6, &digests));
        assert_ne!(id, ChunkId::of(&[2; 32], 5, &digests));
        assert_ne!(id, ChunkId::of(&[1; 32], 5, &[digests[0], digests[0]]));
    }

    #[test]
    fn an_entry_outside_the_pack_is_refused() {
        let (bytes, _) = pack(3);
        // The same table behind one byte less of data.
        assert!(read_table(&file(&bytes[1..]), "p").is_err());
        assert!(read_table(&file(&bytes), "p").is_ok());
    }

    proptest! {
        #[test]
        fn every_flipped_bit_and_every_truncation_of_a_table_is_seen(count in 0u8..20, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (bytes, entries) = pack(count);
            prop_assert_eq!(read_table(&file(&bytes), "p").unwrap(), entries.clone());
            let data = usize::from(count) * 10;
            let mut flipped = bytes.clone();
            let index = data + at.index(bytes.len() - data);
            flipped[index] ^= 1 << bit;
            prop_assert!(read_table(&file(&flipped), "p").is_err());
            let cut = at.index(bytes.len());
            prop_assert!(read_table(&file(&bytes[..cut]), "p").is_err());
        }

        #[test]
        fn arbitrary_bytes_are_no_pack(mut bytes in prop::collection::vec(any::<u8>(), 0..200), magic: bool) {
            if magic {
                bytes.extend(MAGIC);
            }
            prop_assert!(read_table(&file(&bytes), "p").is_err());
        }
    }
}
