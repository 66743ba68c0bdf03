//! QEMU: a disk that the guest writes, its dirty bitmaps, one snapshot of it.

use crate::Bug;
use std::fmt;

/// Blocks of the disk. Two are enough for "the wrong one" and "one of them".
pub(crate) const BLOCKS: usize = 2;

/// What a disk holds: a version for each block, raised by each write, so that no two contents are alike.
pub(crate) type Content = [u8; BLOCKS];

/// One bit for each block.
pub(crate) type Dirty = u8;

/// [`fleecebox::qemu::BitmapName`] for the one volume of the one VM: small, because states are many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BitmapName {
    /// Whose it is.
    pub archive: u8,
    /// Since when it follows writes.
    pub backup: u8,
    /// What that backup builds on.
    pub base: Option<u8>,
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let archive = char::from(b'A' + self.archive);
        match self.base {
            Some(base) => write!(f, "{archive}:{}:{base}", self.backup),
            None => write!(f, "{archive}:{}:-", self.backup),
        }
    }
}

/// [`fleecebox::qemu::BitmapPlan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum BitmapPlan {
    /// Tracking starts; the whole disk is read.
    New {
        /// Bitmap to add.
        name: BitmapName,
    },
    /// Only what `old` calls dirty is read.
    Reuse {
        /// Bitmap to stop and to export.
        old: BitmapName,
        /// Bitmap to add.
        new: BitmapName,
    },
}

impl BitmapPlan {
    /// The bitmap that the backup reads by.
    pub(crate) fn old(&self) -> Option<BitmapName> {
        match *self {
            Self::New { .. } => None,
            Self::Reuse { old, .. } => Some(old),
        }
    }

    /// The bitmap that starts with this backup.
    pub(crate) fn new_bitmap(&self) -> BitmapName {
        match *self {
            Self::New { name } => name,
            Self::Reuse { new, .. } => new,
        }
    }
}

/// What of [`fleecebox::qemu::machine::Bitmap`] matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Bitmap {
    /// Its name.
    pub name: BitmapName,
    /// What it calls dirty.
    pub dirty: Dirty,
    /// Whether it still follows writes.
    pub recording: bool,
    /// QEMU was killed while it was open: it can only be removed.
    pub inconsistent: bool,
    /// Whether this QEMU loaded it from the image. One that was added since is not in the image until QEMU quits.
    pub stored: bool,
}

/// How long bitmaps live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    /// As long as QEMU: they are transient.
    Raw,
    /// In the image, where QEMU quits by itself.
    Qcow2,
}

/// One action of a QMP `transaction`, or a command of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// `blockdev-backup`, sync none: the point in time. Drains the disk up to the end of the transaction.
    Backup,
    /// `block-dirty-bitmap-add`
    Add(BitmapName),
    /// `block-dirty-bitmap-enable`
    Enable(BitmapName),
    /// `block-dirty-bitmap-disable`
    Disable(BitmapName),
    /// `block-dirty-bitmap-merge`
    Merge {
        /// Gets what the other has.
        target: BitmapName,
        /// Stays as it is.
        source: BitmapName,
    },
    /// `block-dirty-bitmap-merge` of the bitmaps of that name on the images below.
    MergeBelow(BitmapName),
    /// `block-dirty-bitmap-remove`
    Remove(BitmapName),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backup => f.write_str("blockdev-backup: the point in time"),
            Self::Add(name) => write!(f, "add {name}"),
            Self::Enable(name) => write!(f, "enable {name}"),
            Self::Disable(name) => write!(f, "disable {name}"),
            Self::Merge { target, source } => write!(f, "merge {source} into {target}"),
            Self::MergeBelow(name) => write!(f, "merge {name} of the images below"),
            Self::Remove(name) => write!(f, "remove {name}"),
        }
    }
}

