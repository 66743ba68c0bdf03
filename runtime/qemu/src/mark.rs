//! A block that a new bitmap calls dirty though nobody wrote it: a bitmap that does not is not that one any more.
//!
//! QEMU shows neither that a bitmap was cleared nor that another of its name took its place. No command makes a bit
//! dirty, but one bitmap can be added to another: so an empty disk of the same size, made of nothing, is discarded in
//! one block, and its bitmap is added.

use super::bitmap::BitmapName;
use super::ids::{JobId, OwnId, Role};
use super::machine::Disk;
use super::monitor::{Monitor, MonitorError};
use serde_json::json;

/// The bitmap's name on the empty disk.
const BITMAP: &str = "mark";

/// Makes the empty disk, and an export of it of the name that is returned. Both go with the point in time.
pub(super) async fn prepare(
    monitor: &Monitor,
    job: JobId,
    index: u16,
    disk: &Disk,
    granularity: u32,
) -> Result<String, MonitorError> {
    let name = name(job, index);
    let nothing = json!({ "driver": "null-co", "size": disk.size });
    // Raw, since a disk of nothing would forget a discard before any bitmap knows.
    let node = json!({ "driver": "raw", "node-name": name, "discard": "unmap", "file": nothing });
    monitor.execute_raw("blockdev-add", node).await?;
    let bitmap = json!({ "node": name, "name": BITMAP, "granularity": granularity });
    monitor
        .execute_raw("block-dirty-bitmap-add", bitmap)
        .await?;
    let export = json!({
        "type": "nbd",
        "id": name,
        "node-name": name,
        "name": name,
        "writable": true,
    });
    monitor.execute_raw("block-export-add", export).await?;
    Ok(name)
}

/// Adds what was discarded to `bitmap`.
pub(super) async fn pour(
    monitor: &Monitor,
    job: JobId,
    index: u16,
    disk: &Disk,
    bitmap: &BitmapName,
) -> Result<(), MonitorError> {
    let source = json!({ "node": name(job, index), "name": BITMAP });
    let merge = json!({
        "node": disk.node,
        "target": bitmap.to_string(),
        "bitmaps": [source],
    });
    let merged = monitor.execute_raw("block-dirty-bitmap-merge", merge).await;
    merged.map(drop)
}

fn name(job: JobId, index: u16) -> String {
    OwnId {
        job,
        role: Role::Mark,
        index,
    }
    .to_string()
}
