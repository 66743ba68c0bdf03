//! The packs that one backup adds.
//!
//! Many threads append at once: a place is reserved under the lock, the bytes are written outside of it, and
//! whoever is the last to let go of a full pack closes it. That thread waits for the disk, so that the
//! barrier before the commit finds little left to do and no more than a few packs are ever open.

use super::directory;
use super::error::Error;
use super::frame::Frame;
use super::lock;
use super::name::{BackupId, PackName};
use super::pack::{self, ChunkId, PACK_LIMIT, Place};
use super::store::Store;
use fleecebox_contract::Encoding;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

pub(super) struct PackWriter {
    store: Arc<Store>,
    backup: BackupId,
    state: Mutex<Packs>,
}

#[derive(Default)]
struct Packs {
    open: Option<Open>,
    /// Durable under their temporary names.
    closed: Vec<PackName>,
    /// All packs of this backup, so that a chunk needs a number only.
    names: Vec<PackName>,
    /// What this backup added, since the namespace's index is as of its start.
    chunks: HashMap<ChunkId, (u32, Place)>,
}

struct Open {
    pack: Arc<Pack>,
    /// Reserved so far.
    length: u32,
    /// In [`Packs::names`].
    number: u32,
}

struct Pack {
    name: PackName,
    file: File,
    table: Mutex<Vec<(ChunkId, Place)>>,
}

impl PackWriter {
    pub(super) fn new(store: Arc<Store>, backup: BackupId) -> Self {
        Self {
            store,
            backup,
            state: Mutex::default(),
        }
    }

    /// The chunk, where this backup has added it.
    pub(super) fn find(&self, id: ChunkId) -> Option<Frame> {
        lock(&self.state).find(id)
    }

    /// Adds a chunk, unless it has been added meanwhile; says whether it was. After an error the backup must
    /// not be committed: a reserved place may hold nothing.
    pub(super) fn append(
        &self,
        id: ChunkId,
        stored: &[u8],
        decoded: u32,
        encoding: Encoding,
    ) -> Result<(Frame, bool), Error> {
        let length = u32::try_from(stored.len()).map_err(|_| too_large(stored))?;
        let mut state = lock(&self.state);
        if let Some(frame) = state.find(id) {
            return Ok((frame, false));
        }
        let full = state
            .open
            .take_if(|open| open.length.saturating_add(length) > PACK_LIMIT);
        let open = match state.open.take() {
            Some(open) => open,
            None => self.open(&mut state)?,
        };
        let place = Place {
            offset: open.length,
            stored: length,
            decoded,
            encoding,
        };
        let (pack, number) = (open.pack.clone(), open.number);
        let frame = place.frame(pack.name).ok_or_else(|| too_large(stored))?;
        state.open = Some(Open {
            length: open.length + length,
            ..open
        });
        state.chunks.insert(id, (number, place));
        lock(&pack.table).push((id, place));
        drop(state);

        pack.file
            .write_all_at(stored, place.offset.into())
            .map_err(Error::at(frame.object()))?;
        self.release(pack)?;
        if let Some(full) = full {
            self.release(full.pack)?;
        }
        Ok((frame, true))
    }

    fn open(&self, state: &mut Packs) -> Result<Open, Error> {
        let name = PackName::random()?;
        let temporary = directory::temporary(self.backup, &name.file_name());
        let file =
            directory::create_new(&self.store.packs, &temporary).map_err(Error::at(&temporary))?;
        let number = state.names.len() as u32;
        state.names.push(name);
        Ok(Open {
            pack: Arc::new(Pack {
                name,
                file,
                table: Mutex::default(),
            }),
            length: 0,
            number,
        })
    }

    /// Lets go of a pack and closes it where nobody else holds it.
    fn release(&self, pack: Arc<Pack>) -> Result<(), Error> {
        let Some(pack) = Arc::into_inner(pack) else {
            return Ok(());
        };
        let table = lock(&pack.table);
        // Places are reserved in ascending order.
        let end = table.last().map_or(0, |(_, place)| {
            u64::from(place.offset) + u64::from(place.stored)
        });
        pack.file
            .write_all_at(&pack::render_table(&table), end)
            .and_then(|()| pack.file.sync_all())
            .map_err(Error::at(pack.name.file_name()))?;
        drop(table);
        lock(&self.state).closed.push(pack.name);
        Ok(())
    }

    /// Closes the open pack and gives all closed ones their names; the directory is not synced.
    /// No `append` may be under way.
    pub(super) fn publish(&self) -> Result<(), Error> {
        let open = lock(&self.state).open.take();
        if let Some(open) = open {
            self.release(open.pack)?;
        }
        let closed = std::mem::take(&mut lock(&self.state).closed);
        for name in closed {
            let name = name.file_name();
            let temporary = directory::temporary(self.backup, &name);
            self.store
                .packs
                .rename(&temporary, &self.store.packs, &name)
                .map_err(Error::at(&name))?;
        }
        Ok(())
    }
}

impl Packs {
    fn find(&self, id: ChunkId) -> Option<Frame> {
        let &(number, place) = self.chunks.get(&id)?;
        place.frame(self.names[number as usize])
    }
}

fn too_large(stored: &[u8]) -> Error {
    Error::TooLarge {
        limit: super::frame::STORED_LIMIT.into(),
        actual: stored.len() as u64,
    }
}
