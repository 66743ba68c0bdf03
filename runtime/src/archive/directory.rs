//! Making files appear whole or not at all.
//!
//! A file is written under a name that ends in [`TEMPORARY`], synced, and renamed; then the directory is
//! synced. In directories that jobs share, a temporary name begins with the id of the backup that made it,
//! so that recovery finds what a killed job left.

use super::error::{Damage, Error};
use super::name::{BackupId, random};
use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// How the name of a file ends that no reader may look at.
pub(super) const TEMPORARY: &str = ".tmp";

/// The temporary name of `name` while `backup` makes it.
pub(super) fn temporary(backup: BackupId, name: &str) -> String {
    format!("{backup}.{name}{TEMPORARY}")
}

/// Makes the names in `dir` durable.
pub(super) fn sync(dir: &Dir) -> io::Result<()> {
    // The handle itself may be of a kind that can only be used to open from.
    dir.open(".")?.sync_all()
}

/// A new empty file, for reading and writing.
pub(super) fn create_new(dir: &Dir, name: &str) -> io::Result<File> {
    let options = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .to_owned();
    dir.open_with(name, &options).map(|file| file.into_std())
}

/// A new file with its bytes durable; its name is not yet. Removes it where that fails.
pub(super) fn write_new(dir: &Dir, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = create_new(dir, name)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .inspect_err(|_| remove(dir, name))
}

/// Creates `name` with `bytes` unless it exists, and returns what it then holds: the first of several
/// processes wins, and no one ever sees a part.
pub(super) fn make_once(dir: &Dir, name: &str, bytes: &[u8], limit: u64) -> Result<Vec<u8>, Error> {
    let temporary = format!(".{name}.{}{TEMPORARY}", hex::encode(random::<8>()?));
    write_new(dir, &temporary, bytes).map_err(Error::at(name))?;
    let linked = match dir.hard_link(&temporary, dir, name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    remove(dir, &temporary);
    linked.and_then(|()| sync(dir)).map_err(Error::at(name))?;
    read(dir, name, limit)
}

/// Opens a file to read. What is no regular file is damage: a symbolic link leads out of the archive, and who opens a
/// FIFO waits for its other end without limit.
pub(super) fn open(dir: &Dir, name: impl AsRef<Path>) -> Result<File, Error> {
    let name = name.as_ref();
    let shown = name.display();
    let mut options = OpenOptions::new();
    options.read(true);
    options.custom_flags((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed());
    let file = match dir.open_with(name, &options) {
        // A symbolic link, a socket.
        Err(error)
            if [Errno::LOOP, Errno::NXIO]
                .contains(&Errno::from_io_error(&error).unwrap_or(Errno::IO)) =>
        {
            return Err(Error::damaged(shown)(Damage::NotAFile));
        }
        file => file.map_err(Error::at(shown))?.into_std(),
    };
    let kind = file.metadata().map_err(Error::at(name.display()))?;
    match kind.is_file() {
        true => Ok(file),
        false => Err(Error::damaged(name.display())(Damage::NotAFile)),
    }
}

/// The whole of a file that has at most `limit` bytes. Memory is taken as it is read.
pub(super) fn read(dir: &Dir, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
    let mut file = open(dir, name)?;
    let mut bytes = Vec::new();
    let read = io::Read::by_ref(&mut file)
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(Error::at(name))?;
    if read as u64 > limit {
        let actual = file.metadata().map_err(Error::at(name))?.len();
        return Err(Error::damaged(name)(Damage::Length {
            expected: limit,
            actual,
        }));
    }
    Ok(bytes)
}

/// Removes a file on a way out that has its own error to report; recovery removes what stays.
pub(super) fn remove(dir: &Dir, name: &str) {
    if let Err(error) = dir.remove_file(name)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(name, %error, "cannot remove a temporary file");
    }
}

/// Removes the temporary files that `backup` made in `dir`.
pub(super) fn remove_temporaries(dir: &Dir, backup: BackupId) -> io::Result<()> {
    let prefix = format!("{backup}.");
    for entry in dir.entries()? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str()
            && name.starts_with(&prefix)
            && name.ends_with(TEMPORARY)
        {
            dir.remove_file(name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[test]
    fn what_is_no_regular_file_or_too_large_is_damage_and_waits_for_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        std::fs::write(at("file"), "content").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        let _listens = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let sparse = File::create(at("sparse")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        let dir = Dir::open_ambient_dir(folder.path(), cap_std::ambient_authority()).unwrap();
        for name in ["fifo", "folder", "link", "socket"] {
            let error = read(&dir, name, 100).unwrap_err();
            let damage = matches!(
                error,
                Error::Damaged {
                    damage: Damage::NotAFile,
                    ..
                }
            );
            assert!(damage, "{name}: {error}");
        }
        let error = read(&dir, "sparse", 100).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert_eq!(read(&dir, "file", 7).unwrap(), b"content");
    }
}
