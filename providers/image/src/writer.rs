//! Writing the stream.

use std::io::{self, Write};

use fleecebox_guest::{Error, Extent};

use crate::format::{
    ENTRIES_PER_PAGE, Entry, HEADER_LENGTH, LIST_HEADER_LENGTH, MAGIC, PAGE, RECORD,
    RECORD_HEADER_LENGTH, ROOT, RootEntry,
};

/// A stream under construction.
pub(crate) struct Writer<W> {
    output: W,
    position: u64,
    /// Records since the last page.
    page: Vec<Entry>,
    root: Vec<RootEntry>,
}

impl<W: Write> Writer<W> {
    /// Begins the stream of a volume of `size` bytes.
    pub(crate) fn new(mut output: W, size: u64) -> io::Result<Writer<W>> {
        let mut header = MAGIC.to_vec();
        header.extend(size.to_le_bytes());
        output.write_all(&header)?;
        Ok(Writer {
            output,
            position: HEADER_LENGTH,
            page: Vec::with_capacity(ENTRIES_PER_PAGE),
            root: Vec::new(),
        })
    }

    /// Where the stream goes.
    pub(crate) fn output(&mut self) -> &mut W {
        &mut self.output
    }

    /// Adds a record. Records must ascend; `pieces` must be its bytes, no more and no fewer.
    pub(crate) fn record(
        &mut self,
        range: Extent,
        pieces: impl Iterator<Item = Result<Vec<u8>, Error>>,
    ) -> Result<(), Error> {
        let mut header = RECORD.to_vec();
        header.extend(range.offset.to_le_bytes());
        header.extend(range.length.to_le_bytes());
        self.output.write_all(&header)?;
        self.position += RECORD_HEADER_LENGTH;

        let position = self.position;
        for piece in pieces {
            let piece = piece?;
            self.output.write_all(&piece)?;
            self.position += piece.len() as u64;
        }
        let written = self.position - position;
        if written != range.length {
            return Err(Error::other(format_args!(
                "a record of {} bytes was given {written}",
                range.length
            )));
        }
        self.page.push(Entry {
            offset: range.offset,
            length: range.length,
            position,
        });
        if self.page.len() == ENTRIES_PER_PAGE {
            self.write_page()?;
        }
        Ok(())
    }

    /// Ends the stream, and returns where it went.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        if !self.page.is_empty() {
            self.write_page()?;
        }
        let mut end = list_header(ROOT, self.root.len());
        for entry in &self.root {
            end.extend(entry.first_offset.to_le_bytes());
            end.extend(entry.position.to_le_bytes());
        }
        end.extend(self.position.to_le_bytes());
        end.extend(MAGIC);
        self.output.write_all(&end)?;
        Ok(self.output)
    }

    fn write_page(&mut self) -> io::Result<()> {
        let mut page = list_header(PAGE, self.page.len());
        self.root.push(RootEntry {
            first_offset: self.page[0].offset,
            position: self.position,
        });
        for entry in self.page.drain(..) {
            page.extend(entry.offset.to_le_bytes());
            page.extend(entry.length.to_le_bytes());
            page.extend(entry.position.to_le_bytes());
        }
        self.output.write_all(&page)?;
        self.position += page.len() as u64;
        Ok(())
    }
}

/// `count` is a number of records of 64 KiB or more, or of pages of them, and so fits.
fn list_header(tag: [u8; 4], count: usize) -> Vec<u8> {
    let mut header = Vec::with_capacity(LIST_HEADER_LENGTH as usize);
    header.extend(tag);
    header.extend((count as u32).to_le_bytes());
    header
}
