//! The VM as its monitor shows it: its disks, and whether it runs.
//!
//! Look for leftovers first ([`super::leftovers`]): a filter that a dead job left above a disk would be
//! taken for the disk's own node.

use super::image::{Image, Layer};
use super::monitor::{Monitor, MonitorError};
use super::present::{self, DirtyInfo, Node};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

pub use super::disks::{below_limits, disks, extra};

/// Which disks to take.
#[derive(Debug, Clone)]
pub enum Choice {
    /// Every writable disk that is plugged into a device.
    All,
    /// As [`Choice::All`], but these, named as in [`Choice::Named`].
    AllBut(Vec<String>),
    /// The first as in [`Choice::Named`], without the second.
    NamedBut(Vec<String>, Vec<String>),
    /// These, each named by the id of its device, of its drive or of its block node. A name that means two disks means
    /// none.
    Named(Vec<String>),
}

/// A disk that can be backed up.
#[derive(Debug, Clone, PartialEq)]
pub struct Disk {
    /// Stable across restarts of the VM: the id of the device such as `scsi0`, else of the drive such
    /// as `drive-scsi0`, else of the node.
    pub name: String,
    /// The block node on which bitmaps, filter and exports work.
    pub node: String,
    /// In bytes, as the guest sees it.
    pub size: u64,
    /// The node's driver, such as `raw` or `qcow2`.
    pub format: String,
    /// The image as QEMU names it: a path as QEMU sees it, a URI, or `json:{…}`. To be shown, not opened.
    pub filename: String,
    /// All named bitmaps on the node, also other people's.
    pub bitmaps: Vec<Bitmap>,
    /// Whether a bitmap can be stored in the image, so that it survives a restart of the VM.
    pub can_persist: bool,
    /// Whether it cannot be written to: no bitmap can be added, and none is needed.
    pub read_only: bool,
    /// What the node shows: the image that the guest writes to. Its file is known once [`super::image::describe`] looked.
    pub image: Image,
    /// What that image builds on, in this order, once that was looked at.
    pub below: Vec<Layer>,
    /// Whether others may write to it too, by its device's own word, once that was asked.
    pub shared: bool,
}

impl Disk {
    /// The bitmap of that name.
    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }

    /// The layers right below the image whose bitmaps of that name can be added to its own: as many as there are in a
    /// row.
    pub fn carriers(&self, name: &str) -> impl Iterator<Item = (&Layer, &Bitmap)> {
        self.below.iter().map_while(move |layer| {
            let bitmap = layer.bitmap(name)?;
            let fits = layer.image.size == self.size && bitmap.usable().is_ok();
            fits.then_some((layer, bitmap))
        })
    }

    /// What the bitmap of that name calls dirty, in bytes, with those of the layers below that are added to it: at most
    /// this much is read by it.
    pub fn dirty(&self, name: &str) -> Option<u64> {
        let own = self.bitmap(name)?.dirty;
        let below = self.carriers(name).map(|(_, bitmap)| bitmap.dirty);
        // Bits stand for whole blocks, the last of which may reach past the end.
        Some(below.fold(own, u64::saturating_add).min(self.size))
    }
}

/// A dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique on its node.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u32,
    /// Bytes that it calls dirty.
    pub dirty: u64,
    /// Whether it still follows writes.
    pub recording: bool,
    /// Whether an export or a job uses it.
    pub busy: bool,
    /// Whether it is stored in the image when QEMU closes it.
    pub persistent: bool,
    /// QEMU was killed while it was open: it can only be removed.
    pub inconsistent: bool,
}

impl Bitmap {
    /// Whether an incremental backup may rely on it now.
    ///
    /// # Errors
    /// Why not.
    pub fn usable(&self) -> Result<(), Unusable> {
        if self.inconsistent {
            Err(Unusable::Inconsistent)
        } else if self.busy {
            Err(Unusable::Busy)
        } else if !self.recording {
            Err(Unusable::NotRecording)
        } else {
            Ok(())
        }
    }
}

