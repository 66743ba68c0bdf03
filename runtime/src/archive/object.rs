//! The objects that a provider creates, as they are written.

use super::directory;
use super::encoding::Compressors;
use super::error::{Damage, Error};
use super::frame::{FRAME_LIMIT, Frame, ObjectRef};
use super::lock;
use super::name::{BackupId, ObjectName};
use super::seek_table::{self, Lengths};
use super::store::{Store, object_path};
use crate::channel::Encoding;
use crate::digest::Digest;
use crate::extent::Extent;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};

/// Most runs of written bytes in one object: they lie in the manifest, at some 20 bytes each.
pub(super) const RUN_LIMIT: usize = 1 << 18;

/// A finished object, as the manifest records it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectInfo {
    /// Unique within its backup.
    pub name: ObjectName,
    /// A file of zstd frames decodes to its bytes with any zstd; identity is the bytes.
    pub encoding: Encoding,
    /// Before encoding, in bytes.
    pub size: u64,
    /// Length of the file, in bytes.
    pub stored: u64,
    /// Of the file.
    pub digest: Digest,
    /// What the provider wrote, at offsets before encoding, ascending; the rest was spliced.
    pub written: Vec<Extent>,
}

/// The objects of one backup while it is made.
pub(super) struct Objects {
    store: Arc<Store>,
    backup: BackupId,
    compressors: Arc<Compressors>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    unfinished: usize,
    finished: BTreeMap<ObjectName, ObjectInfo>,
}

impl Objects {
    pub(super) fn new(store: Arc<Store>, backup: BackupId, compressors: Arc<Compressors>) -> Self {
        Self {
            store,
            backup,
            compressors,
            state: Mutex::default(),
        }
    }

    pub(super) fn create(
        self: &Arc<Self>,
        name: &ObjectName,
        encoding: Encoding,
    ) -> Result<ObjectWriter, Error> {
        let path = object_path(self.backup, name);
        let file = directory::create_new(&self.store.backups, &path).map_err(Error::at(name))?;
        lock(&self.state).unfinished += 1;
        Ok(ObjectWriter {
            objects: self.clone(),
            name: name.clone(),
            encoding,
            file,
            pending: Vec::new(),
            size: 0,
            stored: 0,
            hasher: blake3::Hasher::new(),
            frames: Vec::new(),
            written: Vec::new(),
            state: Progress::Open,
        })
    }

    /// All finished ones by name, provided that there are no others.
    pub(super) fn all(&self) -> Result<Vec<ObjectInfo>, Error> {
        let state = lock(&self.state);
        match state.unfinished {
            0 => Ok(state.finished.values().cloned().collect()),
            count => Err(Error::UnfinishedObjects { count }),
        }
    }

    pub(super) fn finished(&self) -> Vec<ObjectInfo> {
        lock(&self.state).finished.values().cloned().collect()
    }
}

/// An object in the making. Dropping it unfinished removes it: all that lies in it is lost then.
pub struct ObjectWriter {
    objects: Arc<Objects>,
    name: ObjectName,
    encoding: Encoding,
    file: File,
    /// Written by the provider and not yet a frame; less than [`FRAME_LIMIT`] bytes.
    pending: Vec<u8>,
    /// Before encoding, `pending` included.
    size: u64,
    stored: u64,
    hasher: blake3::Hasher,
    /// For the seek table; of zstd objects only.
    frames: Vec<Lengths>,
    written: Vec<Extent>,
    state: Progress,
}

/// What is to become of an object's file when its writer goes.
#[derive(PartialEq, Eq)]
enum Progress {
    Open,
    /// A frame is missing, or a part of it is there.
    Failed,
    Finished,
}

