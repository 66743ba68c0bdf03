//! Where a volume is written to: a file that appears under its name once it is whole, or a block device.
//!
//! The folder may be another user's. So nothing is opened twice by a path: the file in the making has no name, or one that
//! nobody can guess, and is its owner's alone; and what is to be replaced is held, so that no VM and no other restore takes
//! it meanwhile.

use super::error::DestinationError;
use super::in_use;
use super::place::{Place, is_trusted};
use super::temporary::Temporary;
use super::{Format, qemu_img};
use crate::config::Config;
use crate::contract::with_causes;
use crate::event::Events;
use rustix::fd::OwnedFd;
use rustix::fs::{
    FallocateFlags, FileType, FlockOperation, Gid, Mode, OFlags, Stat, Uid, fallocate, fchmod,
    fchown, fcntl_lock, fstat, openat,
};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Bytes zeroed at once on a block device, so that a cancel does not wait for all of a large one.
const ZERO_PIECE: u64 = 1 << 30;

/// What may be done to what is there already.
#[derive(Debug, Clone, Copy)]
pub struct Insistence {
    /// An existing file is replaced, a block device overwritten.
    pub force: bool,
    /// Even what somebody has open.
    pub even_if_in_use: bool,
}

/// What is asked before something is overwritten, and where is told what cannot be asked.
#[derive(Clone, Copy)]
pub(super) struct Users<'a> {
    /// Its VMs may have it open.
    pub(super) config: &'a Config,
    /// For warnings.
    pub(super) events: &'a Events,
}

/// One that is open, and not yet whole.
pub(super) struct Destination {
    /// Where the raw bytes go.
    pub(super) file: Arc<File>,
    place: Place,
    /// Nothing for a device.
    making: Option<Making>,
}

struct Making {
    file: Temporary,
    /// A file that is there and goes, locked.
    replaces: Option<Replaced>,
    replaces_any: bool,
}

struct Replaced {
    was: Stat,
    #[allow(dead_code, reason = "held for its lock")]
    held: Option<OwnedFd>,
}

impl Destination {
    pub(super) async fn open(
        path: &Path,
        size: u64,
        format: Format,
        insistence: Insistence,
        users: Users<'_>,
    ) -> Result<Self, DestinationError> {
        let place = Place::find(path)?;
        let kind = place
            .existing
            .as_ref()
            .map(|found| FileType::from_raw_mode(found.st_mode));
        let path = path.to_owned();
        match (kind, &place.existing) {
            (None, _) | (_, None) => Self::new_file(place, size, None, insistence),
            (Some(FileType::RegularFile | FileType::BlockDevice), _) if !insistence.force => {
                Err(DestinationError::Exists { path })
            }
            (Some(FileType::RegularFile), Some(found)) => {
                refuse_if_used(&place, found, insistence, users).await?;
                let replaced = Replaced::hold(&place, found, insistence)?;
                Self::new_file(place, size, Some(replaced), insistence)
            }
            (Some(FileType::BlockDevice), Some(found)) => {
                if format != Format::Raw {
                    return Err(DestinationError::RawOnly { path });
                }
                refuse_if_used(&place, found, insistence, users).await?;
                Self::device(place, size, insistence)
            }
            (Some(FileType::Directory), _) => Err(DestinationError::Folder { path }),
            (Some(kind), _) => Err(DestinationError::NeverReplaced {
                path,
                kind: name_of(kind),
            }),
        }
    }

    fn new_file(
        place: Place,
        size: u64,
        replaces: Option<Replaced>,
        insistence: Insistence,
    ) -> Result<Self, DestinationError> {
        let file = Temporary::new(&place.folder).map_err(|error| DestinationError::Place {
            path: place.path.clone(),
            source: error.into(),
        })?;
        let raw = file.share();
        raw.set_len(size)
            .map_err(|error| unwritten(&place.path, error))?;
        Ok(Self {
            file: raw,
            place,
            making: Some(Making {
                file,
                replaces,
                replaces_any: insistence.force,
            }),
        })
    }

    fn device(place: Place, size: u64, insistence: Insistence) -> Result<Self, DestinationError> {
        let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        if !insistence.even_if_in_use {
            // A device that is mounted, or that the kernel uses otherwise, is refused (open(2)).
            flags |= OFlags::EXCL;
        }
        let opened = openat(&place.folder, &place.name, flags, Mode::empty());
        if opened.as_ref().err() == Some(&Errno::BUSY) {
            return Err(in_use(
                &place,
                &["the kernel has it open for itself".into()],
            ));
        }
        let file = opened
            .map(File::from)
            .map_err(|error| DestinationError::Place {
                path: place.path.clone(),
                source: error.into(),
            })?;
        if !insistence.even_if_in_use {
            lock(&place, &file)?;
        }
        prepare_device(&file, &place.path, size)?;
        Ok(Self {
            file: Arc::new(file),
            place,
            making: None,
        })
    }

    /// Makes it durable and gives it its name.
    pub(super) async fn complete(
        self,
        format: Format,
        events: &Events,
        cancel: &CancellationToken,
    ) -> Result<(), DestinationError> {
        let place = &self.place;
        let failed = |error: io::Error| DestinationError::Complete {
            path: place.path.clone(),
            source: explained(error),
        };
        let Some(making) = self.making else {
            return self.file.sync_all().map_err(failed);
        };
        let done = match format {
            Format::Raw => making.file,
            Format::Qcow2 => {
                let converted = Temporary::new(&place.folder).map_err(failed)?;
                let (raw, qcow2) = (making.file.share(), converted.share());
                let converting = qemu_img::convert(&raw, &qcow2);
                tokio::select! {
                    converting = converting => converting?,
                    () = cancel.cancelled() => return Err(DestinationError::Cancelled),
                }
                converted
            }
        };
        let file = done.share();
        if let Some(replaced) = &making.replaces {
            replaced.hand_on(place, &file, events);
        }
        file.sync_all().map_err(failed)?;
        match &making.replaces_any {
            true => done.replace(&place.name, may_be_replaced),
            false => done.name(&place.name),
        }
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => DestinationError::Appeared {
                path: place.path.clone(),
            },
            _ => failed(error),
        })
    }
}

