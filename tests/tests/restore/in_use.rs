//! What somebody has open is not overwritten: by a VM, by its overlays, through a loop device, seen by whatever shows it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, Fleecebox, StorageDaemon, compare};
use serde_json::json;

use super::{LoopDevice, SIZE, Scene};

/// The exit status where another is at work.
const BUSY: i32 = 11;

/// A scene whose daemon runs on, with more of it.
struct Live {
    scene: Scene,
    daemon: StorageDaemon,
}

impl Live {
    fn new() -> Result<Self> {
        let scene = Scene::new()?;
        // Exported for writing, as a device would have it: QEMU locks what is used.
        let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("live", SIZE)])?;
        Ok(Self { scene, daemon })
    }

    fn forced(&self, to: &Path) -> Fleecebox {
        self.scene.restore(&["--volume", "da", "--force"], to)
    }

    /// Sees it refused with `who` named, and the file as it was.
    fn refuses(&self, command: Fleecebox, file: &Path, who: &str) -> Result<()> {
        let (before, bytes) = (fs::metadata(file)?, fs::read(file)?);
        let outcome = command.run()?.assert_refused(BUSY, who);
        ensure!(outcome.stderr.contains("--even-if-in-use"), "{outcome:?}");
        let after = fs::metadata(file)?;
        assert_eq!((before.dev(), before.ino()), (after.dev(), after.ino()));
        ensure!(fs::read(file)? == bytes, "{} was written", file.display());
        Ok(())
    }

    fn add(&self, blockdev: serde_json::Value) -> Result<()> {
        self.daemon.control()?.execute("blockdev-add", blockdev)?;
        Ok(())
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        let file = self.scene.site.path(name);
        fs::write(&file, vec![0xaa; SIZE as usize])?;
        Ok(file)
    }
}

#[test]
fn a_disk_of_a_vm_that_runs_is_refused_unless_one_insists() -> Result<()> {
    let live = Live::new()?;
    let disk = live.daemon.disks()[0].path.clone();
    live.refuses(live.forced(&disk), &disk, "(qemu-storage-da)")?;
    // By another name, too.
    let (hard, link) = (disk.with_extension("hard"), disk.with_extension("link"));
    fs::hard_link(&disk, &hard)?;
    std::os::unix::fs::symlink(&disk, &link)?;
    for name in [&hard, &link] {
        live.refuses(live.forced(name), &disk, "(qemu-storage-da)")?;
    }
    let insisting = live.forced(&disk).arg("--even-if-in-use");
    insisting.run()?.assert_success();
    compare::same_bytes(&disk, &live.scene.da)
}

#[test]
fn a_backing_file_of_an_open_overlay_is_in_use() -> Result<()> {
    let live = Live::new()?;
    let (below, above) = (live.file("below")?, live.scene.site.path("above"));
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&below, &above])
        .status()?;
    ensure!(made.success(), "{made}");
    live.add(json!({"driver": "qcow2", "node-name": "above",
        "file": {"driver": "file", "filename": above}}))?;
    live.refuses(live.forced(&below), &below, "(qemu-storage-da)")
}

#[test]
fn a_block_device_of_a_vm_its_file_and_a_file_below_a_device_are_in_use() -> Result<()> {
    let live = Live::new()?;
    // QEMU has the device.
    let file = live.file("device.img")?;
    let Some(device) = LoopDevice::attach(&file)? else {
        return Ok(());
    };
    let node = json!({"driver": "host_device", "node-name": "dev", "filename": device.path});
    live.add(node)?;
    live.refuses(live.forced(&device.path), &file, "(qemu-storage-da)")?;
    let name = device.path.display().to_string();
    live.refuses(
        live.forced(&file),
        &file,
        &format!("the loop device {name}"),
    )?;
    let remove = json!({"node-name": "dev"});
    live.daemon.control()?.execute("blockdev-del", remove)?;
    let insisting = live.forced(&device.path).arg("--even-if-in-use");
    insisting.run()?.assert_success();
    device.detach()?;
    compare::same_bytes(&file, &live.scene.da)?;
    // QEMU has the file, and the device is the same bytes.
    let file = live.file("below.img")?;
    live.add(json!({"driver": "file", "node-name": "file", "filename": file}))?;
    let Some(device) = LoopDevice::attach(&file)? else {
        return Ok(());
    };
    live.refuses(live.forced(&device.path), &file, "(qemu-storage-da)")?;
    device.detach()
}

#[test]
fn a_vm_that_proc_does_not_show_is_seen_by_its_lock_and_without_one_by_its_monitor() -> Result<()> {
    let live = Live::new()?;
    let elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"];
    let disk = live.daemon.disks()[0].path.clone();
    let command = live.forced(&disk).started_by(elsewhere);
    live.refuses(command, &disk, "has a lock on it")?;

    let unlocked = live.file("unlocked.img")?;
    live.add(
        json!({"driver": "file", "node-name": "unlocked", "filename": unlocked, "locking": "off"}),
    )?;
    let qmp = live.daemon.monitors().product.display().to_string();
    live.scene.site.configure(&format!(
        "[vm.web]\nqmp = '{qmp}'\n[vm.gone]\nqmp = '/nonexistent/qmp'\n"
    ))?;
    let command = live.forced(&unlocked).started_by(elsewhere);
    live.refuses(command, &unlocked, "the VM 'web'")
}

#[test]
fn of_two_restores_to_one_place_each_that_succeeds_has_left_its_own_whole() -> Result<()> {
    let scene = Scene::new()?;
    let file = scene.site.path("one.raw");
    for there_before in [false, true] {
        if there_before {
            fs::write(&file, b"old")?;
        } else {
            let _ = fs::remove_file(&file);
        }
        let start = |volume: &str| {
            let command = scene.restore(&["--force", "--volume", volume], &file);
            command.start()
        };
        let running = [start("da")?, start("db")?];
        let [da, db] = running.map(|running| running.finish());
        let ended = [(da?, &scene.da), (db?, &scene.db)];
        for (outcome, _) in &ended {
            ensure!(matches!(outcome.code(), Some(0 | BUSY)), "{outcome:?}");
        }
        let done = ended
            .iter()
            .filter(|(outcome, _)| outcome.code() == Some(0));
        let whole = done
            .clone()
            .any(|(_, content)| compare::same_bytes(&file, content).is_ok());
        ensure!(whole, "neither of those that succeeded: {ended:?}");
        let folder = file.parent().context("no folder")?;
        let left = fs::read_dir(folder)?.filter_map(Result::ok);
        let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
        ensure!(
            !left
                .iter()
                .any(|name| name.to_string_lossy().contains("partial")),
            "{left:?}"
        );
    }
    Ok(())
}
