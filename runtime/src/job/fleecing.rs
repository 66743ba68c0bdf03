//! The fleecing images of one job: sparse files of exactly the disks' sizes, in a folder of the job's own.
//!
//! QEMU keeps the old data of overwritten blocks there. The job keeps a descriptor of each since its creation: QEMU's
//! buffered writes report an error of the storage below only to those who ask with fsync.

use crate::config::{Limits, Vm};
use crate::qemu::JobId;
use crate::qemu::snapshot::FleecingFormat;
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, File, OpenOptions, OpenOptionsExt};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Free space asked for at the start: this part of all disks together, or all that can be overwritten at all where that is
/// less. A guest seldom overwrites more while its
/// backup runs, and a sparse image on a smaller file system would soon stop the guest's own writes.
const SHARE: u64 = 16;

/// What is left free at least. Below it the job is given up: QEMU 10.0 fails the guest's write when a fleecing image
/// cannot grow, and the VM comes first.
const RESERVE: u64 = 32 << 20;

/// Between two looks at the free space: within it, a guest that writes 1.6 GiB in a second uses up what is left.
const LOOK: Duration = Duration::from_millis(20);

/// Longest path of a unix socket, in bytes (`sun_path` of unix(7), without its end).
const SOCKET_PATH_MAX: usize = 107;

/// The NBD server's socket, in a job's folder.
pub(super) const SOCKET: &str = "nbd.sock";

/// The images of one job. Dropping it leaves the files; [`Fleecing::remove`] deletes them.
#[derive(Debug)]
pub struct Fleecing {
    parent: Dir,
    path: PathBuf,
    name: String,
    images: Vec<(PathBuf, File)>,
    /// Most bytes that the images were seen to take up.
    peak: AtomicU64,
}

/// Why there are no fleecing images.
#[derive(Debug, thiserror::Error)]
pub enum FleecingError {
    /// The file system has too little room.
    #[error(
        "the fleecing folder {folder} is too small: {available} bytes are free, {needed} are needed to begin (name a larger one with --fleecing)",
        folder = folder.display()
    )]
    TooSmall {
        /// The folder.
        folder: PathBuf,
        /// Free bytes.
        available: u64,
        /// Bytes asked for.
        needed: u64,
    },
    /// The NBD socket's path would be too long for the kernel.
    #[error("the fleecing folder's path {folder} is too long: a socket in it would pass {SOCKET_PATH_MAX} bytes", folder = folder.display())]
    PathTooLong {
        /// The folder.
        folder: PathBuf,
    },
    /// The file system takes no file as large as a disk.
    #[error(
        "the file system of the fleecing folder {folder} takes no file of {size} bytes, as large as the disk (ext4 takes 16 TiB); set `fleecing-format` of this VM to \"qcow2\", or name a folder on another file system with --fleecing",
        folder = folder.display()
    )]
    FileTooLarge {
        /// The folder.
        folder: PathBuf,
        /// Of the largest disk.
        size: u64,
    },
    /// The file system failed.
    #[error("cannot make fleecing images in {folder}", folder = folder.display())]
    Io {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why the job must end early.
#[derive(Debug, thiserror::Error)]
pub enum GivenUp {
    /// The fleecing file system is nearly full; the guest must not notice.
    #[error(
        "the fleecing folder is nearly full ({available} bytes are free): the backup was given up so that the VM can go on writing"
    )]
    NearlyFull {
        /// Free bytes.
        available: u64,
    },
    /// The images take up more than they may.
    #[error(
        "the fleecing images take up {allocated} bytes, more than the {limit}: the backup was given up"
    )]
    TooLarge {
        /// Bytes taken up.
        allocated: u64,
        /// In bytes.
        limit: Bound,
    },
    /// The snapshot is held for longer than it may be.
    #[error("the snapshot was needed for more seconds than the {limit}: the backup was given up")]
    TooLong {
        /// In seconds.
        limit: Bound,
    },
}

/// What the VM's configuration and the provider's limits allow a snapshot; the smaller one holds.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most bytes that the images may take up together.
    bytes: Option<Bound>,
    /// Most seconds that the snapshot may be held.
    seconds: Option<Bound>,
}

/// A number and the key of the configuration that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bound(u64, &'static str);

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of `{}`", self.0, self.1)
    }
}

impl Bounds {
    /// Those of a backup of `vm` by a provider with `limits`.
    pub fn of(vm: &Vm, limits: &Limits) -> Self {
        let smaller = |bounds: [Option<Bound>; 2]| bounds.into_iter().flatten().min();
        Self {
            bytes: smaller([
                vm.fleecing_bytes
                    .map(|bytes| Bound(bytes, "fleecing-bytes")),
                limits
                    .fleecing_bytes
                    .map(|bytes| Bound(bytes, "fleecing-bytes")),
            ]),
            seconds: smaller([
                vm.snapshot_seconds
                    .map(|seconds| Bound(seconds, "snapshot-seconds")),
                limits
                    .snapshot_seconds
                    .map(|seconds| Bound(seconds, "snapshot-seconds")),
            ]),
        }
    }
}

