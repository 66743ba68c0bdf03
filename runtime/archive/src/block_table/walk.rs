//! Going through a table page by page: what lies below it, and whether that is all there.

use super::super::error::Error;
use super::super::frame::ObjectRef;
use super::super::name::BackupId;
use super::super::store::{PAGES, Store};
use super::pages::PageReader;
use super::{BlockTable, Entry, FAN_OUT, PageRef, Run, RunContent, TableRoot};
use fleecebox_contract::extent::Extent;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

/// A leaf of a table, by where its page lies.
#[derive(Clone, Copy)]
pub(in super::super) struct LeafRef {
    number: u64,
    page: PageRef,
}

/// A page that cannot be had.
pub(in super::super) struct LostPage {
    /// Its file in the namespace.
    pub(in super::super) file: String,
    pub(in super::super) error: Error,
}

/// What the entries of tables lead to.
#[derive(Clone, Default)]
pub(in super::super) struct Reached {
    pub(in super::super) objects: BTreeSet<ObjectRef>,
    pub(in super::super) pages: BTreeSet<BackupId>,
    pub(in super::super) claimed: BTreeSet<BackupId>,
}

impl LeafRef {
    /// The file in the namespace that holds its page.
    pub(in super::super) fn file(&self) -> String {
        file(self.page.backup)
    }

    /// Where in it.
    pub(in super::super) fn bytes(&self) -> Option<Extent> {
        self.page.bytes()
    }
}

/// The file of a backup's pages, in the namespace.
pub(in super::super) fn file(backup: BackupId) -> String {
    format!("backups/{backup}/{PAGES}")
}

impl PageRef {
    /// Where in its file it lies.
    pub(super) fn bytes(&self) -> Option<Extent> {
        Extent::new(self.offset, self.length.into()).ok()
    }
}

impl BlockTable {
    /// All leaves in order; every inner page has been read then.
    pub(in super::super) fn leaves(&self) -> Result<Vec<LeafRef>, LostPage> {
        let mut leaves = Vec::new();
        if let Some(page) = self.root().page {
            self.below(page, self.root().shape.height(), 0, &mut leaves)?;
        }
        Ok(leaves)
    }

    /// `number` is the page's among those of its level.
    fn below(
        &self,
        page: PageRef,
        level: u32,
        number: u64,
        leaves: &mut Vec<LeafRef>,
    ) -> Result<(), LostPage> {
        if level == 0 {
            leaves.push(LeafRef { number, page });
            return Ok(());
        }
        let inner = self.pages().inner(&page, level).map_err(lost(page))?;
        for (slot, child) in (0u64..).zip(&inner.children) {
            if let Some(child) = child {
                let number = number.saturating_mul(FAN_OUT).saturating_add(slot);
                self.below(*child, level - 1, number, leaves)?;
            }
        }
        Ok(())
    }

    /// The runs of one of its leaves.
    pub(in super::super) fn runs(&self, leaf: LeafRef) -> Result<Vec<Run>, LostPage> {
        let shape = self.root().shape;
        let blocks = shape.leaf_blocks(leaf.number);
        let read = self.pages().leaf(&leaf.page, blocks, shape);
        let read = read.map_err(lost(leaf.page))?;
        Ok(read.all().to_vec())
    }
}

fn lost(page: PageRef) -> impl FnOnce(Error) -> LostPage {
    move |error| LostPage {
        file: file(page.backup),
        error,
    }
}

impl Reached {
    /// What a block leads to.
    pub(super) fn add(&mut self, entry: &Entry) {
        match entry {
            Entry::Zero => {}
            Entry::Placed { frame, .. } => self.add_object(frame.object()),
            Entry::Claimed { backup, .. } => drop(self.claimed.insert(*backup)),
        }
    }

    fn add_run(&mut self, run: &Run) {
        match &run.content {
            RunContent::Zero => {}
            RunContent::Placed { frame, .. } => self.add_object(frame.object()),
            RunContent::Claimed { backup, .. } => drop(self.claimed.insert(*backup)),
        }
    }

    fn add_object(&mut self, object: &ObjectRef) {
        // Most neighbours lie in one file.
        if !self.objects.contains(object) {
            self.objects.insert(object.clone());
        }
    }
}

/// Goes through many tables that share pages, each page once.
pub(in super::super) struct Walk {
    store: Arc<Store>,
    met: HashSet<(BackupId, u64)>,
}

impl Walk {
    pub(in super::super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            met: HashSet::new(),
        }
    }

    /// Adds what a table leads to and no table before it did.
    pub(in super::super) fn through(
        &mut self,
        root: TableRoot,
        reached: &mut Reached,
    ) -> Result<(), LostPage> {
        let pages = PageReader::new(self.store.clone());
        match root.page {
            Some(page) => self.page(&pages, root, page, root.shape.height(), 0, reached),
            None => Ok(()),
        }
    }

    fn page(
        &mut self,
        pages: &PageReader,
        root: TableRoot,
        page: PageRef,
        level: u32,
        number: u64,
        reached: &mut Reached,
    ) -> Result<(), LostPage> {
        if !self.met.insert((page.backup, page.offset)) {
            return Ok(());
        }
        reached.pages.insert(page.backup);
        if level == 0 {
            let blocks = root.shape.leaf_blocks(number);
            let leaf = pages.leaf(&page, blocks, root.shape).map_err(lost(page))?;
            leaf.all().iter().for_each(|run| reached.add_run(run));
            return Ok(());
        }
        let inner = pages.inner(&page, level).map_err(lost(page))?;
        for (slot, child) in (0u64..).zip(&inner.children) {
            if let Some(child) = child {
                let number = number.saturating_mul(FAN_OUT).saturating_add(slot);
                self.page(pages, root, *child, level - 1, number, reached)?;
            }
        }
        Ok(())
    }
}
