//! QEMUs older than the one that all other tests run with: Debian 12's own, the oldest that is supported, and
//! Debian 11's, which lacks what a point in time is read by.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use fleecebox_tests::{Disk, MIB, NbdClient, QemuState, Site, StorageDaemon, compare};

/// Where the programs of that release's QEMU are; nothing where its packages cannot be had.
fn older_qemu(release: &str) -> Result<Option<PathBuf>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("setup/older-qemu.sh");
    let mut unpack = Command::new(script);
    let output = unpack.arg(release).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        println!("NOT SHOWN: the packages of Debian's {release} cannot be had here");
        return Ok(None);
    }
    let folder = String::from_utf8(output.stdout)?;
    Ok(Some(folder.trim_end().into()))
}

fn two_disks() -> [Disk; 2] {
    [Disk::qcow2("da", 8 * MIB), Disk::raw("db", 6 * MIB + 512)]
}

#[test]
fn qemu_7_2_gives_full_and_incremental_backups_beside_an_export_of_the_disk() -> Result<()> {
    let Some(qemu) = older_qemu("bookworm")? else {
        return Ok(());
    };
    let daemon = StorageDaemon::start_of(&qemu, &two_disks())?;
    let site = Site::new()?;
    let before = QemuState::read(daemon.monitors())?;
    let write = |number: u8, at: u64| -> Result<()> {
        for disk in daemon.disks() {
            let mut client: NbdClient = daemon.writer_access(&disk.node)?;
            client.write(at, &[number; 4096])?;
            client.flush()?;
        }
        Ok(())
    };
    write(1, MIB)?;
    let order = site.order(&daemon, "chunked")?;
    let full = site.backup(&order)?;
    write(2, 3 * MIB)?;
    let increment = site.backup(&order)?;
    for disk in ["da", "db"] {
        increment.assert_base(disk, Some(&full));
        ensure!(increment.dirty_bytes(disk) < MIB);
    }
    let ours = |bitmap: &fleecebox_tests::Bitmap| bitmap.name.starts_with("fleecebox:");
    QemuState::read(daemon.monitors())?.assert_restored(&before, ours);
    let mut daemon = daemon;
    daemon.quit()?;
    site.verify(&site.archive(), &increment.id)?;
    let restored = site.restore(&site.archive(), &increment.id)?;
    for disk in daemon.disks() {
        let image = restored.join(format!("{}.raw", disk.node));
        compare::same_disk(&image, &disk.path)?;
    }
    Ok(())
}

#[test]
fn a_qemu_without_snapshot_access_is_refused_before_anything_is_done() -> Result<()> {
    let Some(qemu) = older_qemu("bullseye")? else {
        return Ok(());
    };
    let daemon = StorageDaemon::start_of(&qemu, &two_disks())?;
    let site = Site::new()?;
    let before = QemuState::read(daemon.monitors())?;
    let order = site.order(&daemon, "chunked")?;
    let dry = site.backup_command(&order).arg("--dry-run");
    for command in [site.backup_command(&order), dry] {
        let outcome = command.run()?;
        ensure!(outcome.code() == Some(2), "{outcome:?}");
        for said in [
            "QEMU 5.2.0 has no block driver snapshot-access",
            "7.2 or newer",
        ] {
            ensure!(outcome.stderr.contains(said), "{said}: {outcome:?}");
        }
    }
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    site.check_no_fleecing_images()?;
    let journal = site.path("state/vms/web/journal.json");
    let kept = std::fs::read_to_string(&journal).unwrap_or_default();
    ensure!(kept.is_empty(), "a journal was left: {kept}");
    Ok(())
}
