//! Proxmox's QEMU: the point in time by its backup-access API, which puts copy-before-write filters over the disks by
//! itself and breaks a snapshot rather than the guest's writes.
//!
//! The tracking stays ours. QEMU's own keeps one bitmap per target and clears it in place, so that its name cannot say
//! which backup it is since, and it makes clean blocks unreadable, which could then not be compared with the base. So
//! each device is asked for without a bitmap, ours are added before the set-up and stopped after it: a write between
//! these two is in both, and none is in neither.

use super::ids::JobId;
use super::machine::Disk;
use super::monitor::{Monitor, MonitorError};
use super::present;
use super::schema::Schema;
use serde::Deserialize;
use serde_json::json;
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
    /// QEMU refused.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

impl AccessError {
    /// Whether another form of the point in time, or other names, would do.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::Missing | Self::Name { .. })
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
    if !schema.has_command("query-proxmox-support") || !schema.has_command(SETUP) {
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
    let mut arguments = json!({ "target-id": target(job) });
    if schema.command_has_argument(SETUP, "devices") {
        let device = |(_, device): &(_, String)| json!({ "device": device, "bitmap-mode": "none" });
        arguments["devices"] = disks.iter().map(device).collect();
    } else {
        // The older form, in which no bitmap is used unless one is named.
        let names: Vec<_> = disks.iter().map(|(_, device)| device.as_str()).collect();
        arguments["devlist"] = json!(names.join(","));
    }
    let mut infos: Vec<Info> = monitor.query(SETUP, arguments).await?;
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
        Err(error) => vec![format!("QEMU does not tell of its bitmaps: {error}")],
    }
}

/// Takes down what was set up for `target`; nothing of it being there is no error.
///
/// `success` is about QEMU's own bitmaps, of which there is none.
pub(super) async fn tear_down(monitor: &Monitor, target: &str) -> Result<(), MonitorError> {
    let arguments = json!({ "target-id": target, "success": false });
    let done = monitor
        .execute_raw("backup-access-teardown", arguments)
        .await;
    match done {
        // Another backup's, which is not ours to end: so ours is gone. Or a QEMU that never had it.
        Err(MonitorError::Refused {
            class, description, ..
        }) if class == "CommandNotFound" || description.contains("got target") => Ok(()),
        done => done.map(drop),
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
