//! Reading the stream.

use std::io::{Read, Seek, SeekFrom};

use crate::format::{
    ENTRIES_PER_PAGE, ENTRY_LENGTH, Entry, FormatError, HEADER_LENGTH, LIST_HEADER_LENGTH, MAGIC,
    PAGE, ROOT, ROOT_ENTRY_LENGTH, RootEntry, TRAILER_LENGTH,
};

/// A finished stream.
pub(crate) struct Reader<S> {
    source: S,
    root: Vec<RootEntry>,
    /// The page that was used last, with its number in the root.
    page: Option<(usize, Vec<Entry>)>,
}

impl<S: Read + Seek> Reader<S> {
    pub(crate) fn open(mut source: S) -> Result<Reader<S>, FormatError> {
        let size = source.seek(SeekFrom::End(0))?;
        if size < HEADER_LENGTH + LIST_HEADER_LENGTH + TRAILER_LENGTH {
            return Err(FormatError::NotAnImage);
        }
        let end = size - TRAILER_LENGTH;
        let mut magic = [0; 8];
        source.seek(SeekFrom::Start(0))?;
        source.read_exact(&mut magic)?;
        source.seek(SeekFrom::Start(end))?;
        let position = u64_from(&mut source)?;
        let mut end_magic = [0; 8];
        source.read_exact(&mut end_magic)?;
        if magic != MAGIC || end_magic != MAGIC {
            return Err(FormatError::NotAnImage);
        }

        // The root ends where the trailer begins, so that its length says how many entries to expect.
        let damaged = || FormatError::Damaged { position };
        let length = end
            .checked_sub(position)
            .and_then(|length| length.checked_sub(LIST_HEADER_LENGTH))
            .ok_or_else(damaged)?;
        let count = list_at(&mut source, position, ROOT)?;
        if u64::from(count) * ROOT_ENTRY_LENGTH != length {
            return Err(damaged());
        }
        let list = bytes_from(&mut source, length as usize)?;
        let root: Vec<_> = list
            .chunks_exact(ROOT_ENTRY_LENGTH as usize)
            .map(|entry| RootEntry {
                first_offset: number(entry, 0),
                position: number(entry, 1),
            })
            .collect();
        if !root.is_sorted_by_key(|entry| entry.first_offset) {
            return Err(damaged());
        }
        Ok(Reader {
            source,
            root,
            page: None,
        })
    }

    /// Reads `length` bytes of the volume, all of which must be in records.
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, FormatError> {
        let mut bytes = vec![0; length as usize];
        let mut rest = &mut bytes[..];
        let mut offset = offset;
        while !rest.is_empty() {
            let (position, available) = self.find(offset)?;
            let length = available.min(rest.len() as u64);
            let (part, after) = rest.split_at_mut(length as usize);
            self.source.seek(SeekFrom::Start(position))?;
            self.source.read_exact(part)?;
            rest = after;
            offset += length;
        }
        Ok(bytes)
    }

    /// Where the byte at `offset` is in the stream, and how many bytes of the volume follow there, itself included.
    fn find(&mut self, offset: u64) -> Result<(u64, u64), FormatError> {
        let not_stored = FormatError::NotStored { offset };
        let Some(number) = self
            .root
            .partition_point(|page| page.first_offset <= offset)
            .checked_sub(1)
        else {
            return Err(not_stored);
        };
        let page = self.page(number)?;
        let Some(index) = page
            .partition_point(|entry| entry.offset <= offset)
            .checked_sub(1)
        else {
            return Err(not_stored);
        };
        let entry = page[index];
        let into = offset - entry.offset;
        if into >= entry.length {
            return Err(not_stored);
        }
        Ok((entry.position.saturating_add(into), entry.length - into))
    }

    fn page(&mut self, number: usize) -> Result<&[Entry], FormatError> {
        if self
            .page
            .as_ref()
            .is_none_or(|(loaded, _)| *loaded != number)
        {
            let entries = read_page(&mut self.source, self.root[number])?;
            self.page = Some((number, entries));
        }
        Ok(self
            .page
            .as_ref()
            .map(|(_, entries)| &entries[..])
            .unwrap_or_default())
    }
}

fn read_page(source: &mut (impl Read + Seek), at: RootEntry) -> Result<Vec<Entry>, FormatError> {
    let count = list_at(source, at.position, PAGE)? as usize;
    let damaged = FormatError::Damaged {
        position: at.position,
    };
    if count > ENTRIES_PER_PAGE {
        return Err(damaged);
    }
    let list = bytes_from(source, count * ENTRY_LENGTH as usize)?;
    let entries: Vec<_> = list
        .chunks_exact(ENTRY_LENGTH as usize)
        .map(|entry| Entry {
            offset: number(entry, 0),
            length: number(entry, 1),
            position: number(entry, 2),
        })
        .collect();
    if entries.first().map(|entry| entry.offset) != Some(at.first_offset)
        || !entries.is_sorted_by(|a, b| {
            a.offset
                .checked_add(a.length)
                .is_some_and(|end| end <= b.offset)
        })
    {
        return Err(damaged);
    }
    Ok(entries)
}