/// Why a bitmap cannot be the base of an incremental backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// The disk has no such bitmap.
    #[error("it is missing")]
    Missing,
    /// QEMU ended without storing it.
    #[error("QEMU ended without storing it")]
    Inconsistent,
    /// An export or a job uses it.
    #[error("something else is using it")]
    Busy,
    /// It does not follow writes any more, so some may be missing in it.
    #[error("it stopped following writes")]
    NotRecording,
}

/// A device that [`Choice::All`] leaves out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// As [`Disk::name`].
    pub name: String,
    /// Why.
    pub reason: SkipReason,
}

/// Why a device cannot or need not be backed up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SkipReason {
    /// Nothing is inserted.
    #[error("it holds no medium")]
    NoMedium,
    /// The guest cannot write to it.
    #[error("it is read-only")]
    ReadOnly,
    /// It has no bytes.
    #[error("it is empty")]
    Empty,
    /// A drive that no device uses.
    #[error("no device uses it")]
    Unattached,
}

/// The disks that were chosen, and what was left out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Disks {
    /// In QEMU's order, or in the order of the names given. One that several devices have is there once.
    pub disks: Vec<Disk>,
    /// Empty where disks were named.
    pub skipped: Vec<Skipped>,
    /// Further devices that have one of the disks, each with the name under which it is taken.
    pub doubles: Vec<(String, String)>,
    /// Disks of the VM that were not chosen.
    pub others: Vec<Other>,
    /// All names of each disk, by its block node.
    pub names: BTreeMap<String, Vec<String>>,
}

/// A disk of the VM that was not chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// As [`Disk::name`].
    pub name: String,
    /// Its block node, where it has one.
    pub node: Option<String>,
    /// Whether it was excluded by name.
    pub excluded: bool,
    /// Its device's type, where QEMU's block layer does not have the disk, so that it cannot be chosen.
    pub beside: Option<String>,
}

/// Why the VM's disks cannot be taken as chosen.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// No device holds a writable disk, as in `qemu-storage-daemon`.
    #[error("no device holds a writable disk; disks can be chosen by node name, of {}", List(.available))]
    NoDisks {
        /// Names that can be chosen.
        available: Vec<String>,
    },
    /// No disk has that name.
    #[error("there is no disk {name}; there is {}", List(.available))]
    Unknown {
        /// The name given.
        name: String,
        /// Names that can be chosen.
        available: Vec<String>,
    },
    /// A disk that was named cannot be backed up.
    #[error("disk {name} cannot be backed up")]
    Unfit {
        /// The name given.
        name: String,
        /// Why.
        #[source]
        reason: SkipReason,
    },
    /// One word is the name of two disks.
    #[error(
        "the name {name} means two disks: {first}, and {second}; name the one that is meant by another of its names"
    )]
    Ambiguous {
        /// The name given.
        name: String,
        /// One that has it.
        first: String,
        /// Another.
        second: String,
    },
    /// The device's disk is none of QEMU's block layer.
    #[error("disk {name} cannot be backed up: {}", beside_words(.driver))]
    Beside {
        /// The name given.
        name: String,
        /// The device's type.
        driver: String,
    },
    /// Two of the chosen disks are one, or have one name.
    #[error("disk {name} (node {node}) is chosen twice")]
    Twice {
        /// The second one's name.
        name: String,
        /// The second one's node.
        node: String,
    },
    /// The VM is in a state in which its disks are not its own.
    #[error("the VM is in the state {status}: {reason}")]
    State {
        /// QEMU's word.
        status: String,
        /// What it means.
        reason: &'static str,
    },
    /// The device hands SCSI commands to the host's device, around QEMU's block layer.
    #[error(
        "disk {name} is a {driver} device: its writes pass around dirty bitmaps and snapshots, so it cannot be backed up; exclude it, or name the other disks, to leave it out"
    )]
    PassThrough {
        /// The disk.
        name: String,
        /// The device's driver.
        driver: String,
    },
}

