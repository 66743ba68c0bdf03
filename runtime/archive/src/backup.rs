//! The one writer of one backup, up to its commit.

use super::block_table::{BlockTable, BlockTableWriter, PagesFile, TableRoot};
use super::checks::Author;
use super::directory;
use super::encoding::{Compressors, ZstdLevel};
use super::error::Error;
use super::frame::{FRAME_LIMIT, Frame, ObjectRef};
use super::index::Index;
use super::lock;
use super::manifest::{BackupRecord, KEPT_LIMIT, Kept, MANIFEST_FORMAT, Manifest, RULES, Stats};
use super::name::{BackupId, ComponentId, ObjectName};
use super::namespace::COMPONENT_LIMIT;
use super::needs::{self, Finished, Needs};
use super::object::{ObjectWriter, Objects};
use super::pack::ChunkId;
use super::pack_writer::PackWriter;
use super::store::{KEPT, MANIFEST, OBJECTS, Store};
use super::stored::StoredObjects;
use cap_std::fs::Dir;
use fleecebox_contract::digest::Digest;
use fleecebox_contract::{Encoding, with_causes};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

/// After one, it is not known what is durable.
const NO_PANIC: &str = "no barrier has panicked";

/// Writes one backup. All methods may be called from many threads at once.
///
/// Dropping it uncommitted removes all of the backup, but for packs and components that [`Self::durable`] has
/// given their final names: those belong to the namespace, and other jobs may refer to them already.
pub struct BackupWriter {
    store: Arc<Store>,
    id: BackupId,
    /// `backups/<id>`.
    dir: Dir,
    packs: PackWriter,
    pages: Arc<PagesFile>,
    objects: Arc<Objects>,
    compressors: Arc<Compressors>,
    /// Loaded by the first `put`.
    index: Mutex<Option<Arc<Index>>>,
    /// Under temporary names.
    components: Mutex<BTreeSet<ComponentId>>,
    stats: Mutex<Stats>,
    /// The block tables so far.
    finished: Arc<Mutex<Vec<Finished>>>,
    /// What tables of bases need.
    inherited: Mutex<Vec<(TableRoot, Needs)>>,
    /// Held for reading while a chunk is added, for writing while packs are closed.
    adding: RwLock<()>,
    /// Why some bytes may not be where a table says.
    failed: OnceLock<String>,
    /// Nothing is to be removed any more.
    settled: bool,
}

impl BackupWriter {
    pub(super) fn begin(store: Arc<Store>, id: BackupId, level: ZstdLevel) -> Result<Self, Error> {
        let name = id.to_string();
        let dir = directory::make_dir(&store.backups, &name).map_err(Error::at(id))?;
        let make = || {
            directory::make_dir(&dir, OBJECTS).map_err(Error::at(OBJECTS))?;
            let pages = PagesFile::create(&dir, id)?;
            Ok(pages)
        };
        let pages = make().inspect_err(|_: &Error| discard(&store, id))?;
        let compressors = Arc::new(Compressors::at(level));
        Ok(Self {
            id,
            dir,
            packs: PackWriter::new(store.clone(), id),
            pages: Arc::new(pages),
            objects: Arc::new(Objects::new(store.clone(), id, compressors.clone())),
            compressors,
            index: Mutex::default(),
            components: Mutex::default(),
            stats: Mutex::default(),
            finished: Arc::default(),
            inherited: Mutex::default(),
            adding: RwLock::default(),
            failed: OnceLock::new(),
            settled: false,
            store,
        })
    }

    /// The backup in the making.
    pub fn id(&self) -> BackupId {
        self.id
    }

    /// Stores 1 to [`FRAME_LIMIT`] bytes once per namespace and says where they lie. `digests` are those of the
    /// blocks of `data`, which the host made of these very bytes: they are what the chunk is addressed by.
    pub fn put(&self, data: &[u8], digests: &[Digest], encoding: Encoding) -> Result<Frame, Error> {
        let length = u32::try_from(data.len())
            .ok()
            .filter(|length| (1..=FRAME_LIMIT).contains(length));
        let length = length.ok_or(Error::TooLarge {
            limit: FRAME_LIMIT.into(),
            actual: data.len() as u64,
        })?;
        let _adding = self.adding.read().expect(NO_PANIC);
        self.check()?;
        let id = ChunkId::of(&self.store.key, length, digests);
        let (frame, new) = match self.known(id, data)? {
            Some(frame) => (frame, false),
            None => {
                let compressed = match encoding {
                    Encoding::Identity => None,
                    Encoding::Zstd => {
                        let compressed = self.compressors.compress_if_smaller(data);
                        compressed.map_err(Error::Encode)?
                    }
                };
                let stored = match &compressed {
                    Some(compressed) => self.packs.append(id, compressed, length, Encoding::Zstd),
                    None => self.packs.append(id, data, length, Encoding::Identity),
                };
                stored.inspect_err(|error| self.fail(error))?
            }
        };
        let mut stats = lock(&self.stats);
        stats.chunks += 1;
        stats.put_bytes += u64::from(length);
        if new {
            stats.stored_bytes += u64::from(frame.stored());
        } else {
            stats.known_chunks += 1;
        }
        Ok(frame)
    }

