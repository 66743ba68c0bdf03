//! The directories of one namespace, shared by everything that reads or writes it.

use super::directory;
use super::encoding;
use super::error::{Damage, Error};
use super::frame::{Frame, ObjectRef};
use super::name::{ArchiveId, BackupId, ComponentId, NamespaceName, ObjectName};
use cap_std::fs::Dir;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub(super) struct Store {
    pub(super) archive: ArchiveId,
    pub(super) namespace: NamespaceName,
    /// For chunk ids.
    pub(super) key: [u8; 32],
    pub(super) packs: Dir,
    pub(super) components: Dir,
    pub(super) backups: Dir,
}

impl Store {
    /// Opens a file that holds frames.
    pub(super) fn open_object(&self, object: &ObjectRef) -> Result<File, Error> {
        let file = match object {
            ObjectRef::Pack(name) => self.packs.open(name.file_name()),
            ObjectRef::Object { backup, name } => self.backups.open(object_path(*backup, name)),
        };
        file.map(|file| file.into_std()).map_err(Error::at(object))
    }

    /// The decoded bytes of a frame. That they are the right ones is for the digests of its blocks to say.
    pub(super) fn read_frame(&self, frame: &Frame) -> Result<Vec<u8>, Error> {
        read_frame_of(&self.open_object(frame.object())?, frame)
    }

    /// Opens the block-table pages of a backup.
    pub(super) fn open_pages(&self, backup: BackupId) -> Result<File, Error> {
        let path = format!("{backup}/{PAGES}");
        let file = self.backups.open(&path).map_err(Error::at(path))?;
        Ok(file.into_std())
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