impl ObjectWriter {
    /// Bytes so far, before encoding.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Appends bytes that the host took from a volume, and says in which frames they lie: one per piece of
    /// [`FRAME_LIMIT`] bytes, the last may be shorter.
    pub fn append(&mut self, bytes: &[u8]) -> Result<Vec<Frame>, Error> {
        self.flush()?;
        let mut frames = Vec::new();
        for piece in bytes.chunks(FRAME_LIMIT as usize) {
            frames.push(self.frame(piece)?);
            self.size += piece.len() as u64;
        }
        Ok(frames)
    }

    /// Appends bytes that the provider made. Only these will be served to it again.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let Ok(mut extent) = Extent::new(self.size, bytes.len() as u64) else {
            return Ok(()); // nothing to write
        };
        let joins = self.written.last().filter(|last| last.end() == self.size);
        if let Some(joined) = joins.and_then(|last| Extent::between(last.start(), extent.end())) {
            extent = joined;
            self.written.pop();
        } else if self.written.len() >= RUN_LIMIT {
            return Err(Error::TooManyRuns { limit: RUN_LIMIT });
        }
        self.written.push(extent);
        self.size += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = FRAME_LIMIT as usize - self.pending.len();
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.pending.extend(now);
            rest = later;
            if self.pending.len() == FRAME_LIMIT as usize {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Makes the object's bytes durable. Its name is after [`super::BackupWriter::durable`].
    pub fn finish(mut self) -> Result<ObjectInfo, Error> {
        self.flush()?;
        if self.state == Progress::Failed {
            return Err(Error::WriterFailed);
        }
        if self.encoding == Encoding::Zstd {
            let table = seek_table::render(&self.frames).map_err(Error::damaged(&self.name))?;
            self.store(&table)?;
        }
        self.file.sync_all().map_err(Error::at(&self.name))?;
        let info = ObjectInfo {
            name: self.name.clone(),
            encoding: self.encoding,
            size: self.size,
            stored: self.stored,
            digest: self.hasher.finalize().into(),
            written: std::mem::take(&mut self.written),
        };
        self.state = Progress::Finished;
        let mut state = lock(&self.objects.state);
        state.finished.insert(info.name.clone(), info.clone());
        drop(state);
        Ok(info)
    }

    fn flush(&mut self) -> Result<(), Error> {
        if !self.pending.is_empty() {
            let mut pending = std::mem::take(&mut self.pending);
            self.frame(&pending)?;
            pending.clear();
            self.pending = pending;
        }
        Ok(())
    }

    /// Stores one frame. After an error the object cannot be finished: bytes are missing.
    fn frame(&mut self, piece: &[u8]) -> Result<Frame, Error> {
        let offset = self.stored;
        if self.state == Progress::Failed {
            return Err(Error::WriterFailed);
        }
        self.state = Progress::Failed;
        // Every frame of a zstd object is one, gain or not, so that the file is what zstd reads.
        let compressed;
        let stored = match self.encoding {
            Encoding::Identity => piece,
            Encoding::Zstd => {
                let compressors = &self.objects.compressors;
                compressed = compressors.compress(piece).map_err(Error::Encode)?;
                &compressed
            }
        };
        let lengths = Lengths {
            stored: stored.len() as u32,
            decoded: piece.len() as u32,
        };
        let object = ObjectRef::Object {
            backup: self.objects.backup,
            name: self.name.clone(),
        };
        let Lengths {
            stored: length,
            decoded,
        } = lengths;
        let frame = Frame::new(object, offset, length, decoded, self.encoding)
            .map_err(|_| Error::damaged(&self.name)(Damage::Frame))?;
        self.store(stored)?;
        if self.encoding == Encoding::Zstd {
            self.frames.push(lengths);
        }
        self.state = Progress::Open;
        Ok(frame)
    }

    fn store(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(Error::at(&self.name))?;
        self.hasher.update(bytes);
        self.stored += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        lock(&self.objects.state).unfinished -= 1;
        if self.state != Progress::Finished {
            let path = object_path(self.objects.backup, &self.name);
            directory::remove(&self.objects.store.backups, &path);
        }
    }
}