    /// Where a chunk lies already and was seen to be sound.
    fn known(&self, id: ChunkId, data: &[u8]) -> Result<Option<Frame>, Error> {
        // What this backup added comes first: it may have replaced one that is damaged.
        if let Some(frame) = self.packs.find(id) {
            return Ok(Some(frame));
        }
        let index = self.index()?;
        let mut places = index.find(id);
        Ok(places.find(|frame| self.store.holds(frame, data)))
    }

    /// Starts an object; fails with [`Error::Exists`] where this backup has one of that name.
    pub fn create(&self, name: &ObjectName, encoding: Encoding) -> Result<ObjectWriter, Error> {
        self.objects.create(name, encoding)
    }

    /// Starts the block table of a volume of `size` bytes. Blocks that are not set are those of `base`, a table of
    /// this namespace for the same size and block size, or zero where there is none.
    pub fn block_table(
        &self,
        size: u64,
        block_size: u32,
        base: Option<TableRoot>,
    ) -> Result<BlockTableWriter, Error> {
        let (store, pages) = (self.store.clone(), self.pages.clone());
        let finished = self.finished.clone();
        BlockTableWriter::new(store, pages, finished, size, block_size, base)
    }

    /// Tells what the volumes of a base need, so that it need not be found out.
    pub fn build_on(&self, base: &Manifest) {
        let roots = base.record.volumes.iter().map(|volume| volume.root);
        let known = roots.zip(base.needs.iter().cloned());
        lock(&self.inherited).extend(known);
    }

    /// Opens a table that was finished, of this backup or another.
    pub fn table(&self, root: TableRoot) -> BlockTable {
        BlockTable::new(self.store.clone(), root)
    }

    /// What the provider has finished so far, for it to read back.
    pub fn objects(&self) -> StoredObjects {
        StoredObjects::new(self.store.clone(), self.id, self.objects.finished())
    }

    /// What was put so far.
    pub fn stats(&self) -> Stats {
        *lock(&self.stats)
    }

    /// Keeps the component with the backup, unless the namespace has it undamaged.
    pub fn keep_component(&self, bytes: &[u8]) -> Result<ComponentId, Error> {
        if bytes.len() as u64 > COMPONENT_LIMIT {
            return Err(Error::TooLarge {
                limit: COMPONENT_LIMIT,
                actual: bytes.len() as u64,
            });
        }
        let id = ComponentId::of(bytes);
        let mut kept = lock(&self.components);
        if kept.contains(&id) || self.store.component(id, COMPONENT_LIMIT).is_ok() {
            return Ok(id);
        }
        let temporary = directory::temporary(self.id, &id.file_name());
        directory::write_new(&self.store.components, &temporary, bytes)
            .map_err(Error::at(&temporary))?;
        kept.insert(id);
        Ok(id)
    }

    /// Keeps a file of the host's with the backup, under a name that is not taken; the record has to name it.
    pub fn keep(&self, name: ObjectName, bytes: &[u8]) -> Result<Kept, Error> {
        let length = bytes.len() as u64;
        if length > KEPT_LIMIT {
            return Err(Error::TooLarge {
                limit: KEPT_LIMIT,
                actual: length,
            });
        }
        let dir = directory::open_or_make_dir(&self.dir, KEPT).map_err(Error::at(KEPT))?;
        directory::write_new(&dir, &name.to_string(), bytes).map_err(Error::at(&name))?;
        directory::sync(&dir).map_err(Error::at(KEPT))?;
        Ok(Kept {
            digest: Digest::of(bytes),
            bytes: length,
            name,
        })
    }

    /// The one barrier: after it, all that was put, finished or kept survives a power failure. Only the backup's
    /// manifest is missing then.
    pub fn durable(&self) -> Result<(), Error> {
        let _alone = self.adding.write().expect(NO_PANIC);
        self.check()?;
        // After a failed sync the kernel may say that all is well the next time: there is no second try.
        self.make_durable().inspect_err(|error| self.fail(error))
    }