/// Reads a list's header, and returns how many entries follow.
fn list_at(
    source: &mut (impl Read + Seek),
    position: u64,
    tag: [u8; 4],
) -> Result<u32, FormatError> {
    source.seek(SeekFrom::Start(position))?;
    let mut actual = [0; 4];
    let mut count = [0; 4];
    source.read_exact(&mut actual)?;
    source.read_exact(&mut count)?;
    if actual != tag {
        return Err(FormatError::Damaged { position });
    }
    Ok(u32::from_le_bytes(count))
}

fn bytes_from(source: &mut impl Read, length: usize) -> Result<Vec<u8>, FormatError> {
    let mut bytes = vec![0; length];
    source.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u64_from(source: &mut impl Read) -> Result<u64, FormatError> {
    let mut bytes = [0; 8];
    source.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The number at `index` in an entry, which is a list of `u64`.
fn number(entry: &[u8], index: usize) -> u64 {
    let (numbers, _) = entry.as_chunks::<8>();
    u64::from_le_bytes(numbers[index])
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use fleecebox_guest::Extent;
    use proptest::prelude::*;

    use super::*;
    use crate::writer::Writer;

    /// Ascending ranges of 1 to 40 bytes, some of which touch: several pages of them.
    fn ranges() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0..10_u64, 1..40_u64), 0..30).prop_map(|parts| {
            let mut end = 0;
            parts
                .into_iter()
                .map(|(gap, length)| {
                    let range = Extent {
                        offset: end + gap,
                        length,
                    };
                    end = range.end();
                    range
                })
                .collect()
        })
    }

    /// What the volume of these tests holds at an offset.
    fn byte(offset: u64) -> u8 {
        (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    fn content(range: Extent) -> Vec<u8> {
        (range.offset..range.end()).map(byte).collect()
    }

    fn stream(ranges: &[Extent]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), 1 << 30).unwrap();
        for range in ranges {
            let pieces = range.pieces(7).map(|piece| Ok(content(piece)));
            writer.record(*range, pieces).unwrap();
        }
        writer.finish().unwrap()
    }

    proptest! {
        #[test]
        fn any_range_reads_back_across_records_or_is_refused(
            ranges in ranges(),
            asked in prop::collection::vec((0..1500_u64, 1..100_u32), 1..20),
        ) {
            let mut reader = Reader::open(Cursor::new(stream(&ranges))).unwrap();
            for (offset, length) in asked {
                let range = Extent { offset, length: length.into() };
                let stored = |offset| ranges.iter().any(|r| (r.offset..r.end()).contains(&offset));
                match reader.read(offset, length) {
                    Ok(bytes) => prop_assert_eq!(bytes, content(range)),
                    Err(FormatError::NotStored { offset }) => {
                        prop_assert!((range.offset..range.end()).contains(&offset));
                        prop_assert!(!stored(offset));
                    }
                    Err(error) => return Err(TestCaseError::fail(error.to_string())),
                }
                prop_assert_eq!(
                    reader.read(offset, length).is_ok(),
                    (range.offset..range.end()).all(stored)
                );
            }
        }

        #[test]
        fn every_record_reads_back_whole(ranges in ranges()) {
            let mut reader = Reader::open(Cursor::new(stream(&ranges))).unwrap();
            for range in ranges.into_iter().rev() {
                let bytes = reader.read(range.offset, range.length as u32).unwrap();
                prop_assert_eq!(bytes, content(range));
            }
        }

        #[test]
        fn a_stream_that_was_cut_is_refused(ranges in ranges(), cut in any::<prop::sample::Index>()) {
            let mut bytes = stream(&ranges);
            bytes.truncate(cut.index(bytes.len()));
            prop_assert!(Reader::open(Cursor::new(bytes)).is_err());
        }

        #[test]
        fn a_changed_stream_never_makes_the_reader_panic_or_answer_short(
            ranges in ranges(),
            at in any::<prop::sample::Index>(),
            value in any::<u8>(),
            (offset, length) in (0..1500_u64, 1..100_u32),
        ) {
            let mut bytes = stream(&ranges);
            let at = at.index(bytes.len());
            bytes[at] = value;
            if let Ok(mut reader) = Reader::open(Cursor::new(bytes))
                && let Ok(bytes) = reader.read(offset, length)
            {
                prop_assert_eq!(bytes.len(), length as usize);
            }
        }

        #[test]
        fn bytes_of_any_kind_never_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Reader::open(Cursor::new(bytes)).is_err());
        }
    }

    #[test]
    fn an_empty_stream_is_a_stream() {
        let mut reader = Reader::open(Cursor::new(stream(&[]))).unwrap();
        assert!(matches!(
            reader.read(0, 1),
            Err(FormatError::NotStored { offset: 0 })
        ));
    }

    #[test]
    fn a_record_is_refused_that_is_given_too_few_bytes() {
        let mut writer = Writer::new(Vec::new(), 1 << 30).unwrap();
        let range = Extent {
            offset: 0,
            length: 10,
        };
        assert!(writer.record(range, [Ok(vec![0; 9])].into_iter()).is_err());
    }
}
