//! Whether all that an incremental would take over from its base can be had: asked before there is a point in time, while
//! everything can still be read again.

use super::block_table::{BlockTable, LeafRef, LostPage, Reached, RunContent, TableRoot, Walk};
use super::error::{Damage, Error};
use super::frame::Frame;
use super::lock;
use super::manifest::Manifest;
use super::name::{BackupId, ComponentId};
use super::namespace::{COMPONENT_LIMIT, Namespace};
use super::needs::{Needs, by_walking};
use super::store::Store;
use fleecebox_contract::extent::Extent;
use fleecebox_contract::{digest, with_causes};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Most stored bytes of one volume's base that are read back for one incremental: a second's work. Of a larger base each
/// incremental reads another part; an object whose provider wrote more is left to `verify`, as its digest is of all of it.
const READ_BACK: u64 = 1 << 30;

/// Leaves of a table that are all read each time, whoever saw them: those of 16 GiB take a tenth of a second.
const FEW_LEAVES: usize = 2048;

/// Something that a backup needs and that cannot be had as it was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// By its path in the namespace.
    pub file: String,
    /// Why not.
    pub why: String,
}

impl Lack {
    fn of(file: impl Into<String>, error: &Error) -> Self {
        Self {
            file: file.into(),
            why: with_causes(error),
        }
    }
}

impl From<LostPage> for Lack {
    fn from(LostPage { file, error }: LostPage) -> Self {
        Self::of(file, &error)
    }
}

impl Namespace {
    /// What the volume of a backup lacks, as far as it was looked for: the first thing that is not there is enough to build
    /// nothing on it. Every file is looked at, every inner page is read, and so are leaves with the frames in them, and
    /// objects, that were not read lately, up to a limit.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn lack_of(&self, manifest: &Manifest, volume: &str) -> Result<Option<Lack>, Error> {
        let Some(record) = manifest.record.volumes.iter().find(|it| it.name == volume) else {
            return Ok(None);
        };
        let store = self.store();
        let needs = match manifest.needs(volume) {
            Some(needs) => Cow::Borrowed(needs),
            None => match by_walking(store, record.root) {
                Ok(needs) => Cow::Owned(needs),
                Err(error) => return as_lack("backups", error).map(Some),
            },
        };
        if let Some(lack) = missing(store, &needs)? {
            return Ok(Some(lack));
        }
        let look = Look {
            namespace: self,
            root: record.root,
            read: AtomicU64::new(0),
            wrong: needs.files.keys().any(|file| store.checks.has_wrong(file)),
        };
        if let Some(lack) = look.at_claims(&needs.claimed, volume)? {
            return Ok(Some(lack));
        }
        look.at_table()
    }

    /// The backups that refer to a file of the namespace, for people to be told which ones lack it. Those of older versions
    /// are gone through; one that cannot be read is left out.
    pub fn who_needs(&self, file: &str) -> Result<Vec<BackupId>, Error> {
        let mut found = Vec::new();
        // Their pages are shared, so all that one leads to is remembered.
        for id in self.backups()? {
            let Ok(manifest) = self.manifest(id) else {
                continue;
            };
            let claims = |needs: &Needs| {
                let own = |backup: &BackupId| file.starts_with(&format!("backups/{backup}/"));
                needs.files.contains_key(file) || needs.claimed.iter().any(own)
            };
            let needs_it = match manifest.needs.is_empty() {
                false => manifest.needs.iter().any(claims),
                true => self.leads_to(&manifest, file),
            };
            if needs_it {
                found.push(id);
            }
        }
        Ok(found)
    }

    fn leads_to(&self, manifest: &Manifest, file: &str) -> bool {
        let mut reached = Reached::default();
        let mut walk = Walk::new(self.store().clone());
        for volume in &manifest.record.volumes {
            // What lies behind a lost page cannot be restored from this file or another.
            let _ = walk.through(volume.root, &mut reached);
        }
        let objects = reached.objects.iter().map(ToString::to_string);
        let pages = reached.pages.iter().chain(&reached.claimed);
        let folders = pages.map(|backup| format!("backups/{backup}/"));
        objects.into_iter().any(|object| object == file)
            || folders.into_iter().any(|folder| file.starts_with(&folder))
    }
}

/// The first file that is not there with its length.
fn missing(store: &Store, needs: &Needs) -> Result<Option<Lack>, Error> {
    for (file, &expected) in &needs.files {
        let lack = match store.length(file) {
            Ok(actual) if actual == expected => continue,
            Ok(actual) => Error::damaged(file)(Damage::Length { expected, actual }),
            Err(error) => error,
        };
        return as_lack(file, lack).map(Some);
    }
    Ok(None)
}

/// Damage is an answer; anything else is none.
fn as_lack(file: &str, error: Error) -> Result<Lack, Error> {
    match error.is_damage() {
        true => Ok(Lack::of(file, &error)),
        false => Err(error),
    }
}

