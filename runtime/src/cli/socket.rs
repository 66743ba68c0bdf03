//! A socket for clients of a served backup, and its end.

use super::{Failure, Session, places};
use anyhow::{Context, anyhow};
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt};
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, Stat, fchmod, flock, openat, statat,
    unlinkat,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// In the state folder: one folder for each backup that is served.
const FOLDER: &str = "serve";

/// In such a folder.
const NAME: &str = "nbd.sock";

/// unix(7): room for 108 bytes, the last of which is zero.
const LONGEST: usize = 107;

/// As many as may wait to be accepted.
const BACKLOG: i32 = 64;

/// A socket that goes when this is dropped, with its folder, where that is its own.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    listener: Option<UnixListener>,
    /// What was made; what somebody else puts there in its place is left alone.
    made: Stat,
    _own_folder: Option<OwnFolder>,
}

#[derive(Debug)]
struct OwnFolder {
    all: Dir,
    name: String,
    /// Locked while this process lives: by that others see it.
    _locked: OwnedFd,
}

impl Socket {
    /// Listens on `path`, or in a fresh folder below the state folder.
    pub(super) fn listen(session: &Session, path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else {
            return Self::in_own_folder(session);
        };
        let path = std::path::absolute(path).map_err(places::failed)?;
        give_up_dead(&path)?;
        Self::at(path, None)
    }

    fn in_own_folder(session: &Session) -> Result<Self, Failure> {
        let (all, path) = places::folder(&session.state.join(FOLDER))?;
        let unusable = || format!("the folder {} cannot be used", path.display());
        let own = own_folder(all).with_context(unusable);
        let own = own.map_err(Failure::Failed)?;
        let path = path.join(&own.name).join(NAME);
        Self::at(path, Some(own))
    }

    fn at(path: PathBuf, own_folder: Option<OwnFolder>) -> Result<Self, Failure> {
        if path.as_os_str().len() > LONGEST {
            return Err(Failure::Mistake(anyhow!(
                "the socket {} would have a path of more than {LONGEST} bytes, which no client can name: choose another with --socket",
                path.display()
            )));
        }
        let bound = bind(&path).and_then(|listener| {
            let made = statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW)?;
            Ok((listener, made))
        });
        let unusable = || format!("the socket {} cannot be made", path.display());
        let (listener, made) = bound.with_context(unusable).map_err(Failure::Mistake)?;
        Ok(Self {
            path,
            listener: Some(listener),
            made,
            _own_folder: own_folder,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Once. Must be called within a tokio runtime.
    pub(super) fn listener(&mut self) -> io::Result<tokio::net::UnixListener> {
        let listener = self.listener.take();
        let listener = listener.ok_or(io::ErrorKind::NotConnected)?;
        tokio::net::UnixListener::from_std(listener)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let found = statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW);
        let is_it =
            |found: &Stat| (found.st_dev, found.st_ino) == (self.made.st_dev, self.made.st_ino);
        if found.as_ref().is_ok_and(is_it) {
            let _ = unlinkat(CWD, &self.path, AtFlags::empty());
        }
    }
}

impl Drop for OwnFolder {
    /// Empty by now: the socket goes before.
    fn drop(&mut self) {
        let _ = self.all.remove_dir(&self.name);
    }
}

/// A fresh folder in `all`, for this process alone. Those of dead ones go.
fn own_folder(all: Dir) -> io::Result<OwnFolder> {
    // Nobody sees a folder that is made and not yet locked.
    let turn = lockable(&all, ".".as_ref())?;
    flock(&turn, FlockOperation::LockExclusive)?;
    remove_dead(&all)?;
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let name = hex::encode(random);
    let mut private = DirBuilder::new();
    all.create_dir_with(&name, private.mode(0o700))?;
    let locked = lockable(&all, name.as_ref())?;
    flock(&locked, FlockOperation::NonBlockingLockExclusive)?;
    flock(&turn, FlockOperation::Unlock)?;
    Ok(OwnFolder {
        all,
        name,
        _locked: locked,
    })
}

/// A folder in another one, open in a way that it can be locked by.
fn lockable(folder: &Dir, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(folder, name, flags, Mode::empty())
}

fn remove_dead(all: &Dir) -> io::Result<()> {
    for entry in all.entries()? {
        let name = entry?.file_name();
        let Ok(folder) = lockable(all, &name) else {
            continue;
        };
        if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = unlinkat(&folder, NAME, AtFlags::empty());
            // One that holds something else is not ours to remove.
            let _ = all.remove_dir(&name);
        }
    }
    Ok(())
}

/// A socket that nobody listens on any more goes; anything else that is there stays.
fn give_up_dead(path: &Path) -> Result<(), Failure> {
    let found = match statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        found => found.map_err(places::failed)?,
    };
    let is_socket = FileType::from_raw_mode(found.st_mode) == FileType::Socket;
    let is_dead = || {
        let reached = std::os::unix::net::UnixStream::connect(path);
        reached.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    if is_socket && is_dead() {
        return unlinkat(CWD, path, AtFlags::empty())
            .with_context(|| format!("the socket {} of a dead process", path.display()))
            .map_err(Failure::Mistake);
    }
    Err(Failure::Mistake(anyhow!(
        "{} is there already: name another with --socket",
        path.display()
    )))
}

/// For its owner alone from the first moment on: what a socket's file may be is taken from the socket (unix(7)).
fn bind(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}
