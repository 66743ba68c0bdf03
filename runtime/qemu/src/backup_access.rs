//! Proxmox's QEMU: the point in time by its backup-access API, which puts copy-before-write filters over the disks by
//! itself and breaks a snapshot rather than the guest's writes.
//!
//! The tracking stays ours. QEMU's own keeps one bitmap per target and clears it in place, so that its name cannot say
//! which backup it is since, and it makes clean blocks unreadable, which could then not be compared with the base. So
//! each device is asked for without a bitmap, ours are added before the set-up and stopped after it: a write between
//! these two is in both, and none is in neither.

use super::ids::JobId;
use super::machine::{self, Disk};
use super::monitor::{Monitor, MonitorError};
use super::present;
use super::removal::Reason;
use super::schema::Schema;
use fleecebox_contract::with_causes;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeSet;
use std::fmt;

/// Why there is no point in time by this API.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// It is not Proxmox's QEMU, or an old one.
    #[error("this QEMU does not offer Proxmox's backup-access API; use the form `job` or `filter`")]
    Missing,
    /// QEMU looks for the fleecing image by a node name that cannot be given.
    #[error(
        "the fleecing image of {device} would be the block node {device}-fleecing, which has more than {most} characters",
        most = super::ids::NODE_NAME_MAX
    )]
    Name {
        /// As QEMU calls the disk.
        device: String,
    },
    /// QEMU answered with other disks than it was asked for.
    #[error("QEMU was asked for the disk {disk} ({device}) and {found}")]
    Answer {
        /// The disk.
        disk: String,
        /// As QEMU calls it.
        device: String,
        /// What it did.
        found: String,
    },
    /// There is nothing to set up.
    #[error("there is no disk to set up backup access for")]
    NoDisks,
    /// QEMU serves one backup at a time, whoever's.
    #[error(
        "another backup of this VM is under way in QEMU, which by backup-access does one at a time ({reason}); wait for it, or use the form `job`"
    )]
    Busy {
        /// What shows it.
        reason: String,
    },
    /// QEMU gave up half-way, and does not take back what it had done.
    #[error(
        "QEMU left of it {nodes}, which stays until the VM is started anew (the form `job` leaves nothing)"
    )]
    Left {
        /// Nodes.
        nodes: String,
        /// What QEMU said.
        source: MonitorError,
    },
    /// QEMU refused.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

impl AccessError {
    /// Whether another form of the point in time, or other names, would do.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::Missing | Self::Name { .. })
    }

    /// Whether it may work later.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}

/// What QEMU did about its own bitmap of a target (`PBSBitmapAction` of its qapi/block-core.json).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum BitmapAction {
    /// There is none, and none was asked for.
    NotUsed,
    /// None was asked for, and one that was there is gone.
    NotUsedRemoved,
    /// One was added.
    New,
    /// One was there, and says what changed.
    Used,
    /// One was there that did not fit; it was made anew.
    Invalid,
    /// One was asked for that was not there; it was made anew.
    MissingRecreated,
}

/// What an action means for who reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tracked {
    /// Nothing by QEMU.
    None,
    /// From now on; everything is to be read.
    New,
    /// What changed is known.
    Reuse,
}

impl BitmapAction {
    /// What it means.
    pub(super) fn tracked(self) -> Tracked {
        match self {
            Self::NotUsed | Self::NotUsedRemoved => Tracked::None,
            Self::New | Self::Invalid | Self::MissingRecreated => Tracked::New,
            Self::Used => Tracked::Reuse,
        }
    }
}

impl fmt::Display for BitmapAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotUsed => "QEMU's own tracking is not used",
            Self::NotUsedRemoved => {
                "QEMU's own tracking is not used, and an old bitmap was removed"
            }
            Self::New => "QEMU made a new bitmap",
            Self::Used => "QEMU's own bitmap is used",
            Self::Invalid => "QEMU's own bitmap did not fit and was made anew",
            Self::MissingRecreated => "QEMU's own bitmap was missing and was made anew",
        })
    }
}

