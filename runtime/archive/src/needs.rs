//! What a volume of a backup needs to be restored, kept in its manifest: so that whether all of it is there costs a look
//! at each file and no walk through its block table.

use super::block_table::{LostPage, Reached, TableRoot, Walk, pages_file};
use super::error::{Damage, Error};
use super::manifest::Manifest;
use super::name::BackupId;
use super::store::Store;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What the blocks of one volume lie in. It may name more than that: what a backup's base needed, the backup does too,
/// though the last block that lay there may have been written since.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Packs, pages and objects by their paths in the namespace, with their lengths in bytes.
    pub files: BTreeMap<String, u64>,
    /// Backups whose provider is asked for what it claimed.
    pub claimed: BTreeSet<BackupId>,
}

/// A block table as a writer finished it.
pub(super) struct Finished {
    pub(super) root: TableRoot,
    /// By what was set.
    pub(super) reached: Reached,
    /// Whose other blocks it has.
    pub(super) base: TableRoot,
}

impl Needs {
    /// All that both need.
    pub(super) fn merge(&mut self, other: &Self) {
        let files = other.files.iter();
        self.files
            .extend(files.map(|(file, length)| (file.clone(), *length)));
        self.claimed.extend(&other.claimed);
    }

    /// What was reached too, each with the length that it has now.
    pub(super) fn add(&mut self, store: &Store, reached: &Reached) -> Result<(), Error> {
        let objects = reached.objects.iter().map(ToString::to_string);
        let pages = reached.pages.iter().map(|&backup| pages_file(backup));
        for file in objects.chain(pages) {
            let length = store.length(&file)?;
            self.files.insert(file, length);
        }
        self.claimed.extend(&reached.claimed);
        Ok(())
    }

    /// Fails unless each file is there with its length.
    pub(super) fn are_there(&self, store: &Store) -> Result<(), Error> {
        for (file, &expected) in &self.files {
            let actual = store.length(file)?;
            if actual != expected {
                return Err(Error::damaged(file)(Damage::Length { expected, actual }));
            }
        }
        Ok(())
    }
}

impl Store {
    /// Length of a file of the namespace, in bytes.
    pub(super) fn length(&self, file: &str) -> Result<u64, Error> {
        let found = self.root.metadata(file).map_err(Error::at(file))?;
        Ok(found.len())
    }
}

impl Manifest {
    /// What its volume of that name needs; nothing where an older version recorded none.
    pub fn needs(&self, volume: &str) -> Option<&Needs> {
        let volumes = self.record.volumes.iter();
        let at = volumes.into_iter().position(|it| it.name == volume)?;
        self.needs.get(at)
    }
}

/// What a table needs, found by going through all of it.
pub(super) fn by_walking(store: &Arc<Store>, root: TableRoot) -> Result<Needs, Error> {
    let mut reached = Reached::default();
    Walk::new(store.clone())
        .through(root, &mut reached)
        .map_err(|LostPage { error, .. }| error)?;
    let mut needs = Needs::default();
    needs.add(store, &reached)?;
    Ok(needs)
}
