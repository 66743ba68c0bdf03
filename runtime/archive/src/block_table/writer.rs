//! Writing a block table: only the pages on the way to what changed.

use super::super::error::Error;
use super::super::lock;
use super::super::needs::Finished;
use super::super::store::Store;
use super::page::{Inner, Leaf};
use super::pages::PagesFile;
use super::{BlockTable, Entry, FAN_OUT, PageRef, Reached, Shape, TableRoot};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Leaves that are kept decoded, about 14 KiB each. A provider that goes through the volume in ascending order, even in
/// several places at once, never comes back to a leaf that was written out; one that jumps about pays
/// for it with pages that are written again.
const OPEN_LEAVES: usize = 64;

/// Makes the block table of one volume. Blocks may be set in any order, by several threads, and again.
/// Memory grows by some 60 bytes per 128 blocks that were touched.
pub struct BlockTableWriter {
    shape: Shape,
    /// The table that this one changes; all zero where there is no base.
    base: BlockTable,
    pages: Arc<PagesFile>,
    /// Where it is told what the table needs.
    finished: Arc<Mutex<Vec<Finished>>>,
    state: Mutex<Leaves>,
}

#[derive(Default)]
struct Leaves {
    clock: u64,
    open: HashMap<u64, OpenLeaf>,
    /// Leaves that differ from the base's and where they are written; nothing where all is zero.
    changed: BTreeMap<u64, Option<PageRef>>,
    /// What was ever set leads to these.
    reached: Reached,
}

struct OpenLeaf {
    used: u64,
    entries: Vec<Entry>,
}

impl BlockTableWriter {
    pub(in super::super) fn new(
        store: Arc<Store>,
        pages: Arc<PagesFile>,
        finished: Arc<Mutex<Vec<Finished>>>,
        size: u64,
        block_size: u32,
        base: Option<TableRoot>,
    ) -> Result<Self, Error> {
        let shape = Shape::new(size, block_size)?;
        let base = base.unwrap_or(TableRoot { shape, page: None });
        if base.shape != shape {
            return Err(Error::BaseDiffers {
                base_size: base.size(),
                base_block_size: base.block_size(),
                size,
                block_size,
            });
        }
        Ok(Self {
            shape,
            base: BlockTable::new(store, base),
            pages,
            finished,
            state: Mutex::default(),
        })
    }

    /// Says where one block is. Out of range where the volume has no such block; refused where the frame does not
    /// reach as far as the block would.
    pub fn set(&self, block: u64, entry: Entry) -> Result<(), Error> {
        let length = self.shape.block_length(block);
        if block >= self.shape.blocks() {
            return Err(Error::OutOfRange {
                offset: block,
                length: 1,
            });
        }
        if let Entry::Placed { frame, skip, .. } = &entry
            && u64::from(*skip) + u64::from(length) > u64::from(frame.decoded())
        {
            return Err(Error::OutsideFrame {
                block,
                length,
                skip: *skip,
                decoded: frame.decoded(),
            });
        }
        let mut state = lock(&self.state);
        state.reached.add(&entry);
        let leaf = self.open(&mut state, block / FAN_OUT)?;
        // A leaf has an entry for each of its blocks.
        leaf.entries[(block % FAN_OUT) as usize] = entry;
        Ok(())
    }

    /// Says that blocks are zero. Whole leaves cost no more than one block.
    pub fn set_zero(&self, blocks: Range<u64>) -> Result<(), Error> {
        if blocks.end > self.shape.blocks() {
            return Err(Error::OutOfRange {
                offset: blocks.start,
                length: blocks.end.saturating_sub(blocks.start),
            });
        }
        let mut state = lock(&self.state);
        let mut at = blocks.start;
        while at < blocks.end {
            let number = at / FAN_OUT;
            let all = self.shape.leaf_blocks(number);
            let end = all.end.min(blocks.end);
            if at == all.start && end == all.end {
                state.open.remove(&number);
                self.note(&mut state, number, None)?;
            } else {
                let leaf = self.open(&mut state, number)?;
                leaf.entries[(at - all.start) as usize..(end - all.start) as usize]
                    .fill(Entry::Zero);
            }
            at = end;
        }
        Ok(())
    }

