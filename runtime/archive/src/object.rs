//! The objects that a provider creates, as they are written.

use super::directory;
use super::encoding::Compressors;
use super::error::{Damage, Error};
use super::frame::{FRAME_LIMIT, Frame, ObjectRef};
use super::lock;
use super::name::{BackupId, ObjectName};
use super::seek_table::{self, Lengths};
use super::store::{Store, object_path};
use super::words::EncodingWord;
use fleecebox_contract::Encoding;
use fleecebox_contract::buffer::Buffer;
use fleecebox_contract::digest::Digest;
use fleecebox_contract::extent::Extent;
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
    #[serde(with = "EncodingWord")]
    pub encoding: Encoding,
    /// Before encoding, in bytes.
    pub size: u64,
    /// Length of the file, in bytes.
    pub stored: u64,
    /// Of what the provider wrote, before encoding. The rest has digests in the block tables, and hashing it twice
    /// would cost a third of a backup's time.
    pub digest: Digest,
    /// What the provider wrote, at offsets before encoding, ascending; the rest was spliced.
    pub written: Vec<Extent>,
}

/// The objects of one backup while it is made.
pub(super) struct Objects {
    store: Arc<Store>,
    backup: BackupId,
    compressors: Arc<Compressors>,
    state: Mutex<Made>,
}

#[derive(Default)]
struct Made {
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
            encoder: FrameEncoder {
                encoding,
                compressors: self.compressors.clone(),
            },
            file,
            pending: Buffer::default(),
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
    encoder: FrameEncoder,
    file: File,
    /// Written by the provider and not yet a frame; less than [`FRAME_LIMIT`] bytes, none where there is nothing to
    /// encode.
    pending: Buffer,
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

    /// Makes frames for [`ObjectWriter::append`].
    pub fn encoder(&self) -> FrameEncoder {
        self.encoder.clone()
    }

    /// Appends bytes that the host took from a volume, encoded by this object's own encoder, and says where they lie.
    pub fn append(&mut self, frame: &EncodedFrame) -> Result<Frame, Error> {
        debug_assert_eq!(frame.encoding, self.encoder.encoding);
        self.flush()?;
        let placed = self.frame(frame)?;
        self.size += u64::from(frame.decoded);
        Ok(placed)
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
        self.hasher.update(bytes);
        if self.encoder.encoding == Encoding::Identity {
            return self.store(bytes);
        }
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
            return Err(self.has_failed());
        }
        if self.encoder.encoding == Encoding::Zstd {
            let table = seek_table::render(&self.frames).map_err(Error::damaged(&self.name))?;
            self.store(&table)?;
        }
        self.file.sync_all().map_err(Error::at(&self.name))?;
        let info = ObjectInfo {
            name: self.name.clone(),
            encoding: self.encoder.encoding,
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
            let room = Buffer::for_bytes(FRAME_LIMIT as usize);
            let pending = std::mem::replace(&mut self.pending, room);
            // What was pending is in the frame or lost.
            let frame = self.encoder.encode(pending).inspect_err(|_| self.fail())?;
            self.frame(&frame)?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: &EncodedFrame) -> Result<Frame, Error> {
        let lengths = Lengths {
            stored: frame.stored.len() as u32,
            decoded: frame.decoded,
        };
        let object = ObjectRef::Object {
            backup: self.objects.backup,
            name: self.name.clone(),
        };
        let placed = Frame::new(
            object,
            self.stored,
            lengths.stored,
            lengths.decoded,
            frame.encoding,
        );
        let placed = placed.map_err(|_| {
            self.fail();
            Error::damaged(&self.name)(Damage::Frame)
        })?;
        self.store(&frame.stored)?;
        if frame.encoding == Encoding::Zstd {
            self.frames.push(lengths);
        }
        Ok(placed)
    }

    /// Writes to the file. After an error the object cannot be finished: bytes are missing.
    fn store(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.state == Progress::Failed {
            return Err(self.has_failed());
        }
        self.fail();
        self.file.write_all(bytes).map_err(Error::at(&self.name))?;
        self.stored += bytes.len() as u64;
        self.state = Progress::Open;
        Ok(())
    }

    fn fail(&mut self) {
        self.state = Progress::Failed;
    }

    fn has_failed(&self) -> Error {
        Error::WriterFailed {
            first: format!("object {} lacks bytes", self.name),
        }
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

/// Makes the frames of one object, on any thread and in any order: encoding is what takes time, and only appending
/// has to go in turn.
#[derive(Clone)]
pub struct FrameEncoder {
    encoding: Encoding,
    compressors: Arc<Compressors>,
}

/// A frame's bytes as they are stored, with no place in an object yet.
pub struct EncodedFrame {
    stored: Buffer,
    decoded: u32,
    encoding: Encoding,
}

impl FrameEncoder {
    /// One frame of `bytes`, of which there are 1 to [`FRAME_LIMIT`]; [`Error::TooLarge`] where there are more.
    pub fn encode(&self, bytes: Buffer) -> Result<EncodedFrame, Error> {
        let decoded = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if decoded > FRAME_LIMIT {
            return Err(Error::TooLarge {
                limit: FRAME_LIMIT.into(),
                actual: bytes.len() as u64,
            });
        }
        // Every frame of a zstd object is one, gain or not, so that the file is what zstd reads.
        let stored = match self.encoding {
            Encoding::Identity => bytes,
            Encoding::Zstd => self.compressors.compress(&bytes).map_err(Error::Encode)?,
        };
        Ok(EncodedFrame {
            stored,
            decoded,
            encoding: self.encoding,
        })
    }
}