struct List<'a>(&'a [String]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("none"),
            names => f.write_str(&names.join(", ")),
        }
    }
}

/// Why the disk of such a device cannot be backed up.
pub fn beside_words(driver: &str) -> String {
    format!(
        "it is a {driver} device, whose disk is not in QEMU's block layer, so that QEMU can neither freeze it nor track its writes"
    )
}

pub(super) fn fitness(node: Option<&Node>) -> Result<&Node, SkipReason> {
    match node {
        None => Err(SkipReason::NoMedium),
        Some(node) if node.read_only => Err(SkipReason::ReadOnly),
        Some(node) if node.image.virtual_size == 0 => Err(SkipReason::Empty),
        Some(node) => Ok(node),
    }
}

pub(super) fn disk(name: String, node: &Node) -> Disk {
    // A qcow2 of version 2 ("compat": "0.10") has no room for bitmaps.
    let compat = &node.image.format_specific["data"]["compat"];
    Disk {
        name,
        node: node.name.clone(),
        size: node.image.virtual_size,
        format: node.driver.clone(),
        filename: node.filename.clone(),
        bitmaps: bitmaps(node),
        can_persist: node.driver == "qcow2" && compat != "0.10",
        read_only: node.read_only,
        image: Image::of(node),
        below: Vec::new(),
        shared: false,
    }
}

/// The named bitmaps of a node.
pub(super) fn bitmaps(node: &Node) -> Vec<Bitmap> {
    let named = node.bitmaps.iter().filter(|bitmap| !bitmap.name.is_empty());
    named
        .map(|bitmap: &DirtyInfo| Bitmap {
            name: bitmap.name.clone(),
            granularity: bitmap.granularity,
            dirty: bitmap.count,
            recording: bitmap.recording,
            busy: bitmap.busy,
            persistent: bitmap.persistent,
            inconsistent: bitmap.inconsistent,
        })
        .collect()
}

/// The id that the user gave to a device. QEMU shows it plain, or as the path of the device or of a
/// part of it (`/machine/peripheral/vda/virtio-backend`); devices without an id live elsewhere in the tree.
pub(super) fn qdev_id(qdev: &str) -> Option<&str> {
    if !qdev.starts_with('/') {
        return Some(qdev).filter(|id| !id.is_empty());
    }
    let id = qdev.strip_prefix("/machine/peripheral/")?.split('/').next();
    id.filter(|id| !id.is_empty())
}

/// Where a device is in QEMU's tree: QEMU shows its id, or its path.
pub(super) fn qdev_path(qdev: &str) -> String {
    match qdev.starts_with('/') {
        true => qdev.into(),
        false => format!("/machine/peripheral/{qdev}"),
    }
}

/// Whether the device lets others write to its disk, as disks of a cluster are.
pub(super) async fn is_shared(monitor: &Monitor, qdev: &str) -> Result<bool, MonitorError> {
    let arguments = json!({ "path": qdev_path(qdev), "property": "share-rw" });
    match monitor.query("qom-get", arguments).await {
        Ok(shared) => Ok(shared),
        // One that does not know the word does not do it.
        Err(e) if e.is_refusal() => Ok(false),
        Err(e) => Err(e),
    }
}

/// One disk under two names, or two under one, cannot be told apart in a backup.
///
/// # Errors
/// [`MachineError::Twice`].
pub fn refuse_doubles(disks: &[Disk]) -> Result<(), MachineError> {
    let (mut names, mut nodes) = (BTreeSet::new(), BTreeSet::new());
    for disk in disks {
        if !names.insert(&disk.name) | !nodes.insert(&disk.node) {
            return Err(MachineError::Twice {
                name: disk.name.clone(),
                node: disk.node.clone(),
            });
        }
    }
    Ok(())
}