/// One look at the base of one volume.
struct Look<'a> {
    namespace: &'a Namespace,
    root: TableRoot,
    /// Stored bytes so far.
    read: AtomicU64,
    /// Whether anything in the files that it needs was ever found wrong.
    wrong: bool,
}

impl Look<'_> {
    fn store(&self) -> &Arc<Store> {
        self.namespace.store()
    }

    /// Counts bytes that are to be read; none where that would be too much.
    fn may_read(&self, bytes: u64) -> bool {
        let within = |read: u64| read.checked_add(bytes).filter(|&sum| sum <= READ_BACK);
        let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
        self.read.fetch_update(set, get, within).is_ok()
    }

    /// Manifest, component and objects of each backup whose provider is asked.
    fn at_claims(&self, claimed: &BTreeSet<BackupId>, volume: &str) -> Result<Option<Lack>, Error> {
        let mut components = BTreeSet::new();
        for &backup in claimed {
            if let Some(lack) = self.at_claim(backup, volume, &mut components)? {
                return Ok(Some(lack));
            }
        }
        Ok(None)
    }

    fn at_claim(
        &self,
        backup: BackupId,
        volume: &str,
        components: &mut BTreeSet<ComponentId>,
    ) -> Result<Option<Lack>, Error> {
        let checks = &self.store().checks;
        if checks.has_wrong(&claims_of(backup)) {
            return Ok(Some(Lack {
                file: claims_of(backup),
                why: "its provider did not give back what it claimed".into(),
            }));
        }
        let file = format!("backups/{backup}/manifest.json");
        let manifest = match self.namespace.manifest(backup) {
            Ok(manifest) => manifest,
            Err(error) => return as_lack(&file, error).map(Some),
        };
        if !manifest.record.volumes.iter().any(|it| it.name == volume) {
            let error = Error::damaged(&file)(Damage::Malformed("it does not hold the volume"));
            return Ok(Some(Lack::of(file, &error)));
        }
        let component = manifest.record.provider.component;
        if components.insert(component)
            && let Err(error) = self.store().component(component, COMPONENT_LIMIT)
        {
            let file = format!("components/{}", component.file_name());
            return as_lack(&file, error).map(Some);
        }
        self.at_objects(&manifest)
    }

    fn at_objects(&self, manifest: &Manifest) -> Result<Option<Lack>, Error> {
        let objects = self.namespace.objects(manifest);
        for info in &manifest.objects {
            let file = format!("backups/{}/objects/{}", manifest.backup, info.name);
            let found = match self.store().length(&file) {
                Ok(actual) if actual == info.stored => Ok(()),
                Ok(actual) => Err(Error::damaged(&file)(Damage::Length {
                    expected: info.stored,
                    actual,
                })),
                Err(error) => Err(error),
            };
            let found = match (found, Extent::new(0, info.stored)) {
                (Ok(()), Ok(all)) => self.at_object(&file, all, || objects.verify(&info.name)),
                (found, _) => found,
            };
            if let Err(error) = found {
                return as_lack(&file, error).map(Some);
            }
        }
        Ok(None)
    }

    fn at_object(
        &self,
        file: &str,
        all: Extent,
        verify: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let checks = &self.store().checks;
        if checks.is_wrong(&written_in(file), all) {
            return Err(Error::damaged(file)(Damage::Digest));
        }
        if checks.is_seen(&written_in(file), all) || !self.may_read(all.len()) {
            return Ok(());
        }
        match verify() {
            Ok(()) => checks.note_seen(&written_in(file), all),
            Err(error) => {
                if error.is_damage() {
                    checks.note_wrong(&written_in(file), all);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn at_table(&self) -> Result<Option<Lack>, Error> {
        let leaves = match self.table().leaves() {
            Ok(leaves) => leaves,
            Err(lost) => return lost_page(lost).map(Some),
        };
        let checks = &self.store().checks;
        let look = self.wrong || leaves.len() <= FEW_LEAVES;
        let table = self.table();
        let mut due = Vec::new();
        for leaf in leaves {
            let (file, bytes) = (leaf.file(), leaf.bytes());
            let seen = bytes.is_some_and(|bytes| checks.is_seen(&file, bytes));
            let wrong = bytes.is_none_or(|bytes| checks.is_wrong(&file, bytes));
            match (wrong, seen) {
                (true, _) => {
                    let error = Error::damaged(&file)(Damage::Digest);
                    return Ok(Some(Lack::of(file, &error)));
                }
                (false, false) => due.push(leaf),
                (false, true) if look => {
                    if let Some(lack) = self.at_wrong_frames(&table, leaf)? {
                        return Ok(Some(lack));
                    }
                }
                (false, true) => {}
            }
        }
        self.read_leaves(due)
    }

    /// Whether a leaf that was seen lately is as it was, and leads to no frame that was found wrong since.
    fn at_wrong_frames(&self, table: &BlockTable, leaf: LeafRef) -> Result<Option<Lack>, Error> {
        let runs = match table.runs(leaf) {
            Ok(runs) => runs,
            Err(lost) => return lost_page(lost).map(Some),
        };
        Ok(runs.iter().find_map(|run| match &run.content {
            RunContent::Placed { frame, .. } => self.known_wrong(frame),
            _ => None,
        }))
    }

    fn known_wrong(&self, frame: &Frame) -> Option<Lack> {
        let file = frame.object().to_string();
        let wrong = self.store().checks.is_wrong(&file, frame.bytes());
        wrong.then(|| Lack::of(file.clone(), &Error::damaged(&file)(Damage::Digest)))
    }

    /// Reads leaves and all that they place, on all cores, until something is wrong or it is enough. It begins anywhere, so
    /// that of a large base each incremental reads another part.
    fn read_leaves(&self, mut due: Vec<LeafRef>) -> Result<Option<Lack>, Error> {
        if !due.is_empty() {
            let random = getrandom::u64().map_err(Error::Random)?;
            let count = due.len();
            due.rotate_left((random % count as u64) as usize);
        }
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let found = Mutex::new(Ok(None));
        let read = || {
            let table = self.table();
            while !stop.load(Ordering::Relaxed)
                && let Some(&leaf) = due.get(next.fetch_add(1, Ordering::Relaxed))
            {
                match self.read_leaf(&table, leaf) {
                    Ok(None) => {}
                    other => {
                        stop.store(true, Ordering::Relaxed);
                        *lock(&found) = other;
                    }
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        std::thread::scope(|scope| {
            for _ in 0..threads.min(due.len()) {
                scope.spawn(read);
            }
        });
        found.into_inner().unwrap_or(Ok(None))
    }

    /// Reads a leaf and all that it places and nobody saw lately, unless enough has been read.
    fn read_leaf(&self, table: &BlockTable, leaf: LeafRef) -> Result<Option<Lack>, Error> {
        if self.read.load(Ordering::Relaxed) >= READ_BACK {
            return Ok(None);
        }
        let runs = match table.runs(leaf) {
            Ok(runs) => runs,
            Err(lost) => return lost_page(lost).map(Some),
        };
        let checks = &self.store().checks;
        let mut last: Option<(Frame, Vec<u8>)> = None;
        let mut all = true;
        for run in &runs {
            let RunContent::Placed {
                frame,
                skip,
                digests,
            } = &run.content
            else {
                continue;
            };
            if let Some(lack) = self.known_wrong(frame) {
                return Ok(Some(lack));
            }
            if checks.is_seen(&frame.object().to_string(), frame.bytes()) {
                all = false;
                continue;
            }
            let (known, bytes) = match last.take() {
                Some((known, bytes)) if known == *frame => (known, bytes),
                _ => {
                    let stored = u64::from(frame.stored());
                    self.read.fetch_add(stored, Ordering::Relaxed);
                    match self.store().read_ahead(frame) {
                        Ok(bytes) => (frame.clone(), bytes),
                        Err(error) => return self.wrong_frame(frame, error).map(Some),
                    }
                }
            };
            let block = self.root.block_size();
            let blocks = run.blocks.clone();
            let length: u64 = blocks.map(|it| u64::from(self.root.block_length(it))).sum();
            let part = bytes.get(*skip as usize..(u64::from(*skip) + length) as usize);
            if part.is_none_or(|part| digest::of_blocks(part, block) != *digests) {
                let error = Error::damaged(frame.object())(Damage::Digest);
                return self.wrong_frame(frame, error).map(Some);
            }
            last = Some((known, bytes));
        }
        // One whose frames somebody else saw may not be believed for longer than they.
        if all && let Some(bytes) = leaf.bytes() {
            checks.note_seen(&leaf.file(), bytes);
        }
        Ok(None)
    }

    fn wrong_frame(&self, frame: &Frame, error: Error) -> Result<Lack, Error> {
        let file = frame.object().to_string();
        if error.is_damage() {
            self.store().checks.note_wrong(&file, frame.bytes());
        }
        as_lack(&file, error)
    }

    fn table(&self) -> BlockTable {
        BlockTable::new(self.store().clone(), self.root)
    }
}

fn lost_page(LostPage { file, error }: LostPage) -> Result<Lack, Error> {
    as_lack(&file, error)
}

/// What stands for all that a provider claimed in a backup, where files are named.
pub(super) fn claims_of(backup: BackupId) -> String {
    format!("backups/{backup}/claims")
}

/// What stands for what the provider wrote in an object: the rest of it lies in frames of volumes.
pub(super) fn written_in(object: &str) -> String {
    format!("{object} (written)")
}