    /// Writes what is left and gives the root. The table can be read from then on; it is durable after
    /// [`super::super::BackupWriter::durable`]. More may be set afterwards, for another root.
    pub fn finish(&self) -> Result<TableRoot, Error> {
        let mut state = lock(&self.state);
        for (number, leaf) in std::mem::take(&mut state.open) {
            self.write_out(&mut state, number, &leaf)?;
        }
        let height = self.shape.height();
        let changed = state.changed.iter().map(|(&number, &page)| (number, page));
        let mut changed = if height == 0 {
            changed.collect()
        } else {
            self.lift(1, changed)?
        };
        for level in 2..=height {
            changed = self.lift(level, changed.into_iter())?;
        }
        let page = changed.remove(&0).unwrap_or(self.base.root().page);
        // Readers go to the file, never to the buffer.
        self.pages.flush()?;
        let root = TableRoot {
            shape: self.shape,
            page,
        };
        let mut reached = state.reached.clone();
        reached.pages.extend(page.map(|page| page.backup));
        lock(&self.finished).push(Finished {
            root,
            reached,
            base: *self.base.root(),
        });
        Ok(root)
    }

    /// Writes the pages of a level above those that changed, and says which those are.
    fn lift(
        &self,
        level: u32,
        changed: impl Iterator<Item = (u64, Option<PageRef>)>,
    ) -> Result<BTreeMap<u64, Option<PageRef>>, Error> {
        let mut above = BTreeMap::new();
        let mut changed = changed.peekable();
        while let Some(&(first, _)) = changed.peek() {
            let number = first / FAN_OUT;
            let mut inner = match self.base.page(level, number)? {
                Some(page) => Inner::clone(&*self.base.pages().inner(&page, level)?),
                None => Inner::empty(),
            };
            while let Some((child, page)) = changed.next_if(|(child, _)| child / FAN_OUT == number)
            {
                inner.children[(child % FAN_OUT) as usize] = page;
            }
            let page = if inner.is_zero() {
                None
            } else {
                Some(self.pages.append(&inner.render(level)?)?)
            };
            above.insert(number, page);
        }
        Ok(above)
    }

    /// The leaf of this number, decoded.
    fn open<'a>(&self, state: &'a mut Leaves, number: u64) -> Result<&'a mut OpenLeaf, Error> {
        state.clock += 1;
        let used = state.clock;
        let entries = match state.open.remove(&number) {
            Some(leaf) => leaf.entries,
            None => {
                self.make_room(state)?;
                self.read_back(state, number)?
            }
        };
        let leaf = OpenLeaf { used, entries };
        Ok(state.open.entry(number).insert_entry(leaf).into_mut())
    }

    /// Writes out the leaf that was not used for longest, where there are too many.
    fn make_room(&self, state: &mut Leaves) -> Result<(), Error> {
        if state.open.len() < OPEN_LEAVES {
            return Ok(());
        }
        let oldest = state.open.iter().min_by_key(|(_, leaf)| leaf.used);
        match oldest.map(|(&number, _)| number) {
            Some(number) => match state.open.remove(&number) {
                Some(leaf) => self.write_out(state, number, &leaf),
                None => Ok(()),
            },
            None => Ok(()),
        }
    }

    fn read_back(&self, state: &Leaves, number: u64) -> Result<Vec<Entry>, Error> {
        let blocks = self.shape.leaf_blocks(number);
        let page = match state.changed.get(&number) {
            Some(&page) => {
                self.pages.flush()?;
                page
            }
            None => self.base.page(0, number)?,
        };
        Ok(match page {
            Some(page) => self
                .base
                .pages()
                .leaf(&page, blocks, self.shape)?
                .entries(self.shape.block_size),
            None => vec![Entry::Zero; (blocks.end - blocks.start) as usize],
        })
    }

    fn write_out(&self, state: &mut Leaves, number: u64, leaf: &OpenLeaf) -> Result<(), Error> {
        let first = self.shape.leaf_blocks(number).start;
        let leaf = Leaf::of(first, &leaf.entries, self.shape);
        if leaf.is_zero() {
            return self.note(state, number, None);
        }
        let bytes = leaf.render()?;
        let base = self.base.page(0, number)?;
        let same = base.filter(|page| page.is_of(&bytes));
        let page = match same {
            Some(page) => page,
            None => self.pages.append(&bytes)?,
        };
        self.note(state, number, Some(page))
    }

    /// Records a leaf, unless it is the base's.
    fn note(&self, state: &mut Leaves, number: u64, page: Option<PageRef>) -> Result<(), Error> {
        if self.base.page(0, number)? == page {
            state.changed.remove(&number);
        } else {
            state.changed.insert(number, page);
        }
        Ok(())
    }
}
