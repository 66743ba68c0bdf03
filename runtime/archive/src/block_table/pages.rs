//! Pages as bytes: the `pages` object that a backup adds to, and reading from all backups' with a bounded cache.

use super::super::directory;
use super::super::error::{Damage, Error};
use super::super::lock;
use super::super::name::BackupId;
use super::super::store::{self, PAGES, Store};
use super::page::{Inner, Leaf, PAGE_LIMIT};
use super::{PageRef, Shape};
use cap_std::fs::Dir;
use fleecebox_contract::digest::Digest;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

/// Bytes that gather before they are written.
const BUFFER: usize = 256 << 10;

/// Pages that a reader keeps, decoded: about 10 KiB each.
const CACHED_PAGES: usize = 256;

/// The `pages` object of the backup in the making. All its volumes append to it at once.
pub(in super::super) struct PagesFile {
    backup: BackupId,
    file: File,
    tail: Mutex<Tail>,
}

struct Tail {
    /// Bytes in the file; the buffer follows.
    written: u64,
    buffer: Vec<u8>,
}

impl PagesFile {
    /// In the backup's own directory.
    pub(in super::super) fn create(dir: &Dir, backup: BackupId) -> Result<Self, Error> {
        let file = directory::create_new(dir, PAGES).map_err(Error::at(PAGES))?;
        let tail = Tail {
            written: 0,
            buffer: Vec::with_capacity(BUFFER),
        };
        Ok(Self {
            backup,
            file,
            tail: Mutex::new(tail),
        })
    }

    pub(super) fn append(&self, page: &[u8]) -> Result<PageRef, Error> {
        let length = u32::try_from(page.len())
            .ok()
            .filter(|&length| length <= PAGE_LIMIT);
        let length = length.ok_or(Error::TooLarge {
            limit: PAGE_LIMIT.into(),
            actual: page.len() as u64,
        })?;
        let digest = Digest::of(page);
        let mut tail = lock(&self.tail);
        let offset = tail.written + tail.buffer.len() as u64;
        tail.buffer.extend(page);
        if tail.buffer.len() >= BUFFER {
            self.write(&mut tail)?;
        }
        Ok(PageRef {
            backup: self.backup,
            offset,
            length,
            digest,
        })
    }

    /// So that readers of the file see all pages.
    pub(super) fn flush(&self) -> Result<(), Error> {
        self.write(&mut lock(&self.tail))
    }

    /// All pages durable; the name of the object is not.
    pub(in super::super) fn sync(&self) -> Result<(), Error> {
        self.flush()?;
        self.file.sync_all().map_err(Error::at(PAGES))
    }

    /// What could not be written stays in the buffer and is tried again at the same place.
    fn write(&self, tail: &mut Tail) -> Result<(), Error> {
        self.file
            .write_all_at(&tail.buffer, tail.written)
            .map_err(Error::at(PAGES))?;
        tail.written += tail.buffer.len() as u64;
        tail.buffer.clear();
        Ok(())
    }
}

/// Reads pages of any backup of a namespace and keeps those used last.
pub(super) struct PageReader {
    store: Arc<Store>,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    clock: u64,
    pages: HashMap<(BackupId, u64), (u64, Page)>,
}

#[derive(Clone)]
enum Page {
    Leaf(Arc<Leaf>),
    Inner(Arc<Inner>),
}

impl PageReader {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            cache: Mutex::default(),
        }
    }

    pub(super) fn leaf(
        &self,
        page: &PageRef,
        blocks: Range<u64>,
        shape: Shape,
    ) -> Result<Arc<Leaf>, Error> {
        if let Some(Page::Leaf(leaf)) = self.cached(page)
            && leaf.covers(&blocks)
        {
            return Ok(leaf);
        }
        let parsed = Leaf::parse(&self.read(page)?, blocks, shape);
        let leaf = Arc::new(parsed.map_err(damaged(page))?);
        self.keep(page, Page::Leaf(leaf.clone()));
        Ok(leaf)
    }

    pub(super) fn inner(&self, page: &PageRef, level: u32) -> Result<Arc<Inner>, Error> {
        if let Some(Page::Inner(inner)) = self.cached(page) {
            return Ok(inner);
        }
        let parsed = Inner::parse(&self.read(page)?, level);
        let inner = Arc::new(parsed.map_err(damaged(page))?);
        self.keep(page, Page::Inner(inner.clone()));
        Ok(inner)
    }

    fn read(&self, page: &PageRef) -> Result<Vec<u8>, Error> {
        if page.length > PAGE_LIMIT {
            return Err(damaged(page)(Damage::Length {
                expected: PAGE_LIMIT.into(),
                actual: page.length.into(),
            }));
        }
        let file = self.store.open_pages(page.backup)?;
        let bytes = store::read_range(&file, PAGES, page.offset, page.length.into())?;
        if Digest::of(&bytes) != page.digest {
            if let Some(bytes) = page.bytes() {
                let checks = &self.store.checks;
                checks.note_wrong(&super::pages_file(page.backup), bytes);
            }
            return Err(damaged(page)(Damage::Digest));
        }
        Ok(bytes)
    }

    fn cached(&self, page: &PageRef) -> Option<Page> {
        let mut cache = lock(&self.cache);
        cache.clock += 1;
        let now = cache.clock;
        let (used, found) = cache.pages.get_mut(&(page.backup, page.offset))?;
        *used = now;
        Some(found.clone())
    }

    fn keep(&self, page: &PageRef, parsed: Page) {
        let mut cache = lock(&self.cache);
        if cache.pages.len() >= CACHED_PAGES {
            let oldest = cache.pages.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(oldest) = oldest.map(|(&key, _)| key) {
                cache.pages.remove(&oldest);
            }
        }
        let now = cache.clock;
        cache
            .pages
            .insert((page.backup, page.offset), (now, parsed));
    }
}

fn damaged(page: &PageRef) -> impl FnOnce(Damage) -> Error {
    Error::damaged(format!("{}/{PAGES} at {}", page.backup, page.offset))
}
