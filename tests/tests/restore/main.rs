//! Where a restored volume can go.

mod in_use;
mod serve;
mod targets;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Backup, Disk, MIB, Random, Site, StorageDaemon, compare};

/// Odd, with data at both ends and much that is zero.
const SIZE: u64 = 12 * MIB + 512;

/// A backup of two disks that nobody writes any more, and the raw images that they must become.
struct Scene {
    site: Site,
    backup: Backup,
    da: PathBuf,
    db: PathBuf,
}

impl Scene {
    fn new() -> Result<Self> {
        let site = Site::new()?;
        let [da, db] = ["da", "db"].map(|name| site.path(&format!("{name}.raw")));
        for (seed, path) in [(1, &da), (2, &db)] {
            Random::new(seed).fill_file(path, 2)?;
            let mut file = File::options().write(true).open(path)?;
            file.set_len(SIZE)?;
            file.seek(SeekFrom::Start(SIZE - 700))?;
            file.write_all(&[0xee; 700])?;
        }
        let disks = [
            Disk::raw("da", SIZE).holding(&da),
            Disk::qcow2("db", SIZE).holding(&db),
        ];
        let daemon = StorageDaemon::start(&disks)?;
        let backup = site.backup(&site.order(&daemon, "chunked")?)?;
        Ok(Self {
            site,
            backup,
            da,
            db,
        })
    }

    fn restore(&self, arguments: &[&str], to: &Path) -> fleecebox_tests::Fleecebox {
        let command = self.site.command(&["restore", &self.backup.id]);
        let command = command.arg("--archive").arg(self.site.archive());
        let command = command.arg("--to").arg(to);
        arguments
            .iter()
            .fold(command, |command, argument| command.arg(*argument))
    }
}

#[test]
fn a_raw_file_has_holes_where_the_volume_is_zero() -> Result<()> {
    let scene = Scene::new()?;
    let file = scene.site.path("one.raw");
    scene
        .restore(&["--volume", "db"], &file)
        .run()?
        .assert_success();
    compare::same_bytes(&file, &scene.db)?;
    let allocated = fs::metadata(&file)?.blocks() * 512;
    ensure!(
        allocated < SIZE / 2,
        "{allocated} of {SIZE} bytes allocated"
    );
    Ok(())
}

#[test]
fn a_qcow2_file_is_sound_and_holds_the_same_disk() -> Result<()> {
    let scene = Scene::new()?;
    let folder = scene.site.path("restored");
    let command = scene.restore(&["--format", "qcow2", "--json"], &folder);
    let document = command.run()?.assert_success().document()?;
    for (name, reference) in [("da", &scene.da), ("db", &scene.db)] {
        let image = folder.join(format!("{name}.qcow2"));
        compare::qcow2_is_clean(&image)?;
        compare::same_disk(&image, reference)?;
        let said = document["volumes"].as_array().context("no volumes")?;
        let path = image.to_str().context("a path in UTF-8")?;
        ensure!(
            said.iter().any(|volume| volume["path"] == path),
            "{document}"
        );
    }
    // No file that was only on the way there.
    assert_eq!(fs::read_dir(&folder)?.count(), 2);
    Ok(())
}

#[test]
fn force_replaces_a_file_as_a_whole() -> Result<()> {
    let scene = Scene::new()?;
    let file = scene.site.path("old.raw");
    fs::write(&file, vec![0xaa; SIZE as usize + 4096])?;
    scene
        .restore(&["--volume", "da", "--force"], &file)
        .run()?
        .assert_success();
    compare::same_bytes(&file, &scene.da)
}

#[test]
fn a_block_device_is_overwritten_with_zeroes_too_and_not_beyond_the_volume() -> Result<()> {
    let scene = Scene::new()?;
    let beyond = 4096;
    let image = scene.site.path("device.img");
    fs::write(&image, vec![0xaa; SIZE as usize + beyond])?;
    let Some(device) = LoopDevice::attach(&image)? else {
        return Ok(());
    };
    let volume = ["--volume", "da"];
    let refused = scene.restore(&volume, &device.path).run()?;
    refused.assert_refused(2, "--force overwrites it");
    let qcow2 = ["--volume", "da", "--force", "--format", "qcow2"];
    let refused = scene.restore(&qcow2, &device.path).run()?;
    refused.assert_refused(2, "which takes the raw format only");
    ensure!(fs::read(&image)?.iter().all(|byte| *byte == 0xaa));

    let mut forced = volume.to_vec();
    forced.push("--force");
    scene.restore(&forced, &device.path).run()?.assert_success();
    device.detach()?;
    let mut written = File::open(&image)?;
    let mut end = Vec::new();
    written.seek(SeekFrom::Start(SIZE))?;
    written.read_to_end(&mut end)?;
    ensure!(end == vec![0xaa; beyond], "it wrote beyond the volume");
    File::options().write(true).open(&image)?.set_len(SIZE)?;
    compare::same_bytes(&image, &scene.da)
}

#[test]
fn a_block_device_that_is_too_small_is_left_alone() -> Result<()> {
    let scene = Scene::new()?;
    let image = scene.site.path("device.img");
    fs::write(&image, vec![0xaa; SIZE as usize - 512])?;
    let Some(device) = LoopDevice::attach(&image)? else {
        return Ok(());
    };
    let outcome = scene
        .restore(&["--volume", "da", "--force"], &device.path)
        .run()?;
    outcome.assert_refused(2, &format!("{} bytes, the volume {SIZE}", SIZE - 512));
    device.detach()?;
    ensure!(fs::read(&image)?.iter().all(|byte| *byte == 0xaa));
    Ok(())
}

/// A block device over a file, detached when this goes. It needs root.
struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    fn attach(file: &Path) -> Result<Option<Self>> {
        Self::attach_with(&[], file)
    }

    fn attach_with(options: &[&str], file: &Path) -> Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            fleecebox_tests::not_shown("a block device of the host (losetup needs root)");
            return Ok(None);
        }
        let mut losetup = Command::new("/usr/sbin/losetup");
        losetup.args(["--find", "--show"]).args(options);
        let output = losetup.arg(file).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "losetup, which needs root and a loop device, failed: {said}"
        );
        let path = String::from_utf8(output.stdout)?.trim_end().into();
        Ok(Some(Self { path }))
    }

    /// What was written is in the file then.
    fn detach(self) -> Result<()> {
        let status = Command::new("/usr/sbin/losetup")
            .arg("--detach")
            .arg(&self.path)
            .status()?;
        ensure!(status.success(), "losetup --detach: {status}");
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The test has failed already.
        let _ = Command::new("/usr/sbin/losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
    }
}
