//! The zstd seekable format, as zstd's `contrib/seekable_format` describes it.
//!
//! Frames, then one skippable frame (which decoders pass over) with the lengths of all frames, so that a
//! reader can begin anywhere:
//! ```text
//! 184D2A5E  length  { stored length, decoded length [, checksum] }…  number of frames  descriptor  8F92EAB1
//! ```
//! All numbers are 32 bits, little-endian, but for the descriptor, which is one byte.

use super::error::Damage;
use super::frame::{FRAME_LIMIT, STORED_LIMIT};

const SKIPPABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
/// Number of frames, descriptor, magic.
pub(super) const FOOTER: usize = 9;
/// Magic and length of the skippable frame.
const HEADER: usize = 8;
/// In the descriptor: each entry ends in a checksum.
const CHECKSUMS: u8 = 0x80;
/// In the descriptor: bits that have to be zero.
const RESERVED: u8 = 0x7c;

/// The lengths of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    pub(super) stored: u32,
    pub(super) decoded: u32,
}

/// The skippable frame for these frames.
pub(super) fn render(frames: &[Lengths]) -> Result<Vec<u8>, Damage> {
    let too_many = Damage::Malformed("more frames than a seek table can hold");
    let count = u32::try_from(frames.len()).map_err(|_| too_many.clone())?;
    let length = count
        .checked_mul(8)
        .and_then(|length| length.checked_add(FOOTER as u32))
        .ok_or(too_many)?;
    let mut table = Vec::with_capacity(HEADER + length as usize);
    table.extend(SKIPPABLE_MAGIC.to_le_bytes());
    table.extend(length.to_le_bytes());
    for frame in frames {
        table.extend(frame.stored.to_le_bytes());
        table.extend(frame.decoded.to_le_bytes());
    }
    table.extend(count.to_le_bytes());
    table.push(0);
    table.extend(SEEKABLE_MAGIC.to_le_bytes());
    Ok(table)
}

/// Length of the whole skippable frame at the end of a file of `file_length` bytes that ends in `footer`.
pub(super) fn table_length(footer: [u8; FOOTER], file_length: u64) -> Result<u64, Damage> {
    let magic = u32::from_le_bytes([footer[5], footer[6], footer[7], footer[8]]);
    if magic != SEEKABLE_MAGIC || footer[4] & RESERVED != 0 {
        return Err(Damage::Malformed("no seek table at its end"));
    }
    let count = u32::from_le_bytes([footer[0], footer[1], footer[2], footer[3]]);
    let length = u64::from(count) * entry_length(footer[4]) as u64 + (HEADER + FOOTER) as u64;
    if length > file_length {
        return Err(Damage::Length {
            expected: length,
            actual: file_length,
        });
    }
    Ok(length)
}

/// The frames that a skippable frame lists. They have lengths within the limits of this archive and fill
/// `data` bytes, those before the table.
pub(super) fn parse(table: &[u8], data: u64) -> Result<Vec<Lengths>, Damage> {
    let malformed = Damage::Malformed("its seek table contradicts itself");
    let (head, rest) = table
        .split_first_chunk::<HEADER>()
        .ok_or(malformed.clone())?;
    let (entries, footer) = rest.split_last_chunk::<FOOTER>().ok_or(malformed.clone())?;
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u32::from(b));
    let length = entry_length(footer[4]);
    let sound = number(&head[..4]) == SKIPPABLE_MAGIC
        && number(&head[4..]) as usize == rest.len()
        && table_length(*footer, table.len() as u64)? == table.len() as u64
        && entries.len() % length == 0;
    if !sound {
        return Err(malformed);
    }
    let frames: Vec<_> = entries
        .chunks_exact(length)
        .map(|entry| Lengths {
            stored: number(&entry[..4]),
            decoded: number(&entry[4..8]),
        })
        .collect();
    let fit = |frame: &Lengths| {
        (1..=STORED_LIMIT).contains(&frame.stored) && (1..=FRAME_LIMIT).contains(&frame.decoded)
    };
    let sum: u64 = frames.iter().map(|frame| u64::from(frame.stored)).sum();
    if sum != data || !frames.iter().all(fit) {
        return Err(malformed);
    }
    Ok(frames)
}

fn entry_length(descriptor: u8) -> usize {
    if descriptor & CHECKSUMS == 0 { 8 } else { 12 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lengths() -> impl Strategy<Value = Vec<Lengths>> {
        let one = (1..=STORED_LIMIT, 1..=FRAME_LIMIT);
        prop::collection::vec(one, 0..50).prop_map(|all| {
            all.into_iter()
                .map(|(stored, decoded)| Lengths { stored, decoded })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn a_seek_table_parses_to_its_frames(frames in lengths()) {
            let table = render(&frames).unwrap();
            let data = frames.iter().map(|f| u64::from(f.stored)).sum();
            let footer = *table.last_chunk().unwrap();
            prop_assert_eq!(table_length(footer, table.len() as u64).unwrap(), table.len() as u64);
            prop_assert_eq!(parse(&table, data).unwrap(), frames);
            prop_assert!(parse(&table, data + 1).is_err());
            prop_assert!(table_length(footer, table.len() as u64 - 1).is_err());
        }

        #[test]
        fn arbitrary_tables_are_refused_or_fill_the_data(mut table in prop::collection::vec(any::<u8>(), 0..100), frames in lengths(), at in any::<prop::sample::Index>(), flip in 1u8.., data in 0u64..1 << 30) {
            let _ = parse(&table, data);
            table = render(&frames).unwrap();
            let index = at.index(table.len());
            table[index] ^= flip;
            if let Ok(parsed) = parse(&table, data) {
                prop_assert_eq!(parsed.iter().map(|f| u64::from(f.stored)).sum::<u64>(), data);
            }
        }
    }
}