/// Whether this QEMU has the API (`query-proxmox-support`).
pub(super) async fn is_offered(monitor: &Monitor, schema: &Schema) -> Result<bool, MonitorError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Support {
        #[serde(default)]
        backup_access_api: bool,
    }
    // A form of it with other arguments was never in a package.
    if !schema.has_command("query-proxmox-support")
        || !schema.command_has_argument(SETUP, "devices")
    {
        return Ok(false);
    }
    let support: Support = monitor.query("query-proxmox-support", json!({})).await?;
    Ok(support.backup_access_api)
}

const SETUP: &str = "backup-access-setup";

/// What the job's part in QEMU is called: one at a time per VM.
pub(super) fn target(job: JobId) -> String {
    format!("fleecebox-{job}")
}

/// How QEMU calls the disk there: by its drive where that has an id, else by its node.
pub(super) async fn device_of(monitor: &Monitor, disk: &Disk) -> Result<String, MonitorError> {
    let devices = present::devices(monitor).await?;
    let drive = devices.into_iter().find(|device| {
        let inserted = device.inserted.as_ref();
        !device.drive.is_empty() && inserted.is_some_and(|node| node.name == disk.node)
    });
    Ok(drive.map_or_else(|| disk.node.clone(), |device| device.drive))
}

/// Behind a device's name, the name of its fleecing image's node.
pub(super) const FLEECING: &str = "-fleecing";

/// The name by which QEMU looks for a device's fleecing image.
pub(super) fn fleecing_node(device: &str) -> Result<String, AccessError> {
    let name = format!("{device}{FLEECING}");
    match name.len() <= super::ids::NODE_NAME_MAX {
        true => Ok(name),
        false => Err(AccessError::Name {
            device: device.into(),
        }),
    }
}

/// Refuses where another program has attached an image by one of these names.
pub(super) async fn refuse_taken(
    monitor: &Monitor,
    fleecing: &[String],
) -> Result<(), AccessError> {
    let nodes = present::nodes(monitor).await?;
    let mut taken = nodes.into_iter().map(|node| node.name);
    match taken.find(|name| fleecing.contains(name)) {
        None => Ok(()),
        Some(name) => Err(AccessError::Busy {
            reason: format!("its fleecing image {name} is attached"),
        }),
    }
}

/// What was set up.
#[derive(Debug, Default)]
pub(super) struct Access {
    /// The nodes that read as of the point in time, in the order of the disks.
    pub(super) nodes: Vec<String>,
    /// What is worth telling.
    pub(super) notes: Vec<String>,
}

/// One entry of the answer (`BackupAccessInfo`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    node_name: String,
    device: String,
    size: u64,
    #[serde(default)]
    bitmap_action: Option<BitmapAction>,
}

/// Takes the point in time of these disks, each with QEMU's name for it.
pub(super) async fn set_up(
    monitor: &Monitor,
    schema: &Schema,
    job: JobId,
    disks: &[(&Disk, String)],
) -> Result<Access, AccessError> {
    // An empty list aborts QEMU.
    if disks.is_empty() {
        return Err(AccessError::NoDisks);
    }
    let device = |(_, device): &(_, String)| json!({ "device": device, "bitmap-mode": "none" });
    let devices: Vec<_> = disks.iter().map(device).collect();
    let arguments = json!({ "target-id": target(job), "devices": devices });
    let before = own_nodes(monitor).await?;
    let mut infos: Vec<Info> = match monitor.query(SETUP, arguments).await {
        Err(error) if error.is_refusal() => return Err(refused(monitor, &before, error).await),
        infos => infos?,
    };
    let mut access = Access::default();
    for (disk, device) in disks {
        let wrong = |found: String| AccessError::Answer {
            disk: disk.name.clone(),
            device: device.clone(),
            found,
        };
        let at = infos.iter().position(|info| info.device == *device);
        let info = at.map(|at| infos.swap_remove(at));
        let info = info.ok_or_else(|| wrong("gave nothing for it".into()))?;
        if info.size != disk.size {
            return Err(wrong(format!(
                "gave {} bytes of its {}",
                info.size, disk.size
            )));
        }
        if let Some(action) = info.bitmap_action {
            access.notes.push(format!("{}: {action}", disk.name));
            if action.tracked() != Tracked::None {
                return Err(wrong("tracks it by a bitmap that nobody asked for".into()));
            }
        }
        access.nodes.push(info.node_name);
    }
    access.notes.extend(bitmap_info(monitor, schema).await);
    Ok(access)
}

