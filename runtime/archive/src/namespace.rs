//! One tenant's and provider's part of an archive.

use super::backup::BackupWriter;
use super::block_table::{BlockTable, TableRoot};
use super::checks::{Author, Checks, Recheck};
use super::directory;
use super::encoding::ZstdLevel;
use super::error::{Damage, Error};
use super::frame::Frame;
use super::manifest::{KEPT_LIMIT, Kept, MANIFEST_LIMIT, Manifest};
use super::name::{ArchiveId, BackupId, ComponentId, NamespaceName, ObjectName, random};
use super::soundness;
use super::store::{KEPT, MANIFEST, Store};
use super::stored::StoredObjects;
use cap_std::fs::Dir;
use fleecebox_contract::digest::Digest;
use fleecebox_contract::{extent::Extent, with_causes};
use std::io;
use std::sync::{Arc, OnceLock};

/// Largest component that is kept, in bytes: a hundred times a large one.
pub const COMPONENT_LIMIT: u64 = 256 << 20;

/// Stands for all of a file, whatever its length.
const WHOLE: Extent = Extent::WHOLE;

const KEY: &str = "key";
const PACKS: &str = "packs";
const COMPONENTS: &str = "components";
const BACKUPS: &str = "backups";
const PARTS: [&str; 3] = [PACKS, COMPONENTS, BACKUPS];
const KEY_LENGTH: u64 = 32;

/// Reads and adds backups. Cheap to clone.
#[derive(Clone)]
pub struct Namespace {
    pub(super) store: Arc<Store>,
}

impl Namespace {
    /// Makes what each has, in a directory of its own. One that lies under its final name was left so by a version
    /// that made it there: it is finished only while nothing lies in it, since what does was made with another key.
    pub(super) fn fill(root: &Dir) -> Result<(), Error> {
        for name in PARTS {
            let dir = directory::open_or_make_dir(root, name).map_err(Error::at(name))?;
            let mut entries = dir.entries().map_err(Error::at(name))?;
            if entries.next().is_some() && !root.exists(KEY) {
                return Err(Error::damaged(KEY)(Damage::Malformed(
                    "it is missing, and backups were made with it",
                )));
            }
        }
        directory::make_once(root, KEY, &random::<{ KEY_LENGTH as usize }>()?, KEY_LENGTH)?;
        directory::sync(root).map_err(Error::at("."))
    }