impl Fleecing {
    /// The name of a job's folder.
    pub fn name(job: JobId) -> String {
        job.folder()
    }

    /// Makes one image of each of `sizes` (bytes) in a new folder `name` below `parent`, whose absolute path is `path`.
    /// `room` is the sum of what [`room`] says of each disk.
    pub fn create(
        parent: Dir,
        path: &Path,
        name: &str,
        sizes: &[u64],
        room: u64,
        format: FleecingFormat,
    ) -> Result<Self, FleecingError> {
        let io = |source| FleecingError::Io {
            folder: path.to_owned(),
            source,
        };
        check_room(&parent, path, room)?;
        let folder_path = path.join(name);
        if folder_path.join(SOCKET).as_os_str().len() > SOCKET_PATH_MAX {
            return Err(FleecingError::PathTooLong {
                folder: path.to_owned(),
            });
        }
        // Old data of the guest's disks: nobody else's business.
        let mut private = DirBuilder::new();
        private.mode(0o700);
        parent.create_dir_with(name, &private).map_err(io)?;
        let mut fleecing = Self {
            parent,
            path: folder_path,
            name: name.to_owned(),
            images: Vec::new(),
            peak: AtomicU64::new(0),
        };
        if let Err(source) = fleecing.fill(sizes, format) {
            let _ = fleecing.remove();
            let size = sizes.iter().copied().max().unwrap_or_default();
            return Err(match source.kind() {
                io::ErrorKind::FileTooLarge => FleecingError::FileTooLarge {
                    folder: path.to_owned(),
                    size,
                },
                _ => io(source),
            });
        }
        Ok(fleecing)
    }

    fn fill(&mut self, sizes: &[u64], format: FleecingFormat) -> io::Result<()> {
        let folder = self.parent.open_dir(&self.name)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        for (index, &size) in sizes.iter().enumerate() {
            let name = match format {
                FleecingFormat::Raw => format!("disk{index}.raw"),
                FleecingFormat::Qcow2 => format!("disk{index}.qcow2"),
            };
            let file = folder.open_with(&name, &options)?;
            if format == FleecingFormat::Raw {
                file.set_len(size)?;
            }
            self.images.push((self.path.join(name), file));
        }
        Ok(())
    }

    /// Absolute paths and the files, in the order of the sizes.
    pub fn images(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.images
            .iter()
            .map(|(path, file)| (path.as_path(), file))
    }

    /// The job's folder, absolute.
    pub fn folder(&self) -> &Path {
        &self.path
    }

    /// Where the NBD server's socket goes.
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Most bytes that the images were seen to take up at once. What is given back meanwhile makes room again.
    pub fn peak(&self) -> u64 {
        self.allocated();
        self.peak.load(Ordering::Relaxed)
    }

    /// Bytes that the images take up now.
    pub fn allocated(&self) -> u64 {
        use cap_std::fs::MetadataExt;
        let allocated = self
            .images
            .iter()
            .filter_map(|(_, file)| file.metadata().ok())
            .map(|meta| meta.blocks() * 512)
            .sum();
        self.peak.fetch_max(allocated, Ordering::Relaxed);
        allocated
    }

    /// Waits until the file system is nearly full, or a bound is passed.
    pub async fn given_up(&self, bounds: Bounds) -> GivenUp {
        let since = Instant::now();
        loop {
            let allocated = self.allocated();
            if let Some(limit) = bounds.bytes.filter(|limit| allocated > limit.0) {
                return GivenUp::TooLarge { allocated, limit };
            }
            let held = since.elapsed().as_secs();
            if let Some(limit) = bounds.seconds.filter(|limit| held >= limit.0) {
                return GivenUp::TooLong { limit };
            }
            if let Ok(available) = available(&self.parent)
                && available < RESERVE
            {
                return GivenUp::NearlyFull { available };
            }
            sleep(LOOK).await;
        }
    }

    /// Whether the guest's next writes may need the last room.
    pub fn is_nearly_full(&self) -> bool {
        available(&self.parent).is_ok_and(|available| available < RESERVE)
    }

    /// Fails where the storage below lost what QEMU wrote there.
    pub fn sync(&self) -> io::Result<()> {
        self.images
            .iter()
            .try_for_each(|(_, file)| file.sync_data())
    }

    /// Makes an empty file for the disk `name`, the `index`th, that QEMU is to mount its snapshot over, and a file with
    /// `regions` beside it.
    pub fn add_virtual_file(
        &self,
        name: &str,
        index: u16,
        regions: &[u8],
    ) -> io::Result<VirtualFile> {
        let mut private = DirBuilder::new();
        private.mode(0o700);
        let folder = self.parent.open_dir(&self.name)?;
        match folder.create_dir_with(FILES, &private) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let stem = match name.bytes().all(plain) && name.len() <= 100 && !name.starts_with('.') {
            true => name.to_owned(),
            // A path in QEMU's tree, say.
            false => format!("disk {index}"),
        };
        let files = folder.open_dir(FILES)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        files.open_with(format!("{stem}.raw"), &options)?;
        let mut beside = files.open_with(format!("{stem}.dirty.json"), &options)?;
        beside.write_all(regions)?;
        let path = self.path.join(FILES);
        Ok(VirtualFile {
            path: path.join(format!("{stem}.raw")),
            regions: path.join(format!("{stem}.dirty.json")),
        })
    }