/// Why it was refused. What was set up by then for the first disks stays in QEMU, and no command removes it.
async fn refused(monitor: &Monitor, before: &[String], source: MonitorError) -> AccessError {
    if let MonitorError::Refused { description, .. } = &source
        && description.contains("previous backup")
    {
        return AccessError::Busy {
            reason: description.clone(),
        };
    }
    let mut left = own_nodes(monitor).await.unwrap_or_default();
    left.retain(|node| !before.contains(node));
    match &left[..] {
        [] => AccessError::Monitor(source),
        left => AccessError::Left {
            nodes: left.join(", "),
            source,
        },
    }
}

/// The nodes of the kinds that QEMU makes at a set-up.
async fn own_nodes(monitor: &Monitor) -> Result<Vec<String>, MonitorError> {
    let mut nodes = present::nodes(monitor).await?;
    nodes.retain(|node| ["copy-before-write", ACCESS].contains(&node.driver.as_str()));
    Ok(nodes.into_iter().map(|node| node.name).collect())
}

/// Driver of the nodes that read as of the point in time.
const ACCESS: &str = "snapshot-access";

/// What QEMU says of its bitmaps, for the log (`query-pbs-bitmap-info`); that it cannot be asked is no failure.
async fn bitmap_info(monitor: &Monitor, schema: &Schema) -> Vec<String> {
    #[derive(Deserialize)]
    struct Info {
        drive: String,
        action: BitmapAction,
        size: u64,
        dirty: u64,
    }
    const QUERY: &str = "query-pbs-bitmap-info";
    if !schema.has_command(QUERY) {
        return Vec::new();
    }
    let told = monitor.query::<Vec<Info>>(QUERY, json!({})).await;
    match told {
        Ok(infos) => infos
            .into_iter()
            .map(|info| {
                let Info {
                    drive,
                    action,
                    size,
                    dirty,
                } = info;
                format!("{drive}: {action}, {dirty} of {size} bytes dirty")
            })
            .collect(),
        Err(error) => vec![format!(
            "QEMU does not tell of its bitmaps: {}",
            with_causes(&error)
        )],
    }
}

/// What QEMU was asked to set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The job's name there.
    pub(super) target: String,
    /// The disks that it was set up for.
    disks: Vec<HeldDisk>,
}

/// A disk as it was before the set-up.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HeldDisk {
    /// The node of its fleecing image.
    fleecing: String,
    /// The nodes that it was made of; not known of a job that died.
    parts: Option<BTreeSet<String>>,
}

impl Held {
    /// Of what is about to be set up.
    pub(super) async fn of(
        monitor: &Monitor,
        job: JobId,
        disks: &[(&Disk, String)],
    ) -> Result<Self, AccessError> {
        let graph = present::graph(monitor).await?;
        let mut held = Self::of_dead(job);
        for (disk, device) in disks {
            let mut parts = graph.below(&disk.node);
            parts.insert(disk.node.clone());
            held.disks.push(HeldDisk {
                fleecing: fleecing_node(device)?,
                parts: Some(parts),
            });
        }
        Ok(held)
    }

