//! The archive: a directory of objects, and the host's own record of each backup.
//!
//! It knows no QEMU, no NBD and no provider. All of it is synchronous and may be called from many threads; every path
//! goes through a [`Dir`], so nothing outside of the archive's directory can be reached.
//!
//! ```text
//! fleecebox-archive.json             what makes the directory an archive: format and id
//! namespaces/<namespace>/
//!   key                              makes chunk ids tell an outsider nothing
//!   packs/<pack>.pack                what was put: frames and a table of contents
//!   packs/index-cache                spares reading all those tables
//!   components/<sha256>.wasm         the providers that made the backups
//!   checks/<kind>-<random>           what was read back, and what of it was wrong
//!   backups/<backup>/manifest.json   its appearance is the commit
//!   backups/<backup>/pages           the block-table pages that this backup adds
//!   backups/<backup>/objects/<name>  what the provider created
//!   backups/<backup>/kept/<name>     what the host keeps beside the volumes
//! ```
//!
//! # Who may do what at once
//!
//! There is no lock between processes; these rules replace it.
//!
//! | file | written by | may change | removed by |
//! |---|---|---|---|
//! | archive file | whoever names it first | never | nobody |
//! | namespace with its key | whoever renames it first, whole | never | nobody |
//! | pack, component | the job whose id its temporary name begins with | never, once renamed | nobody yet |
//! | index-cache | any job, by renaming | as a whole | anybody |
//! | checks | any job, by renaming | never | of what was seen, any backup once it is too old |
//! | `backups/<id>/` without a manifest | the one job with that id | by that job | that job, or recovery after it |
//! | `backups/<id>/` with a manifest | nobody | never | nobody yet |
//!
//! A job refers only to its own files, to packs that had their final name when it loaded the index, and to pages and
//! objects of committed backups. All of these stay, so no job can take another one's bytes away.
//!
//! # What a crash leaves
//!
//! 0. While a namespace is made: a directory that begins with a dot, which the next one to make that namespace removes.
//! 1. Before [`BackupWriter::durable`]: temporary files and a directory without a manifest. No reader looks at them;
//!    [`Namespace::discard_uncommitted`] removes them.
//! 2. After it, before the manifest's rename: the same, but packs and components have their names. They are whole,
//!    durable and may serve other backups, so they stay.
//! 3. After the rename: a committed backup. All that it refers to was durable before.
//!
//! # What is believed
//!
//! A chunk that the namespace has already is referred to only where its stored bytes were read and are those of the disk:
//! in this backup, or within the last days as `checks/` records it ([`Recheck`]). What was found wrong is never referred
//! to again; the next backup that has the bytes stores them anew, in a pack of its own. Older backups find them there
//! too, as long as the damaged pack's own table says which chunk it was ([`Namespace::copies`]). What a backup takes over
//! from its base is looked at before ([`Namespace::lack_of`]).
//!
//! A failed write or sync spoils the backup for good ([`Error::WriterFailed`]): after a failed sync the kernel
//! may drop the bytes and report success the next time.

#![deny(missing_docs)]

mod backup;
mod block_table;
mod checks;

mod directory;
mod encoding;
mod error;
mod export;
mod frame;
mod index;
mod manifest;
mod name;
mod namespace;
mod needs;
mod object;
mod pack;
mod pack_writer;
#[cfg(test)]
#[path = "../../src/poor_file_system.rs"]
mod poor_file_system;
mod sealed;
mod seek_table;
mod soundness;
mod store;
mod stored;
#[cfg(test)]
mod tests;
mod words;

pub use backup::BackupWriter;
pub use block_table::{
    BlockTable, BlockTableWriter, Entry, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, Run, RunContent, TableRoot,
};
pub use checks::{BELIEVED, Recheck};
pub use encoding::{NotALevel, ZstdLevel};
pub use error::{Damage, Error};
pub use export::{ExportRecord, ExportedDisk};
pub use fleecebox_contract::digest::Digest;
pub use frame::{FRAME_LIMIT, Frame, NotAFrame, ObjectRef, STORED_LIMIT};
pub use manifest::{
    Attachment, BackupRecord, DiskRecord, FileRecord, KEPT_LIMIT, Kept, LayerRecord, LeftOut,
    MANIFEST_FORMAT, MANIFEST_LIMIT, Manifest, Moment, Proof, ProviderRecord, RULES, Stats,
    VolumeRecord,
};
pub use name::{
    ArchiveId, BackupId, ComponentId, NAME_LIMIT, NamespaceName, NotAName, ObjectName, PackName,
};
pub use namespace::{COMPONENT_LIMIT, Namespace};
pub use needs::Needs;
pub use object::{EncodedFrame, FrameEncoder, ObjectInfo, ObjectWriter};
pub use soundness::Lack;
pub use stored::{STORED_READ_LIMIT, StoredObjects};

