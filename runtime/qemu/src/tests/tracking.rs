//! Bitmaps over several backups: whatever ends a backup, no change may be lost.

use super::daemon::{BLOCK, Daemon, both, name};
use crate::bitmap::{self, BitmapPlan, Tracking};
use crate::machine::Unusable;
use crate::monitor::Monitor;
use crate::snapshot::Cause;

const BLOCK_LENGTH: u64 = BLOCK as u64;

/// Per disk: name, dirty bytes and whether it records, of every bitmap.
async fn bitmaps(monitor: &Monitor) -> Vec<Vec<(String, u64, bool)>> {
    let disks = both(monitor).await.into_iter();
    disks
        .map(|disk| {
            disk.bitmaps
                .into_iter()
                .map(|b| (b.name, b.dirty, b.recording))
                .collect()
        })
        .collect()
}

/// A first backup that commits: both disks are tracked by `b1`.
async fn first_backup(daemon: &Daemon, monitor: &Monitor) {
    let plan = BitmapPlan::New { name: name("b1") };
    let request = daemon.request(monitor, daemon.shared(), &plan).await;
    let point = daemon.take(monitor, request).await.unwrap();
    assert!(
        point
            .volumes
            .iter()
            .all(|volume| volume.dirty_context.is_none())
    );
    assert!(super::end(&point, monitor).await.is_empty());
    for disk in ["raw0", "qcow0"] {
        bitmap::accept(monitor, disk, &plan).await.unwrap();
    }
}

fn second() -> BitmapPlan {
    BitmapPlan::Reuse {
        old: name("b1"),
        new: name("b2"),
    }
}

#[tokio::test]
async fn success_keeps_the_new_bitmap_with_what_came_after_the_point_in_time() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    first_backup(&daemon, &monitor).await;
    for disk in ["raw0", "qcow0"] {
        daemon.write(disk, 1, 0, 1);
        daemon.write(disk, 1, 5 * BLOCK_LENGTH, 2 * BLOCK_LENGTH);
    }
    let b1 = name("b1").to_string();
    assert_eq!(
        bitmaps(&monitor).await,
        vec![vec![(b1.clone(), 3 * BLOCK_LENGTH, true)]; 2]
    );

    let request = daemon.request(&monitor, daemon.shared(), &second()).await;
    let point = daemon.take(&monitor, request).await.unwrap();
    for disk in ["raw0", "qcow0"] {
        daemon.write(disk, 2, 9 * BLOCK_LENGTH, 1);
    }
    for volume in &point.volumes {
        assert_eq!(
            volume.dirty_context,
            Some(format!("qemu:dirty-bitmap:{b1}"))
        );
        let dirty = dirty_blocks(&volume.export, &point.socket, &b1);
        assert_eq!(dirty, [0, 5, 6]);
    }
    assert!(super::end(&point, &monitor).await.is_empty());
    for disk in ["raw0", "qcow0"] {
        bitmap::accept(&monitor, disk, &second()).await.unwrap();
        bitmap::accept(&monitor, disk, &second()).await.unwrap();
    }
    let b2 = name("b2").to_string();
    assert_eq!(
        bitmaps(&monitor).await,
        vec![vec![(b2, BLOCK_LENGTH, true)]; 2]
    );
}

#[tokio::test]
async fn failure_leaves_one_bitmap_with_all_changes_since_the_base() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    first_backup(&daemon, &monitor).await;
    for disk in ["raw0", "qcow0"] {
        daemon.write(disk, 1, 0, 2 * BLOCK_LENGTH);
    }
    let request = daemon.request(&monitor, daemon.shared(), &second()).await;
    let point = daemon.take(&monitor, request).await.unwrap();
    for disk in ["raw0", "qcow0"] {
        daemon.write(disk, 2, BLOCK_LENGTH, 2 * BLOCK_LENGTH);
        let busy = bitmap::back_out(&monitor, disk, &second()).await;
        assert!(busy.is_err(), "an exported bitmap cannot be changed");
    }
    assert!(super::end(&point, &monitor).await.is_empty());
    for disk in ["raw0", "qcow0"] {
        for _ in 0..2 {
            let tracking = bitmap::back_out(&monitor, disk, &second()).await.unwrap();
            assert_eq!(tracking, Tracking::Restored);
        }
        daemon.write(disk, 3, 8 * BLOCK_LENGTH, 1);
    }
    let b1 = name("b1").to_string();
    assert_eq!(
        bitmaps(&monitor).await,
        vec![vec![(b1, 4 * BLOCK_LENGTH, true)]; 2]
    );
}

