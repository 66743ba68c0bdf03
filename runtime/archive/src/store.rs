//! The directories of one namespace, shared by everything that reads or writes it.

use super::checks::Checks;
use super::directory;
use super::encoding;
use super::error::{Damage, Error};
use super::frame::{Frame, ObjectRef};
use super::index::Index;
use super::name::{ArchiveId, BackupId, ComponentId, NamespaceName, ObjectName};
use super::pack::{self, Place};
use cap_std::fs::Dir;
use fleecebox_contract::with_causes;
use rustix::fs::Advice;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// Bytes of a file that are read in one go where a frame of it begins: far more than a disk reads while it seeks.
const READ_AHEAD: u64 = 4 << 20;

pub(super) struct Store {
    pub(super) archive: ArchiveId,
    pub(super) namespace: NamespaceName,
    /// For chunk ids.
    pub(super) key: [u8; 32],
    /// What was read back.
    pub(super) checks: Checks,
    /// Loaded where copies of damaged chunks are looked for.
    pub(super) index: OnceLock<Index>,
    /// The namespace's own directory.
    pub(super) root: Dir,
    pub(super) packs: Dir,
    pub(super) components: Dir,
    pub(super) backups: Dir,
}

impl Store {
    /// Opens a file that holds frames.
    pub(super) fn open_object(&self, object: &ObjectRef) -> Result<File, Error> {
        match object {
            ObjectRef::Pack(name) => directory::open(&self.packs, name.file_name()),
            ObjectRef::Object { backup, name } => {
                directory::open(&self.backups, object_path(*backup, name))
            }
        }
    }

    /// The decoded bytes of a frame. That they are the right ones is for the digests of its blocks to say.
    pub(super) fn read_frame(&self, frame: &Frame) -> Result<Vec<u8>, Error> {
        read_frame_of(&self.open_object(frame.object())?, frame)
    }

    /// Whether a chunk that lies there may be referred to for `data`: its bytes were seen lately, or are read now and
    /// are these.
    pub(super) fn holds(&self, frame: &Frame, data: &[u8]) -> bool {
        let (file, bytes) = (frame.object().to_string(), frame.bytes());
        if self.checks.is_wrong(&file, bytes) {
            return false;
        }
        if self.checks.is_seen(&file, bytes) {
            return true;
        }
        let why = match self.read_ahead(frame) {
            Ok(found) if found == data => {
                self.checks.note_seen(&file, bytes);
                return true;
            }
            Ok(_) => Error::damaged(&file)(Damage::Digest),
            Err(error) => error,
        };
        if why.is_damage() {
            self.checks.note_wrong(&file, bytes);
        }
        tracing::warn!(error = %with_causes(&why), "a chunk at {bytes} of {file} is not as it was stored; it is stored anew");
        false
    }

    /// [`Self::read_frame`], after which its neighbours are likely to be asked for: they are read in one go.
    pub(super) fn read_ahead(&self, frame: &Frame) -> Result<Vec<u8>, Error> {
        let file = self.open_object(frame.object())?;
        if frame.offset() % READ_AHEAD < u64::from(frame.stored()) {
            let ahead = std::num::NonZeroU64::new(2 * READ_AHEAD);
            // Without it, it takes longer.
            let _ = rustix::fs::fadvise(&file, frame.offset(), ahead, Advice::WillNeed);
        }
        read_frame_of(&file, frame)
    }

    /// Where else the chunk of a frame lies.
    pub(super) fn copies(&self, frame: &Frame) -> Result<Vec<Frame>, Error> {
        let ObjectRef::Pack(_) = frame.object() else {
            return Ok(Vec::new());
        };
        let file = self.open_object(frame.object())?;
        let table = pack::read_table(&file, &frame.object().to_string())?;
        let own = |(_, place): &&(_, Place)| u64::from(place.offset) == frame.offset();
        let Some((id, _)) = table.iter().find(own) else {
            return Ok(Vec::new());
        };
        let index = match self.index.get() {
            Some(index) => index,
            None => {
                let loaded = Index::load(self, None)?;
                self.index.get_or_init(|| loaded)
            }
        };
        let others = index.find(*id).filter(|other| other != frame);
        Ok(others.collect())
    }

    /// Opens the block-table pages of a backup.
    pub(super) fn open_pages(&self, backup: BackupId) -> Result<File, Error> {
        let path = format!("{backup}/{PAGES}");
        directory::open(&self.backups, path)
    }

    /// Whether the manifest of a backup is there, be it sound or not.
    pub(super) fn is_committed(&self, backup: BackupId) -> Result<bool, Error> {
        let path = format!("{backup}/{MANIFEST}");
        match self.backups.symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::at(path)(error)),
        }
    }

    /// Removes all that belongs to an uncommitted backup alone. Packs and components that have their final names
    /// stay: other jobs may have found and used them.
    pub(super) fn discard(&self, backup: BackupId) -> Result<(), Error> {
        directory::remove_temporaries(&self.packs, backup).map_err(Error::at("packs"))?;
        directory::remove_temporaries(&self.components, backup).map_err(Error::at("components"))?;
        match self.backups.remove_dir_all(backup.to_string()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(Error::at(backup)),
        }
    }

    /// A component whose bytes still have the digest that names them.
    pub(super) fn component(&self, id: ComponentId, limit: u64) -> Result<Vec<u8>, Error> {
        let path = id.file_name();
        let bytes = directory::read(&self.components, &path, limit)?;
        if ComponentId::of(&bytes) != id {
            return Err(Error::damaged(path)(Damage::Digest));
        }
        Ok(bytes)
    }
}

/// In a backup's directory: what the host keeps there.
pub(super) const KEPT: &str = "kept";

/// In a backup's directory.
pub(super) const MANIFEST: &str = "manifest.json";
/// In a backup's directory.
pub(super) const PAGES: &str = "pages";
/// In a backup's directory.
pub(super) const OBJECTS: &str = "objects";

/// In `backups/`.
pub(super) fn object_path(backup: BackupId, name: &ObjectName) -> String {
    format!("{backup}/{OBJECTS}/{name}")
}

/// The decoded bytes of a frame of an open file.
pub(super) fn read_frame_of(file: &File, frame: &Frame) -> Result<Vec<u8>, Error> {
    let stored = read_range(file, frame.object(), frame.offset(), frame.stored().into())?;
    encoding::decode(stored, frame.decoded(), frame.encoding())
        .map_err(Error::damaged(frame.object()))
}

/// `length` bytes at `offset`, allocated only after the file was seen to have them.
pub(super) fn read_range(
    file: &File,
    path: impl std::fmt::Display + Copy,
    offset: u64,
    length: u64,
) -> Result<Vec<u8>, Error> {
    let actual = file.metadata().map_err(Error::at(path))?.len();
    let end = offset.checked_add(length).filter(|&end| end <= actual);
    let (Some(_), Ok(length)) = (end, usize::try_from(length)) else {
        return Err(Error::damaged(path)(Damage::Length {
            expected: offset.saturating_add(length),
            actual,
        }));
    };
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset)
        .map_err(Error::at(path))?;
    Ok(bytes)
}
