//! Making files appear whole or not at all.
//!
//! A file, or a directory of several, is made under a name that ends in [`TEMPORARY`], synced, and renamed; then the
//! directory is synced. All are for their owner alone, whatever the umask. In directories that jobs share, a temporary name begins with the id of the backup that made it,
//! so that recovery finds what a killed job left.

use super::error::{Damage, Error};
use super::name::{BackupId, random};
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, OpenOptions, OpenOptionsExt};
use fleecebox_contract::with_causes;
use rustix::fs::{FlockOperation, OFlags, RenameFlags, flock, renameat_with};
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

/// Makes the directory `name`, which must not be there, and opens it.
pub(super) fn make_dir(dir: &Dir, name: &str) -> io::Result<Dir> {
    let mut private = DirBuilder::new();
    private.mode(0o700);
    dir.create_dir_with(name, &private)?;
    dir.open_dir(name)
}

/// Makes the directory `name` where it is not there, and opens it.
pub(super) fn open_or_make_dir(dir: &Dir, name: &str) -> io::Result<Dir> {
    match make_dir(dir, name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => dir.open_dir(name),
        made => made,
    }
}

/// Creates the directory `name`, filled by `fill`, unless it exists: the first of several processes wins, and no one ever
/// sees a part. What killed ones left half-made is removed.
pub(super) fn make_dir_once(
    dir: &Dir,
    name: &str,
    fill: impl FnOnce(&Dir) -> Result<(), Error>,
) -> Result<(), Error> {
    remove_dead(dir, name).map_err(Error::at(name))?;
    let (temporary, made, _lock) = make_locked(dir, name)?;
    let filled = fill(&made).and_then(|()| {
        sync(&made).map_err(Error::at(name))?;
        match dir.rename(&temporary, dir, name) {
            // A directory that is not empty is never replaced.
            Err(error) if is_taken(&error) => Ok(false),
            renamed => renamed.map(|()| true).map_err(Error::at(name)),
        }
    });
    if !matches!(filled, Ok(true)) {
        let _ = dir.remove_dir_all(&temporary);
    }
    filled?;
    sync(dir).map_err(Error::at(name))
}

fn is_taken(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty};
    [AlreadyExists, DirectoryNotEmpty].contains(&error.kind())
}

/// A new directory, and its lock, by which others see that its maker lives.
fn make_locked(dir: &Dir, name: &str) -> Result<(String, Dir, Option<cap_std::fs::File>), Error> {
    loop {
        let temporary = format!(".{name}.{}{TEMPORARY}", hex::encode(random::<8>()?));
        let made = make_dir(dir, &temporary).map_err(Error::at(name))?;
        let lock = lock(&made, FlockOperation::LockExclusive);
        // Between the two another one may have taken it for a dead one's.
        if dir.exists(&temporary) {
            return Ok((temporary, made, lock));
        }
    }
}

/// Locked until it is dropped; nothing where the lock is not to be had, or the file system knows none.
fn lock(dir: &Dir, how: FlockOperation) -> Option<cap_std::fs::File> {
    let file = dir.open(".").ok()?;
    flock(&file, how).ok()?;
    Some(file)
}

fn remove_dead(dir: &Dir, name: &str) -> io::Result<()> {
    let prefix = format!(".{name}.");
    for entry in dir.entries()? {
        let entry = entry?.file_name();
        let Some(entry) = entry
            .to_str()
            .filter(|entry| entry.starts_with(&prefix) && entry.ends_with(TEMPORARY))
        else {
            continue;
        };
        if let Ok(dead) = dir.open_dir(entry)
            && lock(&dead, FlockOperation::NonBlockingLockExclusive).is_some()
        {
            dir.remove_dir_all(entry)?;
        }
    }
    Ok(())
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
    let named = match rename_new(dir, &temporary, name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    remove(dir, &temporary);
    named.and_then(|()| sync(dir)).map_err(Error::at(name))?;
    read(dir, name, limit)
}

/// Gives a file its name, and fails where there is one of that name.
fn rename_new(dir: &Dir, temporary: &str, name: &str) -> io::Result<()> {
    // Other than a rename, this never replaces anything.
    match dir.hard_link(temporary, dir, name) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {}
        linked => return linked,
    }
    // No hard links: exFAT, FAT, some of FUSE and 9p.
    match renameat_with(dir, temporary, dir, name, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        renamed => return Ok(renamed?),
    }
    // Nor that: of several processes of this host the first wins by a lock, of a file of its own, as a directory that is
    // being filled is locked itself. It stays, since whoever removed it would leave others with a lock that none shares.
    let lock = format!(".{name}.lock{TEMPORARY}");
    let mut options = OpenOptions::new();
    let file = dir.open_with(lock, options.create(true).write(true).mode(0o600))?;
    let _ = flock(&file, FlockOperation::LockExclusive);
    match dir.symlink_metadata(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => dir.rename(temporary, dir, name),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
    }
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
        tracing::warn!(name, error = %with_causes(&error), "cannot remove a temporary file");
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