#[tokio::test]
async fn a_failed_first_backup_leaves_no_bitmap() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    let plan = BitmapPlan::New { name: name("b1") };
    let request = daemon.request(&monitor, daemon.shared(), &plan).await;
    let point = daemon.take(&monitor, request).await.unwrap();
    assert_eq!(bitmap::find(&monitor).await.unwrap().len(), 2);
    assert!(super::end(&point, &monitor).await.is_empty());
    for disk in ["raw0", "qcow0"] {
        assert_eq!(
            bitmap::back_out(&monitor, disk, &plan).await.unwrap(),
            Tracking::Restored
        );
    }
    assert!(bitmap::find(&monitor).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_bitmap_that_stopped_recording_is_never_a_base_and_never_enabled_again() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    first_backup(&daemon, &monitor).await;
    let b1 = serde_json::json!({ "node": "raw0", "name": name("b1").to_string() });
    monitor
        .execute_raw("block-dirty-bitmap-disable", b1)
        .await
        .unwrap();
    daemon.write("raw0", 1, 0, 1);

    let request = daemon.request(&monitor, daemon.shared(), &second()).await;
    let error = daemon.take(&monitor, request).await.unwrap_err();
    assert!(
        matches!(&error.cause, Cause::Bitmap { disk, reason: Unusable::NotRecording, .. } if disk == "raw0"),
        "{error}"
    );
    let states = bitmaps(&monitor).await;
    assert_eq!((states[0].len(), states[0][0].2), (1, false));
    assert_eq!((states[1].len(), states[1][0].2), (1, true));

    // Without the new bitmap, what was written meanwhile is known to nobody.
    assert_eq!(
        bitmap::back_out(&monitor, "raw0", &second()).await.unwrap(),
        Tracking::Lost
    );
    assert_eq!(bitmaps(&monitor).await[0], []);
}

#[tokio::test]
async fn after_a_restart_in_the_middle_the_qcow2_disk_still_knows_every_change() {
    let mut daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    first_backup(&daemon, &monitor).await;
    daemon.write("qcow0", 1, 0, 1);
    let request = daemon.request(&monitor, daemon.shared(), &second()).await;
    daemon.take(&monitor, request).await.unwrap();
    daemon.write("qcow0", 2, 3 * BLOCK_LENGTH, 1);
    daemon.restart(monitor).await;

    let monitor = daemon.monitor().await;
    assert_eq!(
        bitmaps(&monitor).await[0],
        [],
        "a raw disk stores no bitmap"
    );
    assert_eq!(
        bitmap::back_out(&monitor, "qcow0", &second())
            .await
            .unwrap(),
        Tracking::Restored
    );
    let b1 = name("b1").to_string();
    assert_eq!(bitmaps(&monitor).await[1], [(b1, 2 * BLOCK_LENGTH, true)]);
}

#[tokio::test]
async fn after_a_crash_the_stored_bitmap_is_not_believed() {
    let mut daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    first_backup(&daemon, &monitor).await;
    daemon.restart(monitor).await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    daemon.write("qcow0", 1, 0, 1);
    drop(monitor);
    daemon.crash().await;

    let monitor = daemon.monitor().await;
    let disk = both(&monitor).await.remove(1);
    let base = disk.bitmap(&name("b1").to_string()).unwrap();
    assert_eq!(base.usable(), Err(Unusable::Inconsistent));
    assert_eq!(
        bitmap::back_out(&monitor, "qcow0", &second())
            .await
            .unwrap(),
        Tracking::Lost
    );
    assert!(both(&monitor).await[1].bitmaps.is_empty());
}

/// The blocks that QEMU's own client calls dirty.
fn dirty_blocks(export: &str, socket: &std::path::Path, bitmap: &str) -> Vec<u64> {
    let options = format!(
        "driver=nbd,export={export},server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let map = std::process::Command::new("qemu-img")
        .args(["map", "--output=json", "--image-opts", &options])
        .output()
        .unwrap();
    assert!(map.status.success(), "{map:?}");
    let extents: Vec<serde_json::Value> = serde_json::from_slice(&map.stdout).unwrap();
    // With x-dirty-bitmap, what is dirty is shown as holding no data.
    let dirty = extents.iter().filter(|extent| extent["data"] == false);
    dirty
        .flat_map(|extent| {
            let (start, length) = (
                extent["start"].as_u64().unwrap(),
                extent["length"].as_u64().unwrap(),
            );
            start / BLOCK_LENGTH..(start + length) / BLOCK_LENGTH
        })
        .collect()
}