    pub(super) fn open(
        root: &Dir,
        archive: ArchiveId,
        namespace: NamespaceName,
    ) -> Result<Self, Error> {
        let key = directory::read(root, KEY, KEY_LENGTH).map_err(|error| match error {
            // It has a name, so it is there.
            Error::NotFound { .. } => Error::HalfMade {
                namespace: namespace.clone(),
            },
            error => error,
        })?;
        let key = <[u8; 32]>::try_from(key).map_err(|key| {
            Error::damaged(KEY)(Damage::Length {
                expected: KEY_LENGTH,
                actual: key.len() as u64,
            })
        })?;
        let open = |dir| {
            root.open_dir(dir).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    Error::damaged(dir)(Damage::Malformed("the folder is missing"))
                }
                _ => Error::at(dir)(error),
            })
        };
        let own = || root.try_clone().map_err(Error::at(&namespace));
        let store = Store {
            archive,
            key,
            checks: Checks::new(own()?, key),
            index: OnceLock::new(),
            root: own()?,
            namespace: namespace.clone(),
            packs: open(PACKS)?,
            components: open(COMPONENTS)?,
            backups: open(BACKUPS)?,
        };
        Ok(Self {
            store: Arc::new(store),
        })
    }

    /// Its name.
    pub fn name(&self) -> &NamespaceName {
        &self.store.namespace
    }

    /// The archive that it is part of.
    pub fn archive(&self) -> ArchiveId {
        self.store.archive
    }

    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Says which stored bytes are read again before a backup refers to them.
    pub fn set_recheck(&self, recheck: Recheck) {
        self.store.checks.set_recheck(recheck);
    }

    /// Begins a backup; fails with [`Error::Exists`] where there is one of that id, committed or not.
    pub fn begin(&self, id: BackupId) -> Result<BackupWriter, Error> {
        self.begin_at(id, ZstdLevel::default())
    }

    /// The same, where what is compressed is so at that level.
    pub fn begin_at(&self, id: BackupId, level: ZstdLevel) -> Result<BackupWriter, Error> {
        BackupWriter::begin(self.store.clone(), id, level)
    }

    /// All committed backups, by id, and those of which that cannot be said: [`Self::manifest`] says why.
    pub fn backups(&self) -> Result<Vec<BackupId>, Error> {
        let mut ids = Vec::new();
        for entry in self.store.backups.entries().map_err(Error::at("backups"))? {
            let name = entry.map_err(Error::at("backups"))?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok())
                && self.store.is_committed(id).unwrap_or(true)
            {
                ids.push(id);
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// The record of a backup. [`Error::NotFound`] means that it did not commit; any other error leaves open whether
    /// it did, and [`Error::Damaged`] means that it did.
    pub fn manifest(&self, id: BackupId) -> Result<Manifest, Error> {
        let path = format!("{id}/{MANIFEST}");
        let bytes = directory::read(&self.store.backups, &path, MANIFEST_LIMIT)?;
        let manifest = Manifest::parse(&bytes).map_err(Error::damaged(&path))?;
        let actual = (manifest.archive, &manifest.namespace, manifest.backup);
        let expected = (self.store.archive, &self.store.namespace, id);
        if actual != expected {
            return Err(Error::damaged(&path)(Damage::Foreign {
                expected: format!("{expected:?}"),
                actual: format!("{actual:?}"),
            }));
        }
        Ok(manifest)
    }

    /// [`Self::manifest`], made durable before it is believed: a job that died in its commit may have renamed the
    /// manifest and not synced its directory, and a backup built on one that a loss of power takes away is lost too.
    pub fn durable_manifest(&self, id: BackupId) -> Result<Manifest, Error> {
        let manifest = self.manifest(id)?;
        let dir = self.store.backups.open_dir(id.to_string());
        dir.and_then(|dir| directory::sync(&dir))
            .map_err(Error::at(id))?;
        Ok(manifest)
    }

    /// Removes what is left of a backup or an export that never committed; nothing being left is no error. Refused for a
    /// committed one. The caller knows that the job that made it has ended.
    pub fn discard_uncommitted(&self, id: BackupId) -> Result<(), Error> {
        if self.store.is_committed(id)? {
            return Err(Error::Committed(id));
        }
        self.discard_unrecorded_export(id)?;
        self.store.discard(id)
    }

    /// The bytes of a component, checked against its id.
    pub fn component(&self, id: ComponentId) -> Result<Vec<u8>, Error> {
        self.store.component(id, COMPONENT_LIMIT)
    }

    /// Opens the block table of a volume.
    pub fn table(&self, root: TableRoot) -> BlockTable {
        BlockTable::new(self.store.clone(), root)
    }

    /// The bytes of what the host kept with a backup, held against their digest.
    pub fn kept(&self, backup: BackupId, kept: &Kept) -> Result<Vec<u8>, Error> {
        let path = format!("{backup}/{KEPT}/{}", kept.name);
        let bytes = directory::read(&self.store.backups, &path, KEPT_LIMIT)?;
        if bytes.len() as u64 != kept.bytes {
            return Err(Error::damaged(path)(Damage::Length {
                expected: kept.bytes,
                actual: bytes.len() as u64,
            }));
        }
        match Digest::of(&bytes) == kept.digest {
            true => Ok(bytes),
            false => Err(Error::damaged(path)(Damage::Digest)),
        }
    }

    /// What the provider wrote in a backup.
    pub fn objects(&self, manifest: &Manifest) -> StoredObjects {
        let objects = manifest.objects.clone();
        StoredObjects::new(self.store.clone(), manifest.backup, objects)
    }

    /// The decoded bytes of a frame, exactly [`Frame::decoded`] of them. Whether they are the right ones is for the
    /// caller to check, block by block, against the digests of the block table.
    pub fn read_frame(&self, frame: &Frame) -> Result<Vec<u8>, Error> {
        self.store.read_frame(frame)
    }

    /// Where else the chunk of a frame lies: a backup that finds it damaged stores it anew. Nothing where the frame's pack
    /// cannot say any more which chunk it was. Whether the bytes are the right ones is for the caller to check here too.
    pub fn copies(&self, frame: &Frame) -> Vec<Frame> {
        self.store.copies(frame).unwrap_or_else(|error| {
            tracing::debug!(error = %with_causes(&error), "no copies can be looked for");
            Vec::new()
        })
    }

    /// Remembers that a frame was read and that all of its bytes are what was stored.
    pub fn note_seen(&self, frame: &Frame) {
        let checks = &self.store.checks;
        checks.note_seen(&frame.object().to_string(), frame.bytes());
    }

    /// Remembers that a frame does not hold what was stored.
    pub fn note_wrong(&self, frame: &Frame) {
        let checks = &self.store.checks;
        checks.note_wrong(&frame.object().to_string(), frame.bytes());
    }

    /// Remembers that what the provider wrote of an object is not what it was.
    pub fn note_wrong_object(&self, backup: BackupId, object: &ObjectName) {
        let file = soundness::written_in(&format!("backups/{backup}/objects/{object}"));
        self.store.checks.note_wrong(&file, WHOLE);
    }

    /// Remembers that the provider of a backup does not give back what it claimed there.
    pub fn note_wrong_claims(&self, backup: BackupId) {
        let file = soundness::claims_of(backup);
        self.store.checks.note_wrong(&file, WHOLE);
    }

    /// Writes down what was seen and what was wrong, for `by` (in words, for people).
    pub fn record_checks(&self, by: &str) -> Result<(), Error> {
        self.store.checks.record(by, Author::Verify)
    }
}
