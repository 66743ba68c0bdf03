//! Files that the VM does not have, attached read-only for the time of a backup.

use super::descriptor;
use super::ids::{JobId, OwnId, Role};
use super::machine::{self, Disk, MachineError};
use super::monitor::Monitor;
use super::removal::{self, Remains, RemovalError, ServerFate};
use rustix::fs::FileType;
use serde_json::json;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// Attaches the file at `path`, as QEMU sees it, as the disk `name`. Its size is rounded up to whole sectors of 512
/// bytes, the rest reads as zero.
///
/// # Errors
/// Where QEMU cannot open it, or it is empty.
pub async fn attach(
    monitor: &Monitor,
    job: JobId,
    index: u16,
    name: &str,
    path: &Path,
    opened: BorrowedFd<'_>,
) -> Result<Disk, MachineError> {
    let node = id(job, index);
    // A file of the host may be a block device.
    let driver = match rustix::fs::fstat(opened) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice => "host_device",
        _ => "file",
    };
    let options = |filename| {
        json!({
            "driver": "raw",
            "node-name": node,
            "read-only": true,
            "file": { "driver": driver, "filename": filename, "read-only": true },
        })
    };
    descriptor::add_node(monitor, &node, path, Some(opened), options).await?;
    let disk = machine::extra(monitor, name, &node).await?;
    // QEMU shows what stands for the descriptor.
    Ok(Disk {
        filename: path.display().to_string(),
        ..disk
    })
}

/// Detaches these, where they are there; returns what could not be.
pub async fn detach(
    monitor: &Monitor,
    job: JobId,
    indices: impl Iterator<Item = u16>,
) -> Vec<RemovalError> {
    let remains = Remains {
        extra: indices.map(|index| id(job, index)).collect(),
        ..Remains::default()
    };
    removal::remove(monitor, &remains, ServerFate::Keep).await
}

fn id(job: JobId, index: u16) -> String {
    OwnId {
        job,
        role: Role::Extra,
        index,
    }
    .to_string()
}