    /// Deletes the images, to give their room back. What cannot be deleted is left to [`Fleecing::remove`].
    ///
    /// Each is closed first: on NFS, and on most file systems of FUSE, what is deleted while it is open keeps a name of its
    /// own in the folder.
    pub fn remove_images(&mut self) {
        for (path, file) in self.images.drain(..) {
            drop(file);
            if let Some(name) = path.file_name() {
                let _ = self.parent.remove_file(Path::new(&self.name).join(name));
            }
        }
    }

    /// Deletes everything.
    pub fn remove(&mut self) -> io::Result<()> {
        self.remove_images();
        remove_folder(&self.parent, &self.name).map(drop)
    }
}

/// A disk as a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualFile {
    /// Its absolute path.
    pub path: PathBuf,
    /// Of a file that tells its dirty regions.
    pub regions: PathBuf,
}

/// In a job's folder, where its disks are files.
const FILES: &str = "files";

/// Deletes the folder of a job below `parent`, and says whether it was there. What a QEMU that was killed left mounted
/// in it is unmounted.
pub fn remove_folder(parent: &Dir, name: &str) -> io::Result<bool> {
    if let Ok(entries) = parent.read_dir(Path::new(name).join(FILES)) {
        for entry in entries.flatten() {
            unmount(parent, &Path::new(name).join(FILES).join(entry.file_name()));
        }
    }
    match parent.remove_dir_all(name) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Where it is a mount; deleting it says what is wrong if it still is.
fn unmount(parent: &Dir, path: &Path) {
    let path = Path::new("/proc/self/fd")
        .join(parent.as_raw_fd().to_string())
        .join(path);
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    if umount2(&path, flags) == Err(Errno::EPERM)
        && let Ok(path) = std::fs::canonicalize(path.parent().unwrap_or(&path))
            .map(|folder| folder.join(path.file_name().unwrap_or_default()))
    {
        // A user's mounts are its helper's to undo.
        let _ = Command::new("fusermount3")
            .args(["-u", "-z", "-q"])
            .arg(path)
            .stderr(Stdio::null())
            .status();
    }
}

/// Bytes to begin with for a disk of `size` bytes of which `held` are neither holes nor given back at once: no more old
/// data can be kept than that.
pub fn room(size: u64, held: u64) -> u64 {
    (size / SHARE).min(held)
}

/// Whether `folder`, of that path, has `room` bytes and what is left free at least.
///
/// # Errors
/// [`FleecingError::TooSmall`], or where it cannot be asked.
pub fn check_room(folder: &Dir, path: &Path, room: u64) -> Result<(), FleecingError> {
    let needed = room.saturating_add(RESERVE);
    let available = available(folder).map_err(|source| FleecingError::Io {
        folder: path.to_owned(),
        source,
    })?;
    if available >= needed {
        return Ok(());
    }
    Err(FleecingError::TooSmall {
        folder: path.to_owned(),
        available,
        needed,
    })
}

fn available(folder: &Dir) -> io::Result<u64> {
    let stat = rustix::fs::fstatvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parent(path: &Path) -> Dir {
        Dir::open_ambient_dir(path, cap_std::ambient_authority()).unwrap()
    }

    #[test]
    fn images_are_sparse_exact_private_and_go_away() {
        let path = tempfile::tempdir().unwrap();
        let mut fleecing = Fleecing::create(
            parent(path.path()),
            path.path(),
            "fbx-1",
            &[1 << 20, 12345 * 512],
            0,
            FleecingFormat::Raw,
        )
        .unwrap();
        let lengths: Vec<u64> = fleecing
            .images()
            .map(|(image, _)| std::fs::metadata(image).unwrap().len())
            .collect();
        assert_eq!(lengths, [1 << 20, 12345 * 512]);
        assert_eq!(fleecing.allocated(), 0);
        fleecing.sync().unwrap();
        fleecing.remove().unwrap();
        assert_eq!(std::fs::read_dir(path.path()).unwrap().count(), 0);
        fleecing.remove().unwrap();
    }

    #[test]
    fn a_file_system_without_room_is_refused() {
        let path = tempfile::tempdir().unwrap();
        let error = Fleecing::create(
            parent(path.path()),
            path.path(),
            "fbx-1",
            &[u64::MAX],
            room(u64::MAX, u64::MAX),
            FleecingFormat::Raw,
        )
        .unwrap_err();
        assert!(matches!(error, FleecingError::TooSmall { .. }), "{error}");
        assert_eq!(std::fs::read_dir(path.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_thin_disk_needs_no_more_room_than_it_holds() {
        let tib = 1 << 40;
        assert_eq!(room(20 * tib, 8 << 20), 8 << 20);
        assert_eq!(room(tib, tib), tib / SHARE);
    }
}