/// The actions of `qemu::snapshot::make`: `freeze_disks`.
pub(crate) fn point_in_time(
    qemu: &Qemu,
    plan: &BitmapPlan,
    stale: &[BitmapName],
    bug: Option<Bug>,
) -> Vec<Action> {
    let backup = Action::Backup;
    let add = Action::Add(plan.new_bitmap());
    let disable = plan.old().map(Action::Disable);
    match bug {
        Some(Bug::DisabledBeforeAdded) => disable.into_iter().chain([add, backup]).collect(),
        Some(Bug::BitmapsBeforeBackup) => {
            [add].into_iter().chain(disable).chain([backup]).collect()
        }
        Some(Bug::OldRemovedInNewsTransaction) if plan.old().is_none() => [backup, add]
            .into_iter()
            .chain(stale.iter().map(|&name| Action::Remove(name)))
            .collect(),
        _ => {
            let carried = |old: &BitmapName| qemu.carriers(*old).next().is_some();
            let believed = plan.old().filter(|_| bug != Some(Bug::OverlaysBitmapAlone));
            let merge = believed.filter(carried).map(Action::MergeBelow);
            [backup, add]
                .into_iter()
                .chain(disable)
                .chain(merge)
                .collect()
        }
    }
}

/// The actions of `qemu::bitmap::pour_back`.
pub(crate) fn pour_back(old: BitmapName, new: BitmapName, bug: Option<Bug>) -> Vec<Action> {
    let enable = Action::Enable(old);
    let merge = Action::Merge {
        target: old,
        source: new,
    };
    let remove = Action::Remove(new);
    match bug {
        Some(Bug::MergedBeforeEnabled) => vec![merge, enable, remove],
        Some(Bug::EnabledLast) => vec![merge, remove, enable],
        Some(Bug::NothingMerged) => vec![enable, remove],
        _ => vec![enable, merge, remove],
    }
}

/// An image below the one that the guest writes to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Below {
    /// What tells it from others.
    pub image: u8,
    /// What the disk was when it got its overlay.
    pub disk: Content,
    /// The blocks that it holds itself.
    pub holds: Dirty,
    /// Read-only, as it is.
    pub bitmaps: Vec<Bitmap>,
}

/// QEMU and the guest in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Qemu {
    /// How long bitmaps live.
    pub format: Format,
    /// What the guest wrote.
    pub disk: Content,
    /// What tells the image that the guest writes to from others.
    pub image: u8,
    /// The blocks that this image holds itself.
    pub holds: Dirty,
    /// What it builds on, but for the template.
    pub below: Vec<Below>,
    /// What is below all of them; blocks that none of them holds are the template's.
    pub template: Option<u8>,
    /// Images and templates that there were.
    pub images: u8,
    /// Raised where content is thrown away, lest a write makes the same again.
    pub age: u8,
    /// In the order in which they were added.
    pub bitmaps: Vec<Bitmap>,
    /// The disk as of the point in time, as long as the backup's job keeps it.
    pub snapshot: Option<Content>,
    /// The export, and the bitmap that it makes busy.
    pub export: Option<Option<BitmapName>>,
    /// What is left of a transaction that is being carried out. Guest writes fall between, unless it drains.
    pub transaction: Vec<Action>,
    /// From the transaction's backup action to its end.
    pub drained: bool,
}

