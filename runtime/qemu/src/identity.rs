//! Which file of this host an image is, looked at without opening it.
//!
//! A path says little: QEMU may see other files by it, and keeps the old one open where another takes its place. So a
//! file is looked at as QEMU's own process sees it, and counts only if that process has it open, wherever this host
//! lets us see that.

use super::monitor::Monitor;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Begins the name that QEMU gives to a descriptor that it was handed; the number says nothing of the file.
const DESCRIPTOR: &str = "/dev/fdset/";

/// What tells a file from any other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// A file.
    File {
        /// Within its file system.
        inode: u64,
        /// When the inode was made, in nanoseconds since 1970, where the file system keeps that: inodes are used again.
        born: Option<i64>,
        /// In bytes.
        length: u64,
        /// When it was last written, in nanoseconds since 1970.
        modified: i64,
    },
    /// A block device.
    Device {
        /// What stays the same over restarts of the host, where it has such a thing.
        id: Option<String>,
    },
    /// It is no file of this host's, or cannot be seen from here: its name is all that is known.
    Unseen,
    /// Not even its name tells it from others.
    Unknown,
}

/// Which file each of `names` is to the QEMU that listens on the monitor's socket.
pub(super) async fn identities(
    monitor: &Monitor,
    names: BTreeSet<String>,
) -> BTreeMap<String, Identity> {
    let process = monitor.peer();
    // Storage that hangs must not keep the job from being told to end.
    let looked = tokio::task::spawn_blocking(move || {
        let files = OpenFiles::of(process);
        let identity = |name: String| (files.identity(&name), name);
        let looked = names.into_iter().map(identity);
        looked.map(|(identity, name)| (name, identity)).collect()
    });
    looked.await.unwrap_or_default()
}

/// The files that a QEMU has open.
#[derive(Debug, Default)]
struct OpenFiles {
    /// Its process's folder in `/proc`.
    process: Option<PathBuf>,
    open: BTreeSet<Opened>,
}

/// What the kernel knows an open file by.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Opened {
    File { device: u64, inode: u64 },
    Device { number: u64 },
}

impl Opened {
    fn of(file: &Metadata) -> Self {
        match file.file_type().is_block_device() {
            // By whichever of its names.
            true => Self::Device {
                number: file.rdev(),
            },
            false => Self::File {
                device: file.dev(),
                inode: file.ino(),
            },
        }
    }
}

impl OpenFiles {
    /// Nothing is known of them where the process is none of QEMU's, or one that we may not look into: then a path is
    /// taken as it is.
    fn of(process: Option<i32>) -> Self {
        let process = process.map(|pid| PathBuf::from(format!("/proc/{pid}")));
        process.and_then(Self::of_process).unwrap_or_default()
    }

    fn of_process(process: PathBuf) -> Option<Self> {
        let program = fs::read_link(process.join("exe")).ok()?;
        let program = program.file_name()?.to_str()?;
        if !program.starts_with("qemu-") && program != "kvm" {
            return None;
        }
        let descriptors = fs::read_dir(process.join("fd")).ok()?;
        let open = descriptors
            .filter_map(|entry| fs::metadata(entry.ok()?.path()).ok())
            .map(|file| Opened::of(&file))
            .collect();
        Some(Self {
            process: Some(process),
            open,
        })
    }

    /// Which file it is that QEMU has open by the name `name`.
    fn identity(&self, name: &str) -> Identity {
        // With options beside it.
        let options = name.strip_prefix("json:");
        let options = options.and_then(|json| serde_json::from_str::<Value>(json).ok());
        let given = options
            .as_ref()
            .and_then(|options| options["filename"].as_str());
        let name = given.unwrap_or(name);
        if name.starts_with(DESCRIPTOR) {
            return Identity::Unknown;
        }
        let path = match &self.process {
            None if name.starts_with('/') => PathBuf::from(name),
            // Relative to a folder that nobody knows.
            None => return Identity::Unseen,
            Some(process) => match name.strip_prefix('/') {
                Some(name) => process.join("root").join(name),
                None => process.join("cwd").join(name),
            },
        };
        match fs::metadata(path) {
            Ok(file) if self.open.contains(&Opened::of(&file)) => identity_of(&file),
            // Another one has taken its place, or its name is gone.
            _ if self.process.is_some() => Identity::Unknown,
            Ok(file) => identity_of(&file),
            Err(_) => Identity::Unseen,
        }
    }
}

fn identity_of(file: &Metadata) -> Identity {
    if file.file_type().is_block_device() {
        return Identity::Device {
            id: device_id(file.rdev()),
        };
    }
    let since = |time: SystemTime| {
        let since = time.duration_since(UNIX_EPOCH).ok()?;
        i64::try_from(since.as_nanos()).ok()
    };
    Identity::File {
        inode: file.ino(),
        born: file.created().ok().and_then(since),
        length: file.len(),
        modified: file
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(file.mtime_nsec()),
    }
}

/// What the device-mapper, or the device itself, calls it.
fn device_id(number: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let folder = format!("/sys/dev/block/{major}:{minor}");
    ["dm/uuid", "wwid", "device/wwid"].iter().find_map(|name| {
        let id = fs::read_to_string(Path::new(&folder).join(name)).ok()?;
        Some(id.trim().to_owned()).filter(|id| !id.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> OpenFiles {
        OpenFiles::default()
    }

    #[test]
    fn a_file_is_itself_under_another_name_and_after_a_write_and_a_copy_in_its_place_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        fs::write(at("a"), "one").unwrap();
        let Identity::File { inode, born, .. } = here().identity(&at("a")) else {
            panic!("a file is seen as one");
        };
        fs::rename(at("a"), at("b")).unwrap();
        fs::write(at("b"), "longer").unwrap();
        let same = |identity| matches!(identity, Identity::File { inode: i, born: b, .. } if (i, b) == (inode, born));
        assert!(same(here().identity(&at("b"))));
        fs::copy(at("b"), at("copy")).unwrap();
        assert!(!same(here().identity(&at("copy"))));
        assert_eq!(here().identity(&at("a")), Identity::Unseen);
    }

    #[test]
    fn a_descriptors_number_and_a_file_that_is_not_open_say_nothing() {
        assert_eq!(here().identity("/dev/fdset/3"), Identity::Unknown);
        assert_eq!(here().identity("relative.qcow2"), Identity::Unseen);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        fs::write(&file, "one").unwrap();
        let name = file.display().to_string();
        let process = PathBuf::from("/proc/self");
        let without = OpenFiles {
            process: Some(process.clone()),
            open: BTreeSet::new(),
        };
        assert_eq!(without.identity(&name), Identity::Unknown);
        let metadata = fs::metadata(&file).unwrap();
        let with = OpenFiles {
            process: Some(process),
            open: [Opened::of(&metadata)].into(),
        };
        assert!(matches!(
            with.identity(&name),
            Identity::File { length: 3, .. }
        ));
    }
}
