//! A file in the making, in a folder that may be another user's.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RenameFlags, Stat, fchmod, fstat, linkat, openat, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

const PRIVATE: Mode = Mode::from_raw_mode(0o600);

/// It has no name where the file system can do without (open(2), `O_TMPFILE`), so that nothing is left of it when the
/// process dies; else one that nobody can guess.
pub(super) struct Temporary {
    file: Arc<File>,
    folder: OwnedFd,
    name: Option<String>,
}

impl Temporary {
    pub(super) fn new(folder: &OwnedFd) -> io::Result<Self> {
        let folder = folder.try_clone()?;
        if let Some(file) = unnamed(&folder)? {
            return Ok(Self {
                file: Arc::new(file),
                folder,
                name: None,
            });
        }
        let name = random_name()?;
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(openat(&folder, &name, flags, PRIVATE)?);
        let made = Self {
            file: Arc::new(file),
            folder,
            name: Some(name),
        };
        // FAT has no modes.
        let _ = fchmod(&made.file, PRIVATE);
        Ok(made)
    }

    pub(super) fn share(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Gives it its name; fails with `AlreadyExists` where there is one of that name.
    pub(super) fn name(mut self, name: &OsStr) -> io::Result<()> {
        match &self.name {
            None => link(&self.file, &self.folder, name)?,
            Some(temporary) => {
                rename_new(&self.folder, temporary, name)?;
                self.name = None;
            }
        }
        self.settle(name)
    }

    /// Gives it its name, in the place of what has it, if that may be.
    pub(super) fn replace(
        mut self,
        name: &OsStr,
        may_be_replaced: impl Fn(&Stat) -> bool,
    ) -> io::Result<()> {
        match statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if !may_be_replaced(&found) => {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            _ => {}
        }
        let temporary = match self.name.take() {
            Some(temporary) => temporary,
            None => {
                let temporary = random_name()?;
                link(&self.file, &self.folder, temporary.as_ref())?;
                temporary
            }
        };
        // Removed by its name where the rename fails.
        let temporary = self.name.insert(temporary);
        renameat(&self.folder, &*temporary, &self.folder, name)?;
        self.name = None;
        self.settle(name)
    }

    /// Whoever may write to the folder may have put another file there in between, and this one's fate is not known then.
    fn settle(&self, name: &OsStr) -> io::Result<()> {
        let (own, found) = (
            fstat(&self.file)?,
            statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW)?,
        );
        if (own.st_dev, own.st_ino) != (found.st_dev, found.st_ino) {
            return Err(io::Error::other("another process put something else there"));
        }
        sync(&self.folder)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}

/// A file that can be given a name later. There are file systems that make one and then cannot name it: it is tried with
/// another one first.
fn unnamed(folder: &OwnedFd) -> io::Result<Option<File>> {
    let make = || {
        openat(
            folder,
            ".",
            OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC,
            PRIVATE,
        )
    };
    let (probe, name) = (make(), random_name()?);
    let Ok(probe) = probe.map(File::from) else {
        return Ok(None);
    };
    if link(&probe, folder, name.as_ref()).is_err() {
        return Ok(None);
    }
    unlinkat(folder, &name, AtFlags::empty())?;
    let file = make()?;
    fchmod(&file, PRIVATE)?;
    Ok(Some(file.into()))
}

fn link(file: &File, folder: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
    match linkat(file, "", folder, name, AtFlags::EMPTY_PATH) {
        // Without a privilege it goes by way of /proc (open(2), `O_TMPFILE`).
        Err(Errno::NOENT | Errno::PERM | Errno::ACCESS) => {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, path, folder, name, AtFlags::SYMLINK_FOLLOW)
        }
        linked => linked,
    }
}

/// As a rename that replaces nothing. exFAT, FUSE, 9p and NFS know no such rename, and some no hard links either.
fn rename_new(folder: &OwnedFd, temporary: &str, name: &OsStr) -> rustix::io::Result<()> {
    match renameat_with(folder, temporary, folder, name, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        renamed => return renamed,
    }
    match linkat(folder, temporary, folder, name, AtFlags::empty()) {
        Ok(()) => return unlinkat(folder, temporary, AtFlags::empty()),
        Err(Errno::EXIST) => return Err(Errno::EXIST),
        Err(_) => {}
    }
    // An empty file keeps the name, and is replaced at once.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    drop(openat(folder, name, flags, PRIVATE)?);
    renameat(folder, temporary, folder, name).inspect_err(|_| {
        let _ = unlinkat(folder, name, AtFlags::empty());
    })
}

/// Makes the names in the folder durable, where the file system knows how to.
fn sync(folder: impl AsFd) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let synced = openat(folder, ".", flags, Mode::empty()).and_then(rustix::fs::fsync);
    match synced {
        // One that may be written to and not read, or a file system that keeps no folders.
        Err(Errno::ACCESS | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
        synced => Ok(synced?),
    }
}

fn random_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(format!(".fleecebox-{}.partial", hex::encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn each_way(work: impl Fn(&std::path::Path, &OwnedFd) + Sync) {
        let try_it = || {
            let path = tempfile::tempdir().unwrap();
            let folder = File::open(path.path()).unwrap().into();
            work(path.path(), &folder);
            let names = std::fs::read_dir(path.path()).unwrap();
            let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["name"]);
        };
        try_it();
        crate::poor_file_system::on_one(try_it);
    }

    #[test]
    fn a_file_gets_its_name_and_takes_nobodys_where_it_may_not() {
        each_way(|path, folder| {
            let make = |content: &[u8]| {
                let made = Temporary::new(folder).unwrap();
                (&*made.share()).write_all(content).unwrap();
                made
            };
            make(b"first").name("name".as_ref()).unwrap();
            let taken = make(b"second").name("name".as_ref()).unwrap_err();
            assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
            let read = || std::fs::read(path.join("name")).unwrap();
            assert_eq!(read(), b"first");
            make(b"third").replace("name".as_ref(), |_| true).unwrap();
            assert_eq!(read(), b"third");
            assert!(make(b"fourth").replace("name".as_ref(), |_| false).is_err());
            assert_eq!(read(), b"third");
        });
    }
}