impl Qemu {
    /// Just started, on a disk that nobody has backed up.
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            disk: [0; BLOCKS],
            image: 0,
            holds: 0,
            below: Vec::new(),
            template: Some(1),
            images: 2,
            age: 0,
            bitmaps: Vec::new(),
            snapshot: None,
            export: None,
            transaction: Vec::new(),
            drained: false,
        }
    }

    /// The bitmap of that name.
    pub(crate) fn bitmap(&self, name: BitmapName) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }

    fn bitmap_mut(&mut self, name: BitmapName) -> Option<&mut Bitmap> {
        self.bitmaps.iter_mut().find(|bitmap| bitmap.name == name)
    }

    /// Whether an export uses it.
    pub(crate) fn busy(&self, name: BitmapName) -> bool {
        self.export == Some(Some(name))
    }

    /// The guest writes a block: every bitmap that records knows.
    pub(crate) fn write(&mut self, block: usize) {
        self.disk[block] += 1 + self.age;
        self.holds |= 1 << block;
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.recording) {
            bitmap.dirty |= 1 << block;
        }
    }

    /// Begins what QEMU does not refuse: a transaction happens as a whole or not at all.
    pub(crate) fn begin(&mut self, actions: Vec<Action>) -> Result<(), Refused> {
        let free = |name: BitmapName| match self.bitmap(name) {
            Some(_) if self.busy(name) => Err(Refused),
            Some(bitmap) => Ok(bitmap),
            None => Err(Refused),
        };
        let consistent = |name| match free(name)?.inconsistent {
            true => Err(Refused),
            false => Ok(()),
        };
        for action in &actions {
            match *action {
                Action::Backup if self.snapshot.is_some() => return Err(Refused),
                Action::Backup => {}
                Action::Add(name) if self.bitmap(name).is_some() => return Err(Refused),
                Action::Add(_) => {}
                Action::Enable(name) | Action::Disable(name) | Action::MergeBelow(name) => {
                    consistent(name)?;
                }
                Action::Merge { target, source } => {
                    consistent(target)?;
                    consistent(source)?;
                }
                Action::Remove(name) => drop(free(name)?),
            }
        }
        self.transaction = actions;
        Ok(())
    }

    /// Carries out the next action of the transaction.
    pub(crate) fn advance(&mut self) {
        if self.transaction.is_empty() {
            return;
        }
        match self.transaction.remove(0) {
            Action::Backup => {
                self.snapshot = Some(self.disk);
                self.drained = true;
            }
            Action::Add(name) => self.bitmaps.push(Bitmap {
                name,
                dirty: 0,
                recording: true,
                inconsistent: false,
                stored: false,
            }),
            Action::Enable(name) => self.record(name, true),
            Action::Disable(name) => self.record(name, false),
            Action::Merge { target, source } => {
                let dirty = self.bitmap(source).map_or(0, |source| source.dirty);
                if let Some(target) = self.bitmap_mut(target) {
                    target.dirty |= dirty;
                }
            }
            Action::MergeBelow(name) => {
                let dirty = self
                    .carriers(name)
                    .fold(0, |dirty, bitmap| dirty | bitmap.dirty);
                if let Some(target) = self.bitmap_mut(name) {
                    target.dirty |= dirty;
                }
            }
            Action::Remove(name) => self.bitmaps.retain(|bitmap| bitmap.name != name),
        }
        self.drained &= !self.transaction.is_empty();
    }

    fn record(&mut self, name: BitmapName, recording: bool) {
        if let Some(bitmap) = self.bitmap_mut(name) {
            bitmap.recording = recording;
        }
    }

    /// Quits and starts again. Whether a bitmap records is stored with it.
    pub(crate) fn restart(&mut self) {
        self.lose_snapshot();
        match self.format {
            Format::Raw => self.bitmaps.clear(),
            Format::Qcow2 => self
                .bitmaps
                .iter_mut()
                .for_each(|bitmap| bitmap.stored = true),
        }
    }

    /// Is killed and starts again: what it had loaded from the image is inconsistent there, the rest never was there.
    pub(crate) fn kill(&mut self) {
        self.lose_snapshot();
        self.bitmaps.retain(|bitmap| bitmap.stored);
        for bitmap in &mut self.bitmaps {
            // What such a bitmap calls dirty means nothing.
            (bitmap.inconsistent, bitmap.recording, bitmap.dirty) = (true, false, 0);
        }
    }

    /// `Disk::carriers`
    pub(crate) fn carriers(&self, name: BitmapName) -> impl Iterator<Item = &Bitmap> {
        self.below.iter().map_while(move |below| {
            let mut bitmaps = below.bitmaps.iter();
            bitmaps.find(|bitmap| bitmap.name == name && bitmap.recording && !bitmap.inconsistent)
        })
    }

    /// Whether its images are those that it began with, and always were.
    pub(crate) fn is_as_made(&self) -> bool {
        self.images == 2 && self.template.is_some()
    }

    /// What the disk is made of, from the image that the guest writes to down to the template.
    pub(crate) fn chain(&self) -> Vec<u8> {
        let below = self.below.iter().map(|below| below.image);
        [self.image]
            .into_iter()
            .chain(below)
            .chain(self.template)
            .collect()
    }

    /// An overlay is put above the image: `carrying`, as libvirt does it, each bitmap that records gets an empty one of
    /// its name there. The image is opened read-only, and its bitmaps are stored.
    pub(crate) fn put_overlay(&mut self, carrying: bool) {
        let carried = self
            .bitmaps
            .iter()
            .filter(|bitmap| carrying && bitmap.recording);
        let empty = |bitmap: &Bitmap| Bitmap {
            dirty: 0,
            stored: false,
            ..*bitmap
        };
        let bitmaps = carried.map(empty).collect();
        let mut below = std::mem::replace(&mut self.bitmaps, bitmaps);
        below.iter_mut().for_each(|bitmap| bitmap.stored = true);
        let below = Below {
            image: self.image,
            disk: self.disk,
            holds: self.holds,
            bitmaps: below,
        };
        self.below.insert(0, below);
        (self.image, self.holds) = (self.images, 0);
        self.images += 1;
    }

    /// What the overlay holds is written to the image below it, which is the guest's again.
    pub(crate) fn commit_overlay(&mut self) {
        let (disk, held) = (self.disk, self.holds);
        self.drop_overlay();
        self.disk = disk;
        self.holds |= held;
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.recording) {
            bitmap.dirty |= held;
        }
    }

    /// The overlay is thrown away, with all that was written to it.
    pub(crate) fn drop_overlay(&mut self) {
        if self.below.is_empty() {
            return;
        }
        let below = self.below.remove(0);
        (self.image, self.disk, self.holds) = (below.image, below.disk, below.holds);
        self.bitmaps = below.bitmaps;
        self.age += 4;
    }

    /// What is below is copied into the image, which then builds on nothing.
    pub(crate) fn pull(&mut self) {
        self.below.clear();
        self.template = None;
        self.holds = Dirty::MAX;
    }

    /// Another template takes the place of the one that is there. No bitmap says so.
    pub(crate) fn swap_template(&mut self) {
        self.template = Some(self.images);
        self.images += 1;
        let held = |below: &Below| below.holds;
        let held = self
            .below
            .iter()
            .map(held)
            .fold(self.holds, |held, more| held | more);
        let all = self.below.iter_mut().map(|below| &mut below.disk);
        for disk in all.chain([&mut self.disk]) {
            for (block, version) in disk.iter_mut().enumerate() {
                *version += u8::from(held >> block & 1 == 0) * (1 + self.age);
            }
        }
    }

    fn lose_snapshot(&mut self) {
        self.snapshot = None;
        self.export = None;
    }
}

/// QEMU does not do it.
#[derive(Debug)]
pub(crate) struct Refused;

impl fmt::Display for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {:?}", self.disk)?;
        for bitmap in &self.bitmaps {
            let state = match (bitmap.inconsistent, bitmap.recording) {
                (true, _) => "inconsistent",
                (false, true) => "recording",
                (false, false) => "stopped",
            };
            let dirty: Vec<_> = (0..BLOCKS)
                .filter(|block| bitmap.dirty >> block & 1 == 1)
                .collect();
            write!(f, ", {} {state} {dirty:?}", bitmap.name)?;
        }
        match self.snapshot {
            Some(content) => write!(f, ", snapshot {content:?}"),
            None => Ok(()),
        }
    }
}
