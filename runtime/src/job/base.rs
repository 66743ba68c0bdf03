//! What one disk's backup builds on: decided by its bitmaps' names and the archive, never by time or by "the latest".

use super::lineage;
use crate::archive::{
    self, ArchiveId, BackupId, DiskRecord, ExportRecord, ExportedDisk, Manifest, NamespaceName,
    RULES, VolumeRecord,
};
use crate::qemu::bitmap::{BitmapName, BitmapNameError, Own};
use crate::qemu::{BitmapPlan, Disk, Layer};
use std::sync::Arc;

/// Whose bitmaps are looked at: this archive's and namespace's, for this volume of this VM.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The archive.
    pub archive: ArchiveId,
    /// The provider's part of it.
    pub namespace: NamespaceName,
    /// The VM's name.
    pub vm: String,
}

impl Owner {
    /// The name of the bitmap that starts with `backup`, which builds on `base`, on `disk`.
    pub fn bitmap(
        &self,
        disk: &str,
        backup: BackupId,
        base: Option<&str>,
    ) -> Result<BitmapName, BitmapNameError> {
        BitmapName::new(
            &self.archive.to_string(),
            self.namespace.as_str(),
            &self.volume(disk),
            &backup.to_string(),
            base,
        )
    }

    /// Whether `name` is a bitmap of this archive and namespace, for any volume.
    pub fn owns(&self, name: &BitmapName) -> bool {
        name.archive() == self.archive.to_string() && name.namespace() == self.namespace.as_str()
    }

    fn volume(&self, disk: &str) -> String {
        format!("{}/{disk}", self.vm)
    }
}

/// The point in time that an increment of one disk builds on.
#[derive(Debug, Clone)]
pub enum BuiltOn {
    /// A backup's.
    Backup(Base),
    /// One that a tool has.
    Export {
        /// Its id.
        export: BackupId,
        /// What is recorded of it.
        record: Arc<ExportRecord>,
        /// The same disk in it.
        disk: ExportedDisk,
    },
}

impl BuiltOn {
    /// Its id.
    pub fn id(&self) -> BackupId {
        match self {
            Self::Backup(base) => base.manifest.backup,
            Self::Export { export, .. } => *export,
        }
    }

    /// Of the disk, as it was then.
    pub fn disk(&self) -> &DiskRecord {
        match self {
            Self::Backup(base) => &base.volume.disk,
            Self::Export { disk, .. } => &disk.disk,
        }
    }

    /// The names of all disks in it.
    pub fn volumes(&self) -> Vec<&str> {
        match self {
            Self::Backup(base) => {
                let volumes = base.manifest.record.volumes.iter();
                volumes.map(|volume| &*volume.name).collect()
            }
            Self::Export { record, .. } => record.disks.iter().map(|disk| &*disk.name).collect(),
        }
    }

    /// What is stored of it.
    pub fn backup(&self) -> Option<&Base> {
        match self {
            Self::Backup(base) => Some(base),
            Self::Export { .. } => None,
        }
    }
}

/// The backup that an incremental of one disk builds on.
#[derive(Debug, Clone)]
pub struct Base {
    /// Its manifest.
    pub manifest: Arc<Manifest>,
    /// The same disk in it.
    pub volume: VolumeRecord,
}

/// What is to be done with one disk.
#[derive(Debug, Clone)]
pub struct Choice {
    /// For the point in time.
    pub bitmap: BitmapPlan,
    /// Present exactly where the plan is to reuse a bitmap.
    pub base: Option<BuiltOn>,
    /// Bitmaps that the new backup makes useless; removed once it is committed.
    pub stale: Vec<BitmapName>,
    /// Why everything is read, where a bitmap of ours or a base was there.
    pub reason: Option<String>,
    /// Where the block begins that the new bitmap calls dirty from its birth, once it does.
    pub mark: Option<u64>,
}

impl Choice {
    /// A disk that is read in full each time, without a bitmap.
    pub fn untracked(reason: &str) -> Self {
        Self {
            bitmap: BitmapPlan::None,
            base: None,
            stale: Vec::new(),
            reason: Some(reason.into()),
            mark: None,
        }
    }

    /// The same disk read in full: what would have been its base is useless once the new backup is committed.
    pub fn in_full(
        self,
        owner: &Owner,
        disk: &Disk,
        backup: BackupId,
    ) -> Result<Self, BitmapNameError> {
        self.without_base(owner, disk, backup, "it was asked for (--full)".into())
    }

    /// [`Self::in_full`] for another reason.
    pub fn without_base(
        mut self,
        owner: &Owner,
        disk: &Disk,
        backup: BackupId,
        reason: String,
    ) -> Result<Self, BitmapNameError> {
        if self.bitmap == BitmapPlan::None {
            return Ok(self);
        }
        self.stale.extend(self.bitmap.old().cloned());
        self.bitmap = BitmapPlan::New {
            name: owner.bitmap(&disk.name, backup, None)?,
        };
        self.reason = self.base.take().map(|_| reason).or(self.reason);
        Ok(self)
    }
}

