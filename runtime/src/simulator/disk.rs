//! A disk in memory, and what it was at a point in time.

use crate::extent::{Extent, ExtentSet};
use crate::volume::source::Source;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes per bit of a dirty bitmap, and the unit in which an export is trimmed: QEMU's for copy-before-write.
pub(super) const CLUSTER: u32 = 64 << 10;

/// What a point in time does to a disk's bitmaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Switch {
    /// The one that stops, and is exported.
    pub stop: Option<String>,
    /// The one that starts.
    pub start: Option<String>,
}

/// A disk that is written while nothing is backed up, and frozen when something is.
#[derive(Debug, Clone)]
pub struct Disk {
    name: String,
    bytes: Vec<u8>,
    /// What the disk's image does not hold; it reads as zeroes. Zeroes that were written are data.
    holes: ExtentSet,
    bitmaps: BTreeMap<String, Bitmap>,
}

#[derive(Debug, Clone)]
struct Bitmap {
    dirty: ExtentSet,
    recording: bool,
}

impl Disk {
    /// A disk of `size` bytes that was never written.
    pub fn new(name: impl Into<String>, size: u64) -> Self {
        let mut disk = Self {
            name: name.into(),
            bytes: Vec::new(),
            holes: ExtentSet::new(),
            bitmaps: BTreeMap::new(),
        };
        disk.resize(size);
        disk
    }

    /// As the VM names it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it holds now.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Writes as the guest does; what lies past the end is left out.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(extent) = self.within(offset, bytes.len() as u64) {
            let length = extent.len() as usize;
            self.slice(extent).copy_from_slice(&bytes[..length]);
            self.holes.remove(extent);
            self.changed(extent);
        }
    }

    /// Makes a hole, as the guest's discard does on a sparse image.
    pub fn discard(&mut self, offset: u64, length: u64) {
        if let Some(extent) = self.within(offset, length) {
            self.slice(extent).fill(0);
            self.holes.insert(extent);
            self.changed(extent);
        }
    }

    /// Gives it another size; what is new is a hole. As with QEMU, no bitmap says so.
    pub fn resize(&mut self, size: u64) {
        let before = self.size();
        self.bytes.resize(size as usize, 0);
        if let Some(added) = Extent::between(before, size) {
            self.holes.insert(added);
        }
        if let Some(lost) = Extent::between(size, before) {
            self.holes.remove(lost);
            for bitmap in self.bitmaps.values_mut() {
                bitmap.dirty.remove(lost);
            }
        }
    }

    /// The bitmaps that follow what is written to it.
    pub fn recording(&self) -> impl Iterator<Item = &str> {
        let recording = self.bitmaps.iter().filter(|(_, bitmap)| bitmap.recording);
        recording.map(|(name, _)| name.as_str())
    }

    /// Takes the point in time: what the disk is now, and its bitmaps as `switch` says.
    pub fn freeze(&mut self, switch: &Switch) -> Export {
        if let Some(start) = &switch.start {
            let fresh = Bitmap {
                dirty: ExtentSet::new(),
                recording: true,
            };
            self.bitmaps.insert(start.clone(), fresh);
        }
        let dirty = switch.stop.as_ref().map(|name| {
            let dirty = self.bitmaps.get_mut(name).map(|bitmap| {
                bitmap.recording = false;
                bitmap.dirty.clone()
            });
            (
                format!("qemu:dirty-bitmap:{name}"),
                dirty.unwrap_or_default(),
            )
        });
        Export {
            name: self.name.clone(),
            bytes: self.bytes.clone().into(),
            holes: self.holes.clone(),
            dirty,
            unreadable: None,
            trimmed: Arc::default(),
        }
    }

    /// After a commit: the bitmap that the backup was read by goes.
    pub fn accept(&mut self, switch: &Switch) {
        if let Some(stopped) = &switch.stop {
            self.forget(stopped);
        }
    }

    /// After a failure: tracking becomes what it was.
    pub fn back_out(&mut self, switch: &Switch) {
        let started = switch.start.as_ref();
        let since = started.and_then(|started| self.bitmaps.remove(started));
        if let (Some(stopped), Some(since)) = (&switch.stop, since)
            && let Some(old) = self.bitmaps.get_mut(stopped)
        {
            old.recording = true;
            for extent in since.dirty.iter() {
                old.dirty.insert(extent);
            }
        }
    }

    /// Removes a bitmap.
    pub fn forget(&mut self, bitmap: &str) {
        self.bitmaps.remove(bitmap);
    }

    fn within(&self, offset: u64, length: u64) -> Option<Extent> {
        Extent::new(offset, length)
            .ok()?
            .intersection(Extent::between(0, self.size())?)
    }

    fn slice(&mut self, extent: Extent) -> &mut [u8] {
        &mut self.bytes[extent.start() as usize..extent.end() as usize]
    }

    fn changed(&mut self, extent: Extent) {
        let clusters = extent.grown_to_blocks(CLUSTER, self.size());
        for bitmap in self.bitmaps.values_mut().filter(|bitmap| bitmap.recording) {
            bitmap.dirty.insert(clusters);
        }
    }
}

