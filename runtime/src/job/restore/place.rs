//! From a path on the command line to an open folder and a name in it.
//!
//! What another user could have put in the way is not followed: from here on everything is done by descriptors.

use super::error::{DestinationError, PlaceError};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// As many as the kernel follows (path_resolution(7)).
const LINKS: usize = 40;

/// Where something is or will be.
pub(super) struct Place {
    /// As it was given.
    pub(super) path: PathBuf,
    /// Opened by its path only: what is done in it is done by this descriptor.
    pub(super) folder: OwnedFd,
    /// In the folder.
    pub(super) name: OsString,
    /// What is there; no symbolic link.
    pub(super) existing: Option<Stat>,
}

impl Place {
    /// Follows `path` to the folder that its last component lies in.
    pub(super) fn find(path: &Path) -> Result<Self, DestinationError> {
        Self::walk(path).map_err(|source| DestinationError::Place {
            path: path.to_owned(),
            source,
        })
    }

    fn walk(path: &Path) -> Result<Self, PlaceError> {
        let mut folder = open_folder(CWD, if path.is_absolute() { "/" } else { "." })?;
        let mut names = components(path);
        let mut links = 0;
        while let Some(name) = names.pop_front() {
            let found = match statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) => found,
                Err(Errno::NOENT) if names.is_empty() => {
                    if path.as_os_str().as_bytes().ends_with(b"/") {
                        return Err(PlaceError::NoFolder);
                    }
                    return Ok(Self {
                        path: path.to_owned(),
                        folder,
                        name,
                        existing: None,
                    });
                }
                Err(error) => return Err(error.into()),
            };
            if FileType::from_raw_mode(found.st_mode) == FileType::Symlink {
                links += 1;
                let target = follow(&folder, &name, &found, links)?;
                if target.is_absolute() {
                    folder = open_folder(CWD, "/")?;
                }
                for component in components(&target).into_iter().rev() {
                    names.push_front(component);
                }
            } else if names.is_empty() {
                return Ok(Self {
                    path: path.to_owned(),
                    folder,
                    name,
                    existing: Some(found),
                });
            } else {
                folder = open_folder(&folder, &name)?;
            }
        }
        Err(PlaceError::NoFile)
    }

    /// Whether another user than root and this one can put things into the folder, or take them away.
    pub(super) fn is_open_to_others(&self) -> bool {
        rustix::fs::fstat(&self.folder).map_or(true, |folder| {
            !is_trusted(&folder) || folder.st_mode & 0o022 != 0
        })
    }
}

/// Another user's link would decide where root writes.
fn follow(
    folder: &OwnedFd,
    name: &OsStr,
    link: &Stat,
    links: usize,
) -> Result<PathBuf, PlaceError> {
    let target = readlinkat(folder, name, Vec::new())?.into_bytes();
    let target = PathBuf::from(OsString::from_vec(target));
    if links > LINKS {
        return Err(Errno::LOOP.into());
    }
    if !is_trusted(link) {
        return Err(PlaceError::OthersLink {
            name: name.to_string_lossy().into_owned(),
            user: link.st_uid,
            target,
        });
    }
    Ok(target)
}

/// Whether it is root's or this user's own.
pub(super) fn is_trusted(found: &Stat) -> bool {
    found.st_uid == 0 || found.st_uid == rustix::process::geteuid().as_raw()
}

fn components(path: &Path) -> VecDeque<OsString> {
    let parts = path.as_os_str().as_bytes().split(|byte| *byte == b'/');
    let named = parts.filter(|part| !part.is_empty() && *part != b".");
    named.map(|part| OsStr::from_bytes(part).into()).collect()
}

fn open_folder(at: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}