use cap_std::fs::Dir;
use fleecebox_contract::with_causes;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard};

/// What makes a directory an archive.
const ARCHIVE_FILE: &str = "fleecebox-archive.json";
/// Far above its length.
const ARCHIVE_FILE_LIMIT: u64 = 64 << 10;
const ARCHIVE_FORMAT: u32 = 1;
const NAMESPACES: &str = "namespaces";

/// An archive in a directory.
pub struct Archive {
    root: Dir,
    id: ArchiveId,
    recheck: Recheck,
    zstd_level: ZstdLevel,
}

#[derive(Serialize, Deserialize)]
struct ArchiveFile {
    format: u32,
    id: ArchiveId,
}

impl Archive {
    /// Makes an archive in an empty directory.
    pub fn create(root: Dir) -> Result<Self, Error> {
        for entry in root.entries().map_err(Error::at("."))? {
            let name = entry.map_err(Error::at("."))?.file_name();
            // What a killed `create` left does not count.
            if !name
                .as_encoded_bytes()
                .ends_with(directory::TEMPORARY.as_bytes())
            {
                return Err(Error::NotEmpty);
            }
        }
        let file = ArchiveFile {
            format: ARCHIVE_FORMAT,
            id: ArchiveId::random()?,
        };
        let json =
            serde_json::to_vec(&file).map_err(|error| Error::Serialise(with_causes(&error)))?;
        directory::make_once(&root, ARCHIVE_FILE, &json, ARCHIVE_FILE_LIMIT)?;
        Self::open(root)
    }

    /// Opens the archive in a directory.
    pub fn open(root: Dir) -> Result<Self, Error> {
        let json = match directory::read(&root, ARCHIVE_FILE, ARCHIVE_FILE_LIMIT) {
            Err(Error::NotFound { .. }) => return Err(Error::NotAnArchive),
            other => other?,
        };
        let file: ArchiveFile = serde_json::from_slice(&json)
            .map_err(|error| Error::damaged(ARCHIVE_FILE)(Damage::Json(with_causes(&error))))?;
        if file.format != ARCHIVE_FORMAT {
            return Err(Error::damaged(ARCHIVE_FILE)(Damage::Format {
                expected: ARCHIVE_FORMAT,
                actual: file.format.into(),
            }));
        }
        Ok(Self {
            root,
            id: file.id,
            recheck: Recheck::OlderThan(BELIEVED),
            zstd_level: ZstdLevel::default(),
        })
    }

    /// The same, where stored bytes are read again after another time.
    pub fn rechecking(mut self, recheck: Recheck) -> Self {
        self.recheck = recheck;
        self
    }

    /// The same, where backups are to be compressed at that level.
    pub fn compressing(mut self, level: ZstdLevel) -> Self {
        self.zstd_level = level;
        self
    }

    /// At which level backups are to be compressed here.
    pub fn zstd_level(&self) -> ZstdLevel {
        self.zstd_level
    }

    /// Tells this archive from all others.
    pub fn id(&self) -> ArchiveId {
        self.id
    }

    /// Opens a namespace; [`Error::NotFound`] where there is none of that name.
    pub fn namespace(&self, name: &NamespaceName) -> Result<Namespace, Error> {
        let path = format!("{NAMESPACES}/{name}");
        let root = self.root.open_dir(&path).map_err(Error::at(&path))?;
        let namespace = Namespace::open(&root, self.id, name.clone())?;
        namespace.set_recheck(self.recheck);
        Ok(namespace)
    }

    /// Opens a namespace and makes it first where there is none of that name.
    pub fn create_namespace(&self, name: &NamespaceName) -> Result<Namespace, Error> {
        let parent = directory::open_or_make_dir(&self.root, NAMESPACES);
        let parent = parent.map_err(Error::at(NAMESPACES))?;
        directory::sync(&self.root).map_err(Error::at(NAMESPACES))?;
        if !parent.exists(name.as_str()) {
            directory::make_dir_once(&parent, name.as_str(), Namespace::fill)?;
        }
        let namespace = match self.namespace(name) {
            Err(Error::HalfMade { .. }) => {
                let root = parent.open_dir(name.as_str()).map_err(Error::at(name))?;
                Namespace::fill(&root)?;
                self.namespace(name)
            }
            opened => opened,
        }?;
        namespace.set_recheck(self.recheck);
        Ok(namespace)
    }

    /// The names of all namespaces, in order.
    pub fn namespaces(&self) -> Result<Vec<NamespaceName>, Error> {
        let entries = match self.root.read_dir(NAMESPACES) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(Error::at(NAMESPACES))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            // Those in the making begin with a dot, which no name does.
            let name = entry.map_err(Error::at(NAMESPACES))?.file_name();
            names.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// Locks. A panic while a lock is held leaves a backup half recorded: it must not go on to a commit.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("no thread that holds an archive's lock has panicked")
}