/// Whether the guest's CPUs run, and QEMU's word for its state, such as `running` or `paused`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct RunState {
    /// Whether the CPUs run.
    pub running: bool,
    /// QMP's `RunState`, or a word that a later version invents.
    pub status: String,
}

/// What a VM's state means for its backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Its CPUs run: the guest's agent can be asked, and who stops it has to continue it.
    Runs,
    /// Its CPUs stand still and stay so. No agent answers.
    Still,
}

impl RunState {
    /// Whether the disks of a VM in this state can be backed up, and how (QMP `RunState`).
    ///
    /// # Errors
    /// [`MachineError::State`] where another QEMU has the disks, or the state is about to change them.
    pub fn standing(&self) -> Result<Standing, MachineError> {
        let reason = match self.status.as_str() {
            "inmigrate" => {
                "it waits for a migration to come in, and its disks still belong to the source; back it up there, or once it has arrived"
            }
            "postmigrate" => {
                "it was migrated away, and its disks belong to the destination; back it up there"
            }
            "finish-migrate" => "its migration is being finished; try again once it is over",
            "colo" => "its disks are replicated by COLO; back up the other side's",
            "save-vm" | "restore-vm" => {
                "a snapshot of the whole VM is being saved or loaded; try again once it is over, or, where that failed, once the VM was continued"
            }
            _ if self.running => return Ok(Standing::Runs),
            _ => return Ok(Standing::Still),
        };
        Err(MachineError::State {
            status: self.status.clone(),
            reason,
        })
    }

    /// Whether a failed request of one of its disks stopped it.
    pub fn is_io_error(&self) -> bool {
        self.status == "io-error"
    }
}

/// Bytes that the image of node `name` holds at most, where QEMU knows.
///
/// # Errors
/// Those of [`Monitor::query`].
pub async fn held(monitor: &Monitor, name: &str) -> Result<Option<u64>, MonitorError> {
    present::held(monitor, name).await
}

/// Asks for the run state (QMP `query-status`); nothing where there is no VM, as in `qemu-storage-daemon`.
///
/// # Errors
/// Those of [`Monitor::query`].
pub async fn run_state(monitor: &Monitor) -> Result<Option<RunState>, MonitorError> {
    match monitor.query("query-status", json!({})).await {
        Ok(state) => Ok(Some(state)),
        Err(e) if e.is_unknown_command() => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_device_has_the_id_that_its_user_gave() {
        assert_eq!(qdev_id("scsi0"), Some("scsi0"));
        assert_eq!(
            qdev_id("/machine/peripheral/vda/virtio-backend"),
            Some("vda")
        );
        assert_eq!(qdev_id("/machine/peripheral/vda"), Some("vda"));
        assert_eq!(qdev_id("/machine/peripheral-anon/device[1]"), None);
        assert_eq!(qdev_id("/machine/system.flash1"), None);
        assert_eq!(qdev_id(""), None);
    }

    /// Every word of QMP's `RunState` in QEMU 10.0, and one that it does not have.
    #[test]
    fn each_state_is_taken_or_refused_by_its_name() {
        let standing = |status: &str| {
            let running = status == "running";
            RunState {
                running,
                status: status.into(),
            }
            .standing()
        };
        assert_eq!(standing("running").unwrap(), Standing::Runs);
        for still in "debug internal-error io-error paused prelaunch shutdown suspended watchdog guest-panicked new-word".split(' ') {
            assert_eq!(standing(still).unwrap(), Standing::Still, "{still}");
        }
        for refused in "inmigrate postmigrate finish-migrate colo save-vm restore-vm".split(' ') {
            let error = standing(refused).unwrap_err().to_string();
            assert!(error.contains(refused), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_path_makes_the_parser_panic(text: String, tail in "(/machine/peripheral/)?[a-z/]{0,9}") {
            for path in [&text, &tail] {
                prop_assert!(qdev_id(path).is_none_or(|id| !id.is_empty() && path.contains(id)));
            }
        }
    }
}
