//! Reading a block table.

use super::super::error::Error;
use super::super::store::Store;
use super::page::Leaf;
use super::pages::PageReader;
use super::{Entry, FAN_OUT, PageRef, Run, RunContent, TableRoot, span};
use std::ops::Range;
use std::sync::Arc;

/// A block table, read page by page as it is asked; memory does not grow with the volume.
pub struct BlockTable {
    root: TableRoot,
    pages: PageReader,
}

/// What lies below a reference on the way to a block.
enum Found {
    /// All is zero before this block.
    Zero(u64),
    /// The leaf of the block.
    Leaf(Arc<Leaf>),
}

impl BlockTable {
    pub(in super::super) fn new(store: Arc<Store>, root: TableRoot) -> Self {
        Self {
            root,
            pages: PageReader::new(store),
        }
    }

    /// The root that it was opened with.
    pub fn root(&self) -> &TableRoot {
        &self.root
    }

    /// The entry of one block; out of range where the volume has no such block.
    pub fn get(&self, block: u64) -> Result<Entry, Error> {
        self.check(&(block..block.saturating_add(1)))?;
        let entry = match self.find(block)? {
            Found::Zero(_) => None,
            Found::Leaf(leaf) => leaf
                .run(block)
                .and_then(|run| run.entry(block, self.root.block_size())),
        };
        Ok(entry.unwrap_or(Entry::Zero))
    }

    /// All blocks of a range in ascending order, as runs without gaps. Zeroes are one run, however many there are;
    /// other runs have at most 128 blocks. Ends after an error; out of range where the range ends past the volume.
    pub fn entries(
        &self,
        blocks: Range<u64>,
    ) -> Result<impl Iterator<Item = Result<Run, Error>> + '_, Error> {
        self.check(&blocks)?;
        Ok(Runs {
            table: self,
            rest: blocks,
            leaf: None,
            ahead: None,
        })
    }

    fn check(&self, blocks: &Range<u64>) -> Result<(), Error> {
        if blocks.end <= self.root.blocks() {
            return Ok(());
        }
        Err(Error::OutOfRange {
            offset: blocks.start,
            length: blocks.end.saturating_sub(blocks.start),
        })
    }

    fn find(&self, block: u64) -> Result<Found, Error> {
        let shape = self.root.shape;
        let mut level = shape.height();
        let mut page = self.root.page;
        loop {
            let Some(reference) = page else {
                let below = span(level);
                let end = (block / below).saturating_add(1).saturating_mul(below);
                return Ok(Found::Zero(end));
            };
            if level == 0 {
                let blocks = shape.leaf_blocks(block / FAN_OUT);
                let leaf = self.pages.leaf(&reference, blocks, shape)?;
                return Ok(Found::Leaf(leaf));
            }
            let inner = self.pages.inner(&reference, level)?;
            level -= 1;
            page = inner.children[(block / span(level) % FAN_OUT) as usize];
        }
    }

    /// The page of a level with this number, counted from the volume's start; nothing where all is zero.
    pub(super) fn page(&self, level: u32, number: u64) -> Result<Option<PageRef>, Error> {
        let mut at = self.root.shape.height();
        let mut page = self.root.page;
        while at > level {
            let Some(reference) = page else { break };
            let inner = self.pages.inner(&reference, at)?;
            at -= 1;
            let below = FAN_OUT.saturating_pow(at - level);
            page = inner.children[(number / below % FAN_OUT) as usize];
        }
        Ok(page)
    }

    /// For the writer, which reads its own pages and its base's alike.
    pub(super) fn pages(&self) -> &PageReader {
        &self.pages
    }
}

struct Runs<'a> {
    table: &'a BlockTable,
    rest: Range<u64>,
    leaf: Option<Arc<Leaf>>,
    /// Found, or met, while looking for the end of zeroes.
    ahead: Option<Result<Run, Error>>,
}

impl Runs<'_> {
    /// The next run, where zeroes may go on in the one after.
    fn piece(&mut self) -> Result<Option<Run>, Error> {
        if let Some(ahead) = self.ahead.take() {
            return ahead.map(Some);
        }
        if self.rest.is_empty() {
            return Ok(None);
        }
        let start = self.rest.start;
        let same = self.leaf.take().filter(|leaf| leaf.run(start).is_some());
        let found = match same {
            Some(leaf) => Found::Leaf(leaf),
            None => self.table.find(start)?,
        };
        let run = match found {
            Found::Zero(end) => Some(Run {
                blocks: start..end.min(self.rest.end),
                content: RunContent::Zero,
            }),
            Found::Leaf(leaf) => {
                let block_size = self.table.root.block_size();
                let run = leaf.run(start);
                let run = run.and_then(|run| run.clipped(&self.rest, block_size));
                self.leaf = Some(leaf);
                run
            }
        };
        if let Some(run) = &run {
            self.rest.start = run.blocks.end;
        }
        Ok(run)
    }

    fn advance(&mut self) -> Result<Option<Run>, Error> {
        let Some(mut run) = self.piece()? else {
            return Ok(None);
        };
        while run.content == RunContent::Zero {
            match self.piece().transpose() {
                Some(Ok(next)) if next.content == RunContent::Zero => {
                    run.blocks.end = next.blocks.end;
                }
                // These zeroes are sound, whatever comes after them.
                other => {
                    self.ahead = other;
                    break;
                }
            }
        }
        Ok(Some(run))
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance().transpose();
        if let Some(Err(_)) = next {
            self.rest.start = self.rest.end;
            self.ahead = None;
        }
        next
    }
}