/// A disk as it was at a point in time.
#[derive(Debug, Clone)]
pub struct Export {
    name: String,
    bytes: Arc<[u8]>,
    holes: ExtentSet,
    /// Meta context and what it calls dirty.
    dirty: Option<(String, ExtentSet)>,
    unreadable: Option<Extent>,
    /// Shared by all connections.
    trimmed: Arc<Mutex<ExtentSet>>,
}

/// Why an export does not give bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Some of it was trimmed.
    Trimmed,
    /// Some of it is on a bad sector.
    Unreadable,
}

impl Export {
    /// The same with a bad sector: reads that touch `extent` fail.
    pub fn unreadable(self, extent: Extent) -> Self {
        Self {
            unreadable: Some(extent),
            ..self
        }
    }

    /// Its name, which is the disk's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where a job finds it while a server on `socket` has it.
    pub fn source(&self, socket: &Path) -> Source {
        Source {
            name: self.name.clone(),
            size: self.bytes.len() as u64,
            socket: socket.to_owned(),
            export: self.name.clone(),
            dirty_context: self.dirty_context().map(Into::into),
        }
    }

    /// What it holds, whatever was trimmed since.
    pub fn bytes(&self) -> &Arc<[u8]> {
        &self.bytes
    }

    /// The meta context that tells what is dirty, where the point in time stopped a bitmap.
    pub fn dirty_context(&self) -> Option<&str> {
        self.dirty.as_ref().map(|(context, _)| context.as_str())
    }

    /// What changed, where the point in time stopped a bitmap, else everything.
    pub fn dirty(&self) -> ExtentSet {
        let all = || Extent::between(0, self.bytes.len() as u64);
        match &self.dirty {
            Some((_, dirty)) => dirty.clone(),
            None => all().into_iter().collect(),
        }
    }

    /// What reads as zeroes and is known to.
    pub fn holes(&self) -> &ExtentSet {
        &self.holes
    }

    /// A range that lies within it.
    pub(super) fn read(&self, extent: Extent) -> Result<&[u8], Refused> {
        if self.trimmed().overlaps(extent) {
            return Err(Refused::Trimmed);
        }
        if self
            .unreadable
            .is_some_and(|bad| bad.intersection(extent).is_some())
        {
            return Err(Refused::Unreadable);
        }
        Ok(&self.bytes[extent.start() as usize..extent.end() as usize])
    }

    /// Only whole clusters go, as with QEMU's.
    pub(super) fn trim(&self, extent: Extent) {
        let size = self.bytes.len() as u64;
        if let Some(clusters) = extent.shrunk_to_blocks(CLUSTER, size) {
            self.trimmed().insert(clusters);
        }
    }

    fn trimmed(&self) -> std::sync::MutexGuard<'_, ExtentSet> {
        // No change of the set can be left half done.
        self.trimmed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switch(stop: Option<&str>, start: &str) -> Switch {
        Switch {
            stop: stop.map(Into::into),
            start: Some(start.into()),
        }
    }

    fn dirty(export: &Export) -> Vec<(u64, u64)> {
        export.dirty().iter().map(Into::into).collect()
    }

    #[test]
    fn a_failed_backup_loses_no_change() {
        let mut disk = Disk::new("disk", 3 * 65536 + 5);
        let first = switch(None, "a");
        assert_eq!(dirty(&disk.freeze(&first)), [(0, 3 * 65536 + 5)]);
        disk.accept(&first);

        disk.write(65536 + 1, b"before");
        let failing = switch(Some("a"), "b");
        assert_eq!(dirty(&disk.freeze(&failing)), [(65536, 65536)]);
        disk.write(3 * 65536 + 2, b"meanwhile");
        disk.back_out(&failing);

        let next = switch(Some("a"), "c");
        let export = disk.freeze(&next);
        assert_eq!(dirty(&export), [(65536, 65536), (3 * 65536, 5)]);
        assert_eq!(&export.bytes()[3 * 65536..], b"\0\0mea");
        disk.accept(&next);
        assert_eq!(disk.recording().collect::<Vec<_>>(), ["c"]);
        assert_eq!(dirty(&disk.freeze(&switch(Some("c"), "d"))), []);
    }

    #[test]
    fn what_is_trimmed_or_bad_cannot_be_read() {
        let mut disk = Disk::new("disk", 200_000);
        disk.write(0, &[7; 200_000]);
        let bad = Extent::new(150_000, 1).unwrap();
        let export = disk.freeze(&Switch::default()).unreadable(bad);
        let extent = |offset, length| Extent::new(offset, length).unwrap();
        export.trim(extent(1, 2 * 65536));
        assert_eq!(export.read(extent(0, 65536)), Ok(&[7; 65536][..]));
        assert_eq!(export.read(extent(65535, 2)), Err(Refused::Trimmed));
        assert_eq!(export.read(extent(131_072, 100)), Ok(&[7; 100][..]));
        let touched = export.read(extent(149_000, 2000));
        assert_eq!(touched, Err(Refused::Unreadable));
    }
}
