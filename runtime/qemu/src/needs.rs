//! What a point in time needs of a QEMU, asked before anything is done to it: found out later, the guest would have been
//! frozen for nothing.

use super::machine::Disk;
use super::monitor::{Monitor, MonitorError};
use super::present;
use super::schema::Schema;
use serde::Deserialize;
use serde_json::json;
use std::fmt;

/// Block drivers, and the release of QEMU that brought each (qapi/block-core.json).
const DRIVERS: [(&str, &str); 1] = [("snapshot-access", "7.0")];

/// Commands, likewise.
const COMMANDS: [(&str, &str); 4] = [
    ("blockdev-backup", "2.3"),
    ("block-export-add", "5.2"),
    ("block-dirty-bitmap-merge", "4.0"),
    ("job-dismiss", "3.0"),
];

/// The oldest QEMU that all tests of ours were run with.
const OLDEST: &str = "7.2";

/// Why this QEMU cannot give a point in time.
#[derive(Debug, thiserror::Error)]
pub enum NeedsError {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// It does not have something.
    #[error(
        "QEMU {version} has no {what}, which came with QEMU {since}: Fleecebox needs {OLDEST} or newer; nothing was done to the VM"
    )]
    Missing {
        /// What it says of itself.
        version: String,
        /// The driver or command.
        what: String,
        /// The first release that has it.
        since: &'static str,
    },
    /// After a restore of saved memory or a migration, as long as the VM has not been continued.
    #[error(
        "QEMU holds disk {disk} (node {node}) inactive, as after a restore of saved memory or a migration: it reads it, and lets nobody write; continue the VM first"
    )]
    Inactive {
        /// The disk.
        disk: String,
        /// Its node.
        node: String,
    },
}

impl NeedsError {
    /// Whether the user can mend it: exit status 2.
    pub fn is_mistake(&self) -> bool {
        !matches!(self, Self::Monitor(_))
    }
}

/// Whether QEMU has all that a point in time of `disks` is made with, and may write to them. What else it can do is
/// returned.
///
/// # Errors
/// Any [`NeedsError`].
pub async fn check(monitor: &Monitor, disks: &[Disk]) -> Result<Schema, NeedsError> {
    let schema = Schema::probe(monitor).await?;
    let drivers = DRIVERS
        .iter()
        .filter(|(driver, _)| !schema.has_variant("blockdev-add", driver))
        .map(|(driver, since)| (format!("block driver {driver}"), *since));
    let commands = COMMANDS
        .iter()
        .filter(|(command, _)| !schema.has_command(command))
        .map(|(command, since)| (format!("command {command}"), *since));
    if let Some((what, since)) = drivers.chain(commands).next() {
        let version: Version = monitor.query("query-version", json!({})).await?;
        return Err(NeedsError::Missing {
            version: version.to_string(),
            what,
            since,
        });
    }
    refuse_inactive(monitor, disks).await?;
    Ok(schema)
}

async fn refuse_inactive(monitor: &Monitor, disks: &[Disk]) -> Result<(), NeedsError> {
    let nodes = present::nodes(monitor).await?;
    let inactive = |disk: &&Disk| {
        let mut nodes = nodes.iter();
        nodes.any(|node| node.name == disk.node && node.active == Some(false))
    };
    match disks.iter().find(inactive) {
        Some(disk) => Err(NeedsError::Inactive {
            disk: disk.name.clone(),
            node: disk.node.clone(),
        }),
        None => Ok(()),
    }
}

/// `VersionInfo` of qapi/control.json.
#[derive(Deserialize)]
struct Version {
    qemu: Triple,
}

#[derive(Deserialize)]
struct Triple {
    major: u32,
    minor: u32,
    micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Triple {
            major,
            minor,
            micro,
        } = self.qemu;
        write!(f, "{major}.{minor}.{micro}")
    }
}