    /// Of what a job that died left, before [`Held::add`].
    pub(super) fn of_dead(job: JobId) -> Self {
        Self {
            target: target(job),
            disks: Vec::new(),
        }
    }

    /// With the disk of that fleecing image.
    pub(super) fn add(&mut self, fleecing: String) {
        self.disks.push(HeldDisk {
            fleecing,
            parts: None,
        });
    }

    /// A disk that is not where it was: unplugged, so that no device has the filter any more, or moved, so that the
    /// filter is over other nodes.
    async fn lost(&self, monitor: &Monitor) -> Result<Option<&str>, MonitorError> {
        // Without a machine no disk has a device.
        if machine::run_state(monitor).await?.is_none() {
            return Ok(None);
        }
        let graph = present::graph(monitor).await?;
        let nodes = present::nodes(monitor).await?;
        let is_access = |name: &str| {
            let node = nodes.iter().find(|node| node.name == name);
            node.is_some_and(|node| node.driver == ACCESS)
        };
        let devices = present::devices(monitor).await?;
        for disk in &self.disks {
            let name = disk.fleecing.strip_suffix(FLEECING);
            let name = name.unwrap_or(&disk.fleecing);
            // By its drive, or by the node of that name in what the device has now.
            let has = |device: &present::Device| {
                let inserted = device.inserted.as_ref().map(|node| &*node.name);
                device.drive == name
                    || inserted == Some(name)
                    || inserted.is_some_and(|top| graph.is_below(name, top))
            };
            if !devices.iter().any(has) {
                return Ok(Some(name));
            }
            let Some(filter) = graph.users(&disk.fleecing, Some("target")).first().copied() else {
                continue;
            };
            let plugged = graph
                .users(filter, None)
                .into_iter()
                .any(|it| !is_access(it));
            let below = graph.below(filter);
            let moved = disk
                .parts
                .as_ref()
                .is_some_and(|parts| !parts.is_subset(&below));
            if !plugged || moved {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

/// Takes down what was set up; nothing of it being there is no error.
///
/// `success` is about QEMU's own bitmaps, of which there is none.
pub(super) async fn tear_down(monitor: &Monitor, held: &Held) -> Result<(), Reason> {
    // Versions before 10.1 abort when one of the disks is not there any more; later ones were seen not to.
    let schema = Schema::probe(monitor).await?;
    if !schema.command_has_argument("blockdev-backup", "on-cbw-error")
        && let Some(disk) = held.lost(monitor).await?
    {
        return Err(Reason::Unsafe(format!(
            "{disk} was unplugged or moved meanwhile, and this QEMU would abort; it stays until the VM is started anew"
        )));
    }
    let arguments = json!({ "target-id": held.target, "success": false });
    let done = monitor
        .execute_raw("backup-access-teardown", arguments)
        .await;
    match done {
        // Another backup's, which is not ours to end: so ours is gone. Or a QEMU that never had it.
        Err(MonitorError::Refused {
            class, description, ..
        }) if class == "CommandNotFound" || description.contains("got target") => Ok(()),
        done => Ok(done.map(drop)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_action_is_read_and_means_what_its_makers_say() {
        for (word, tracked) in [
            ("not-used", Tracked::None),
            ("not-used-removed", Tracked::None),
            ("new", Tracked::New),
            ("used", Tracked::Reuse),
            ("invalid", Tracked::New),
            ("missing-recreated", Tracked::New),
        ] {
            let action: BitmapAction = serde_json::from_value(json!(word)).unwrap();
            assert_eq!(action.tracked(), tracked, "{word}");
            assert!(!action.to_string().is_empty());
        }
    }

    #[test]
    fn a_fleecing_node_that_qemu_cannot_name_is_refused() {
        assert_eq!(
            fleecing_node("drive-scsi0").unwrap(),
            "drive-scsi0-fleecing"
        );
        assert!(fleecing_node(&"d".repeat(23)).is_err());
    }
}