/// What the archive says of a backup. That it cannot be asked is an error instead, since then nothing may be concluded.
#[derive(Debug, Clone)]
pub enum Recorded {
    /// It committed.
    Committed(Arc<Manifest>),
    /// It is an export's, and its tool has it.
    Exported(Arc<ExportRecord>),
    /// It committed, but nobody can tell any more what: nothing can be built on it.
    Damaged {
        /// What is wrong with its manifest.
        reason: String,
    },
    /// It never committed, or is gone since.
    Absent,
}

/// Chooses for `disk`. `recorded` asks the archive for a backup.
pub fn choose(
    owner: &Owner,
    disk: &Disk,
    backup: BackupId,
    block_size: u32,
    mut recorded: impl FnMut(BackupId) -> Result<Recorded, archive::Error>,
) -> Result<Choice, ChoiceError> {
    if let Some(reason) = lineage::written_unseen(disk) {
        return Ok(Choice {
            stale: own(owner, disk),
            ..Choice::untracked(&reason)
        });
    }
    let mut usable: Option<(u64, BitmapName, BuiltOn)> = None;
    let mut stale = Vec::new();
    let mut reason = left_below(owner, disk);
    for bitmap in &disk.bitmaps {
        let Some(name) = BitmapName::parse(&bitmap.name).filter(|name| owner.owns(name)) else {
            continue;
        };
        if name.volume() != owner.volume(&disk.name) {
            // It came with its file from elsewhere, still follows writes, and serves again if the file goes back.
            reason.get_or_insert_with(|| {
                format!("its image carries the bitmap of {}", name.volume())
            });
            continue;
        }
        let dirty = disk.dirty(&bitmap.name).unwrap_or(bitmap.dirty);
        let judged = match bitmap.usable() {
            Err(unusable) => Err(format!("its bitmap cannot be used: {unusable}")),
            Ok(()) => base_of(&name, disk, block_size, bitmap.granularity, &mut recorded)?,
        };
        match judged {
            // Of two that both serve, the one with less to read; what the other holds is in neither's gap.
            Ok(base) if usable.as_ref().is_none_or(|(least, ..)| dirty < *least) => {
                stale.extend(usable.replace((dirty, name, base)).map(|(_, name, _)| name));
            }
            Ok(_) => stale.push(name),
            Err(why) => {
                reason = Some(why);
                stale.push(name);
            }
        }
    }
    Ok(match usable {
        Some((_, old, base)) => Choice {
            bitmap: BitmapPlan::Reuse {
                new: owner.bitmap(&disk.name, backup, Some(old.backup()))?,
                old,
            },
            base: Some(base),
            stale,
            reason: None,
            mark: None,
        },
        None => Choice {
            bitmap: BitmapPlan::New {
                name: owner.bitmap(&disk.name, backup, None)?,
            },
            base: None,
            stale,
            reason,
            mark: None,
        },
    })
}

/// The bitmaps of ours for this disk on its image.
fn own(owner: &Owner, disk: &Disk) -> Vec<BitmapName> {
    let names = disk
        .bitmaps
        .iter()
        .filter_map(|bitmap| BitmapName::parse(&bitmap.name));
    let ours = |name: &BitmapName| owner.owns(name) && name.volume() == owner.volume(&disk.name);
    names.filter(ours).collect()
}

/// That the image below an overlay carries a bitmap of ours, which the overlay may not have: then nobody knows what was
/// written to the overlay.
fn left_below(owner: &Owner, disk: &Disk) -> Option<String> {
    let ours = |name: &str| BitmapName::parse(name).is_some_and(|name| owner.owns(&name));
    let carries = |layer: &&Layer| layer.bitmaps.iter().any(|bitmap| ours(&bitmap.name));
    let layer = disk.below.iter().find(carries)?;
    Some(format!(
        "an overlay is above {}, which carries its bitmap, and does not carry it",
        layer.image.name
    ))
}