    fn make_durable(&self) -> Result<(), Error> {
        let store = &self.store;
        self.packs.publish()?;
        self.pages.sync()?;
        let mut components = lock(&self.components);
        for id in std::mem::take(&mut *components) {
            let name = id.file_name();
            let temporary = directory::temporary(self.id, &name);
            store
                .components
                .rename(&temporary, &store.components, &name)
                .map_err(Error::at(&name))?;
        }
        drop(components);
        let objects = self.dir.open_dir(OBJECTS).map_err(Error::at(OBJECTS))?;
        let directories = [
            (&store.packs, "packs"),
            (&store.components, "components"),
            (&objects, OBJECTS),
            (&self.dir, "backup"),
            (&store.backups, "backups"),
        ];
        for (dir, path) in directories {
            directory::sync(dir).map_err(Error::at(path))?;
        }
        Ok(())
    }

    /// Makes all durable and then the backup happen, by the manifest's appearance. After any error but
    /// [`Error::CommitUnknown`] it has not happened and its files are gone.
    pub fn commit(mut self, record: BackupRecord) -> Result<Manifest, Error> {
        let objects = self.objects.all()?;
        self.durable()?;
        let roots = record.volumes.iter().map(|volume| volume.root);
        let names: BTreeSet<_> = objects.iter().map(|object| &object.name).collect();
        let needs = roots
            .map(|root| self.needs(root, &names))
            .collect::<Result<_, _>>()?;
        let manifest = Manifest {
            format: MANIFEST_FORMAT,
            archive: self.store.archive,
            namespace: self.store.namespace.clone(),
            backup: self.id,
            objects,
            stats: self.stats(),
            rules: RULES,
            needs,
            record,
        };
        let temporary = directory::temporary(self.id, MANIFEST);
        directory::write_new(&self.dir, &temporary, &manifest.render()?)
            .map_err(Error::at(MANIFEST))?;
        self.settled = true;
        self.dir
            .rename(&temporary, &self.dir, MANIFEST)
            .and_then(|()| directory::sync(&self.dir))
            .map_err(|source| Error::CommitUnknown { source })?;
        self.record_checks(Author::Backup);
        Ok(manifest)
    }

    /// All that a table needs, seen to be there with its length. `objects` are the finished ones of this backup.
    fn needs(&self, root: TableRoot, objects: &BTreeSet<&ObjectName>) -> Result<Needs, Error> {
        let mut needs = Needs::default();
        let mut made_here = false;
        for table in lock(&self.finished)
            .iter()
            .filter(|table| table.root == root)
        {
            made_here = true;
            needs.merge(&self.inherited(table.base)?);
            let mut reached = table.reached.clone();
            // What was given up unfinished is gone, and what lay there for a while has been set anew.
            reached.objects.retain(|object| match object {
                ObjectRef::Object { backup, name } if *backup == self.id => objects.contains(name),
                _ => true,
            });
            needs.add(&self.store, &reached)?;
        }
        if !made_here {
            needs.merge(&self.inherited(root)?);
        }
        needs.are_there(&self.store)?;
        Ok(needs)
    }

    fn inherited(&self, base: TableRoot) -> Result<Needs, Error> {
        let inherited = lock(&self.inherited);
        let known = inherited.iter().find(|(root, _)| *root == base);
        match known {
            Some((_, needs)) => Ok(needs.clone()),
            None => needs::by_walking(&self.store, base),
        }
    }

    /// Keeps what was read back and what was wrong. The backup is none the worse without: it is read again then.
    fn record_checks(&self, author: Author) {
        let by = format!("backup {}", self.id);
        if let Err(error) = self.store.checks.record(&by, author) {
            tracing::warn!(error = %with_causes(&error), "what was read back is not recorded");
        }
    }

    /// Removes all of the backup, as dropping it does, and says whether that worked.
    pub fn abandon(mut self) -> Result<(), Error> {
        self.settled = true;
        self.record_checks(Author::Failed);
        self.store.discard(self.id)
    }

    fn index(&self) -> Result<Arc<Index>, Error> {
        let mut index = lock(&self.index);
        if let Some(index) = &*index {
            return Ok(index.clone());
        }
        let loaded = Arc::new(Index::load(&self.store, Some(self.id))?);
        Ok(index.insert(loaded).clone())
    }

    fn check(&self) -> Result<(), Error> {
        match self.failed.get() {
            None => Ok(()),
            Some(first) => Err(Error::WriterFailed {
                first: first.clone(),
            }),
        }
    }

    fn fail(&self, first: &Error) {
        // Whatever fails after it is its consequence.
        let _ = self.failed.set(with_causes(first));
    }
}

impl Drop for BackupWriter {
    fn drop(&mut self) {
        if !self.settled {
            self.record_checks(Author::Failed);
            discard(&self.store, self.id);
        }
    }
}

/// On a way out that has its own error to report.
fn discard(store: &Store, id: BackupId) {
    if let Err(error) = store.discard(id) {
        tracing::warn!(backup = %id, error = %with_causes(&error), "an uncommitted backup is left for recovery to remove");
    }
}
