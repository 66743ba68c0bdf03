//! Whether QEMU, told a path, opened the file that was opened here by that path before: in between, who can write to one
//! of the path's folders may have put another in its place, and QEMU may be root's.
//!
//! Two witnesses: the table of QEMU's descriptors, where `/proc` shows the process that listens on the monitor and it is
//! a QEMU; else the file itself, which tells whether anybody opened it (inotify(7)).

use rustix::fs::inotify;
use std::collections::BTreeMap;
use std::fs::Metadata;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A look at a file, from before QEMU is told its path.
#[derive(Debug)]
pub(super) struct Look {
    expected: Identity,
    table: Option<(PathBuf, Table)>,
    watch: Option<OwnedFd>,
}

/// Which file a descriptor is of, whatever path leads there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    /// The file system's device number, and the inode in it.
    File(u64, u64),
    /// A block device's own number: another mount of `/dev` has other inodes.
    Device(u64),
}

/// How often each file is open.
type Table = BTreeMap<Identity, usize>;

impl Look {
    /// At `file`; `peer` is the process that listens on the monitor. Nothing where the file cannot be looked at.
    pub(super) fn at(file: BorrowedFd<'_>, peer: Option<i32>) -> Option<Self> {
        let own = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let expected = Identity::of(&std::fs::metadata(&own).ok()?)?;
        let table = peer.map(|peer| PathBuf::from(format!("/proc/{peer}")));
        let table = table.filter(|process| is_qemu(process)).and_then(|it| {
            let folder = it.join("fd");
            read_table(&folder).map(|table| (folder, table))
        });
        let watch = match expected {
            Identity::File(..) => watch(&own),
            Identity::Device(_) => None,
        };
        Some(Self {
            expected,
            table,
            watch,
        })
    }

    /// Whether something was opened by now that is not the file. Nobody can tell where there is no witness.
    pub(super) fn saw_another(&self) -> bool {
        if let Some((folder, before)) = &self.table
            && let Some(after) = read_table(folder)
        {
            let more = |identity: &Identity| {
                after.get(identity).copied().unwrap_or_default()
                    > before.get(identity).copied().unwrap_or_default()
            };
            return !more(&self.expected);
        }
        let Some(watch) = &self.watch else {
            return false;
        };
        let mut buffer = [MaybeUninit::uninit(); 512];
        let mut events = inotify::Reader::new(watch, &mut buffer);
        !matches!(events.next(), Ok(event) if event.events().contains(inotify::ReadFlags::OPEN))
    }
}

impl Identity {
    /// None of what is neither a file nor a block device.
    fn of(metadata: &Metadata) -> Option<Self> {
        let kind = metadata.file_type();
        if kind.is_block_device() {
            Some(Self::Device(metadata.rdev()))
        } else if kind.is_file() {
            Some(Self::File(metadata.dev(), metadata.ino()))
        } else {
            None
        }
    }
}

/// Behind a relay it is the relay, whose descriptors say nothing.
fn is_qemu(process: &Path) -> bool {
    let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    name.starts_with("qemu-") || name.trim_end() == "kvm"
}

fn read_table(folder: &Path) -> Option<Table> {
    let mut table = Table::new();
    for entry in std::fs::read_dir(folder).ok()? {
        // Through the link: of the file that is open, wherever its path leads by now.
        let metadata = std::fs::metadata(entry.ok()?.path());
        if let Some(identity) = metadata.ok().as_ref().and_then(Identity::of) {
            *table.entry(identity).or_default() += 1;
        }
    }
    Some(table)
}

fn watch(path: &Path) -> Option<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watch = inotify::init(flags).ok()?;
    inotify::add_watch(&watch, path, inotify::WatchFlags::OPEN).ok()?;
    Some(watch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn the_file_that_is_opened_is_told_from_another_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("file"), folder.path().join("moved"));
        let file = File::create(&path).unwrap();
        let look = Look::at(file.as_fd(), None).unwrap();
        let _same = File::open(&path).unwrap();
        assert!(!look.saw_another());
        let look = Look::at(file.as_fd(), None).unwrap();
        std::fs::rename(&path, &moved).unwrap();
        std::fs::write(&path, "another").unwrap();
        let _another = File::open(&path).unwrap();
        assert!(look.saw_another());
    }
}