/// The base that `name` speaks of, or why it is none.
fn base_of(
    name: &BitmapName,
    disk: &Disk,
    block_size: u32,
    granularity: u32,
    recorded: &mut impl FnMut(BackupId) -> Result<Recorded, archive::Error>,
) -> Result<Result<BuiltOn, String>, ChoiceError> {
    let Ok(id) = name.backup().parse::<BackupId>() else {
        return Ok(Err("its bitmap names no backup".into()));
    };
    let not_held = || Ok(Err(format!("the base {id} does not hold it")));
    let found = match recorded(id)? {
        Recorded::Committed(manifest) => {
            let mut volumes = manifest.record.volumes.iter();
            let Some(volume) = volumes.find(|volume| volume.name == disk.name).cloned() else {
                return not_held();
            };
            if manifest.rules < RULES {
                return Ok(Err(format!(
                    "the base {id} was made by version {}, which did not prove all that an increment takes over; this is \
                     needed once",
                    manifest.record.host_version
                )));
            }
            BuiltOn::Backup(Base { manifest, volume })
        }
        Recorded::Exported(record) => {
            let mut disks = record.disks.iter();
            let Some(disk) = disks.find(|it| it.name == disk.name).cloned() else {
                return not_held();
            };
            BuiltOn::Export {
                export: id,
                record,
                disk,
            }
        }
        Recorded::Damaged { reason } => {
            return Ok(Err(format!("the base {id} is damaged: {reason}")));
        }
        Recorded::Absent => {
            return Ok(Err(format!("the archive holds no backup {id} to build on")));
        }
    };
    // Nothing is stored in blocks of an export.
    let (bitmap, size, blocks) = match &found {
        BuiltOn::Backup(Base { volume, .. }) => {
            let root = volume.root;
            (&volume.bitmap, root.size(), root.block_size())
        }
        BuiltOn::Export { disk, .. } => (&disk.bitmap, disk.size, block_size),
    };
    let name = name.to_string();
    Ok(if bitmap.as_deref() != Some(&*name) {
        Err(format!("the base {id} speaks of another bitmap"))
    } else if size != disk.size {
        Err(format!(
            "it had {size} bytes in the base {id} and has {} now",
            disk.size
        ))
    } else if blocks != block_size || granularity > block_size {
        Err(format!("the base {id} has blocks of {blocks} bytes"))
    } else {
        lineage::tracked(found.disk(), disk, &name)
            .map(|()| found)
            .map_err(|why| format!("its bitmap since the base {id} cannot hold all changes: {why}"))
    })
}

/// Why nothing can be chosen.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    /// A name cannot be part of a bitmap's name.
    #[error(transparent)]
    Name(#[from] BitmapNameError),
    /// The archive cannot say what it holds.
    #[error("the archive cannot say what it holds")]
    Archive(#[from] archive::Error),
}

/// What becomes of the bitmaps that a dead run left on one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    /// Its backup committed: the bitmap that it read by goes.
    Accept {
        /// On this node.
        node: String,
        /// As at the point in time.
        plan: BitmapPlan,
    },
    /// Its backup did not commit, or nothing can be built on it: tracking becomes what it was.
    BackOut {
        /// On this node.
        node: String,
        /// As at the point in time.
        plan: BitmapPlan,
    },
}

/// What to do about all bitmaps of ours after a run died between its point in time and its end. None while all is
/// well. `dead` is that run's backup, as far as a journal tells; `recorded` is as for [`choose`].
///
/// A bitmap names its backup's base, and so the bitmap that stopped when it started: only these two are ever merged.
/// Where the new one's backup committed but is damaged, merging loses nothing and leaves a bitmap whose base may be
/// sound. One without its partner is left for [`choose`] to judge, unless it is the dead run's and the archive does not hold
/// its backup: it goes, lest each run that dies adds one that the guest's writes pay for. Any other is a base that left the
/// archive: [`choose`] says so, and lets it go at the commit.
pub fn remedies(
    owner: &Owner,
    found: &[Own],
    dead: Option<&str>,
    mut recorded: impl FnMut(BackupId) -> Result<Recorded, archive::Error>,
) -> Result<Vec<Remedy>, archive::Error> {
    let mut remedies = Vec::new();
    for new in found
        .iter()
        .filter(|own| owner.owns(&own.name) && own.state.recording)
    {
        let Ok(id) = new.name.backup().parse() else {
            continue;
        };
        let old = found.iter().find(|old| {
            old.node == new.node
                && owner.owns(&old.name)
                && old.name.volume() == new.name.volume()
                && Some(old.name.backup()) == new.name.base()
                && !old.state.recording
        });
        let (node, name) = (new.node.clone(), new.name.clone());
        let plan = match old {
            Some(old) => BitmapPlan::Reuse {
                old: old.name.clone(),
                new: name,
            },
            None => BitmapPlan::New { name },
        };
        match (recorded(id)?, old) {
            (Recorded::Committed(_) | Recorded::Exported(_), Some(_)) => {
                remedies.push(Remedy::Accept { node, plan })
            }
            (Recorded::Damaged { .. } | Recorded::Absent, Some(_)) => {
                remedies.push(Remedy::BackOut { node, plan });
            }
            (Recorded::Absent, None) if dead == Some(new.name.backup()) => {
                remedies.push(Remedy::BackOut { node, plan });
            }
            (_, None) => {}
        }
    }
    Ok(remedies)
}

#[cfg(test)]
mod tests;