/// What became of the name meanwhile may be anything.
fn may_be_replaced(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

impl Replaced {
    fn hold(place: &Place, found: &Stat, insistence: Insistence) -> Result<Self, DestinationError> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // Whoever may write to its folder may replace it, even where it cannot be opened.
        let held = openat(&place.folder, &place.name, flags, Mode::empty()).ok();
        if let (Some(held), false) = (&held, insistence.even_if_in_use) {
            lock(place, held)?;
        }
        Ok(Self { was: *found, held })
    }

    /// The new file is to be whose the old one was. In a folder where others can put files, the old one may be theirs
    /// only so that they get the new one.
    fn hand_on(&self, place: &Place, file: &File, events: &Events) {
        let path = place.path.display();
        if place.is_open_to_others() && !(is_trusted(&self.was) && self.was.st_mode & 0o077 == 0) {
            events.warn(format!(
                "{path} is now this user's alone: others can write to its folder, so that its former owner and mode may not be its operator's"
            ));
            return;
        }
        if let Err(error) = self.give(file) {
            events.warn(format!(
                "{path} cannot be given its former owner and mode: {}",
                with_causes(&io::Error::from(error))
            ));
        }
    }

    /// What is so already is not asked for: FAT has neither.
    fn give(&self, file: &File) -> rustix::io::Result<()> {
        let (was, now) = (&self.was, fstat(file)?);
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid) {
            let (owner, group) = (Uid::from_raw(was.st_uid), Gid::from_raw(was.st_gid));
            fchown(file, Some(owner), Some(group))?;
        }
        // Neither programs nor their privileges are restored.
        let mode = was.st_mode & 0o666;
        match now.st_mode & 0o666 == mode {
            true => Ok(()),
            false => fchmod(file, Mode::from_raw_mode(mode)),
        }
    }
}

async fn refuse_if_used(
    place: &Place,
    found: &Stat,
    insistence: Insistence,
    users: Users<'_>,
) -> Result<(), DestinationError> {
    if insistence.even_if_in_use {
        return Ok(());
    }
    match &in_use::users(found, users.config, users.events).await[..] {
        [] => Ok(()),
        users => Err(in_use(place, users)),
    }
}

/// Against everybody, as long as the file is open: QEMU locks its images by bytes of their own, wherever it runs, and does
/// not start on one that is locked (qemu.git, block/file-posix.c). A file system without locks has none to be missed.
fn lock(place: &Place, file: impl rustix::fd::AsFd) -> Result<(), DestinationError> {
    match fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::AGAIN | Errno::ACCESS) => Err(in_use(
            place,
            &["another process has a lock on it, as QEMU has on its images".into()],
        )),
        _ => Ok(()),
    }
}

fn in_use(place: &Place, users: &[String]) -> DestinationError {
    DestinationError::InUse {
        path: place.path.clone(),
        users: users.to_vec(),
    }
}

/// A device holds something else wherever the backup is zero.
fn prepare_device(device: &File, path: &Path, size: u64) -> Result<(), DestinationError> {
    let mut seek = device;
    let path = || path.to_owned();
    let available = seek
        .seek(SeekFrom::End(0))
        .map_err(|source| DestinationError::Measure {
            path: path(),
            source,
        })?;
    if available < size {
        return Err(DestinationError::TooSmall {
            path: path(),
            available,
            size,
        });
    }
    zero(device, size).map_err(|source| DestinationError::Zero {
        path: path(),
        source,
    })
}

fn zero(device: &File, size: u64) -> io::Result<()> {
    // The kernel zeroes whole sectors only (EINVAL), and not on every device.
    let sector = u64::from(rustix::fs::ioctl_blksszget(device)?).max(1);
    let whole = size - size % sector;
    let mut at = 0;
    while at < whole {
        let length = ZERO_PIECE.min(whole - at);
        let how = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match fallocate(device, how, at, length) {
            Err(Errno::OPNOTSUPP) => write_zeroes(device, at, length)?,
            zeroed => zeroed?,
        }
        at += length;
    }
    write_zeroes(device, whole, size - whole)
}

fn write_zeroes(device: &File, at: u64, length: u64) -> io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut done = 0;
    while done < length {
        let piece = zeroes
            .len()
            .min(usize::try_from(length - done).unwrap_or(usize::MAX));
        device.write_all_at(&zeroes[..piece], at + done)?;
        done += piece as u64;
    }
    Ok(())
}

/// Why, and so what may be done.
pub(super) const TOO_LARGE: &str =
    "a limit on the size of files (`ulimit -f`) or the file system does not allow it";

/// That the bytes do not go there.
pub(super) fn unwritten(path: &Path, error: io::Error) -> DestinationError {
    DestinationError::Write {
        path: path.to_owned(),
        source: explained(error),
    }
}

/// An error of a write, with what may be done.
fn explained(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::FileTooLarge => io::Error::new(
            error.kind(),
            format!("{}: {TOO_LARGE}", with_causes(&error)),
        ),
        _ => error,
    }
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::CharacterDevice => "a character device",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        _ => "no regular file",
    }
}
