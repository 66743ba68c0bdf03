//! What becomes of a disk's tracking when the disk, the VM or the archive changes between two backups.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, MIB, Order, Proxy, QemuState, Random, Site, StorageDaemon, compare,
};
use serde_json::json;

const SIZE: u64 = 8 * MIB;

/// A daemon with its proxy, and where its backups go.
struct Scene {
    site: Site,
    daemon: StorageDaemon,
    proxy: Proxy,
    seed: u64,
}

impl Scene {
    fn new(disks: &[Disk]) -> Result<Self> {
        let daemon = StorageDaemon::start_with_writer_exports(disks)?;
        let scene = Self {
            site: Site::new()?,
            proxy: Proxy::start(daemon.monitors())?,
            daemon,
            seed: 0,
        };
        Ok(scene)
    }

    fn order(&self) -> Result<Order> {
        let order = self.site.order(&self.daemon, "chunked")?;
        Ok(order.through(&self.proxy))
    }

    /// Overwrites some of each disk that the order names, then backs up and holds the restored disks against QEMU's
    /// own copies.
    fn backup(&mut self, order: &Order) -> Result<Backup> {
        for disk in &order.disks {
            self.seed += 1;
            let mut random = Random::new(self.seed);
            let mut bytes = vec![0; 200_000];
            random.fill(&mut bytes);
            // A disk that was added later is not exported for writing.
            if let Ok(mut access) = self.daemon.writer_access(disk) {
                access.write(random.below(SIZE - 200_000), &bytes)?;
                access.flush()?;
            }
        }
        let backup = self.site.backup(order)?;
        let references = self.proxy.references()?;
        self.site.check(order, &backup, &references)?;
        Ok(backup)
    }

    fn restart(&mut self, between: impl FnOnce(&mut StorageDaemon) -> Result<()>) -> Result<()> {
        self.daemon.quit()?;
        between(&mut self.daemon)?;
        self.daemon.start_again()
    }

    fn bitmaps(&self, node: &str) -> Result<Vec<String>> {
        let state = QemuState::read(self.daemon.monitors())?;
        let of_node = state.bitmaps().filter(|bitmap| bitmap.node == node);
        Ok(of_node.map(|bitmap| bitmap.name.clone()).collect())
    }
}

fn two_qcow2() -> [Disk; 2] {
    [Disk::qcow2("da", SIZE), Disk::qcow2("db", SIZE)]
}

#[test]
fn a_disk_whose_bitmap_stopped_is_read_in_full_and_the_other_is_not() -> Result<()> {
    let mut scene = Scene::new(&[Disk::raw("da", SIZE), Disk::qcow2("db", SIZE)])?;
    let order = scene.order()?;
    let base = scene.backup(&order)?;
    let [bitmap] = &scene.bitmaps("da")?[..] else {
        anyhow::bail!("not one bitmap");
    };
    let mut qmp = scene.daemon.control()?;
    let bitmap = json!({"node": "da", "name": bitmap});
    qmp.execute("block-dirty-bitmap-disable", bitmap)?;
    drop(qmp);
    let next = scene.backup(&order)?;
    next.assert_read_in_full_because("da", "it stopped following writes");
    assert_eq!(next.dirty_bytes("da"), SIZE);
    next.assert_base("db", Some(&base));
    ensure!(next.dirty_bytes("db") < SIZE / 2);
    // The useless one is gone.
    assert_eq!(scene.bitmaps("da")?.len(), 1);
    let last = scene.backup(&order)?;
    last.assert_base("da", Some(&next));
    last.assert_base("db", Some(&next));
    Ok(())
}

#[test]
fn a_bitmap_that_a_crash_spoilt_is_not_used() -> Result<()> {
    let mut scene = Scene::new(&[Disk::qcow2("da", SIZE)])?;
    let order = scene.order()?;
    scene.backup(&order)?;
    // Stored, so that it is on the disk, and in use when the crash comes.
    scene.restart(|_| Ok(()))?;
    scene.daemon.kill()?;
    scene.daemon.start_again()?;
    let next = scene.backup(&order)?;
    next.assert_read_in_full_because("da", "QEMU ended without storing it");
    let last = scene.backup(&order)?;
    last.assert_base("da", Some(&next));
    Ok(())
}

#[test]
fn a_raw_disk_is_read_in_full_after_a_restart_and_a_qcow2_disk_is_not() -> Result<()> {
    let mut scene = Scene::new(&[Disk::raw("da", SIZE), Disk::qcow2("db", SIZE)])?;
    let order = scene.order()?;
    let base = scene.backup(&order)?;
    scene.restart(|_| Ok(()))?;
    let next = scene.backup(&order)?;
    next.assert_base("da", None);
    let why = "da (raw, 8388608 bytes): read in full: it has no bitmap of this archive";
    ensure!(next.said.contains(why), "{}", next.said);
    next.assert_base("db", Some(&base));
    ensure!(next.dirty_bytes("db") < SIZE / 2);
    Ok(())
}

#[test]
fn a_disk_that_is_added_or_removed_leaves_the_others_incremental() -> Result<()> {
    let mut scene = Scene::new(&[Disk::qcow2("da", SIZE)])?;
    let order = scene.order()?;
    let first = scene.backup(&order)?;

    let content = scene.site.path("content.raw");
    Random::new(99).fill_file(&content, 2)?;
    let added = Disk::raw("db", SIZE).holding(&content);
    scene.daemon.add_disk(&added)?;
    let order = scene.order()?;
    let both = scene.backup(&order)?;
    both.assert_base("da", Some(&first));
    both.assert_base("db", None);
    let said = both.said.contains("db (raw, 8388608 bytes): read in full");
    ensure!(said, "{}", both.said);

    let unexport = json!({"id": "writer-da"});
    let mut qmp = scene.daemon.control()?;
    qmp.execute("block-export-del", unexport)?;
    qmp.event(
        "BLOCK_EXPORT_DELETED",
        std::time::Duration::from_secs(10),
        |_| true,
    )?;
    drop(qmp);
    scene.daemon.remove_disk("da")?;
    let order = scene.order()?;
    let one = scene.backup(&order)?;
    one.assert_base("db", Some(&both));
    assert_eq!(one.volumes.len(), 1);
    let said = one.said.contains("da was in") && one.said.contains(&both.id);
    ensure!(said, "{}", one.said);

    // One that is asked for and not there is no smaller backup.
    let outcome = scene
        .site
        .backup_command(&order.only(&["da", "db"]))
        .run()?;
    outcome.assert_refused(2, "da");
    Ok(())
}

#[test]
fn a_disk_that_grew_is_read_in_full_and_the_other_is_not() -> Result<()> {
    let mut scene = Scene::new(&two_qcow2())?;
    let order = scene.order()?;
    let base = scene.backup(&order)?;
    scene.restart(|daemon| {
        let mut resize = std::process::Command::new("qemu-img");
        resize.args(["resize", "-q", "-f", "qcow2"]);
        let path = &daemon.disks()[0].path;
        let status = resize.arg(path).arg((SIZE + 512).to_string()).status()?;
        ensure!(status.success(), "qemu-img resize: {status}");
        Ok(())
    })?;
    let mut tail = scene.daemon.writer_access("da")?;
    tail.write(SIZE, &[7; 512])?;
    drop(tail);
    let next = scene.backup(&order)?;
    let why = format!(
        "it had {SIZE} bytes in the base {} and has {} now",
        base.id,
        SIZE + 512
    );
    next.assert_read_in_full_because("da", &why);
    next.assert_base("db", Some(&base));
    let last = scene.backup(&order)?;
    last.assert_base("da", Some(&next));
    Ok(())
}

#[test]
fn swapped_disks_of_equal_size_are_both_read_in_full() -> Result<()> {
    let mut scene = Scene::new(&two_qcow2())?;
    let order = scene.order()?;
    let base = scene.backup(&order)?;
    let swap = |daemon: &mut StorageDaemon| {
        let [one, other] = &mut daemon.disks_mut()[..] else {
            anyhow::bail!("not two disks");
        };
        std::mem::swap(&mut one.path, &mut other.path);
        Ok(())
    };
    scene.restart(swap)?;
    let swapped = scene.backup(&order)?;
    swapped.assert_read_in_full_because("da", "its image carries the bitmap of web/db");
    swapped.assert_read_in_full_because("db", "its image carries the bitmap of web/da");
    for disk in ["da", "db"] {
        assert_eq!(swapped.dirty_bytes(disk), SIZE);
    }
    // Back again; what was written while they were swapped is in neither file's old backup.
    scene.restart(swap)?;
    let back = scene.backup(&order)?;
    for disk in ["da", "db"] {
        let base_of_disk = &back.volume(disk)["base"];
        ensure!(*base_of_disk != swapped.id.as_str(), "{}", back.said);
        ensure!(*base_of_disk == base.id.as_str() || base_of_disk.is_null());
    }
    Ok(())
}

#[test]
fn a_second_archive_does_not_disturb_the_first() -> Result<()> {
    let mut scene = Scene::new(&[Disk::qcow2("da", SIZE)])?;
    let to_first = scene.order()?;
    let second = scene.site.path("second");
    std::fs::create_dir(&second)?;
    let to_second = Order {
        archive: second,
        ..to_first.clone()
    };
    let first = scene.backup(&to_first)?;
    let other = scene.backup(&to_second)?;
    other.assert_base("da", None);
    let next = scene.backup(&to_first)?;
    next.assert_base("da", Some(&first));
    let other_next = scene.backup(&to_second)?;
    other_next.assert_base("da", Some(&other));
    assert_eq!(scene.bitmaps("da")?.len(), 2);
    Ok(())
}

#[test]
fn a_base_that_left_the_archive_is_not_built_on() -> Result<()> {
    let mut scene = Scene::new(&[Disk::raw("da", SIZE)])?;
    let order = scene.order()?;
    let base = scene.backup(&order)?;
    let next = scene.backup(&order)?;
    std::fs::remove_dir_all(folder_of(&order.archive, &next)?)?;
    let last = scene.backup(&order)?;
    let why = format!("the archive holds no backup {} to build on", next.id);
    last.assert_read_in_full_because("da", &why);
    assert_eq!(scene.site.list(&order.archive)?, [base.id, last.id]);
    assert_eq!(scene.bitmaps("da")?.len(), 1);
    Ok(())
}

#[test]
fn a_full_backup_can_be_asked_for_and_is_built_on() -> Result<()> {
    let mut scene = Scene::new(&[Disk::qcow2("da", SIZE)])?;
    let order = scene.order()?;
    scene.backup(&order)?;
    let in_full = Order {
        full: true,
        ..order.clone()
    };
    let full = scene.backup(&in_full)?;
    full.assert_read_in_full_because("da", "--full");
    assert_eq!(full.dirty_bytes("da"), SIZE);
    assert_eq!(scene.bitmaps("da")?.len(), 1);
    let next = scene.backup(&order)?;
    next.assert_base("da", Some(&full));
    Ok(())
}

#[test]
fn a_change_that_no_bitmap_saw_does_not_hide() -> Result<()> {
    let mut scene = Scene::new(&[])?;
    let content = scene.site.path("content.raw");
    Random::new(98).fill_file(&content, SIZE / MIB)?;
    scene
        .daemon
        .add_disk(&Disk::qcow2("da", SIZE).holding(&content))?;
    let order = scene.order()?;
    scene.backup(&order)?;
    // Behind QEMU's back, while it is down: the bitmap in the file goes on saying that all is clean.
    scene.restart(|daemon| {
        let path = &daemon.disks()[0].path;
        let mut file = std::fs::read(path)?;
        for cluster in file.chunks_exact_mut(64 << 10) {
            // The guest's bytes are random; qcow2's own tables are mostly zero.
            if cluster.iter().filter(|byte| **byte == 0).count() < 1024 {
                cluster.iter_mut().for_each(|byte| *byte ^= 0x55);
            }
        }
        Ok(std::fs::write(path, file)?)
    })?;
    let next = scene.site.backup(&order)?;
    next.assert_base("da", None);
    assert_eq!(next.dirty_bytes("da"), SIZE);
    let warned = next.said.contains("although no bitmap says so");
    ensure!(warned, "{}", next.said);
    let references = scene.proxy.references()?;
    scene.site.check(&order, &next, &references)
}

fn folder_of(archive: &Path, backup: &Backup) -> Result<std::path::PathBuf> {
    let namespaces = std::fs::read_dir(archive.join("namespaces"))?;
    namespaces
        .filter_map(|namespace| Some(namespace.ok()?.path().join("backups").join(&backup.id)))
        .find(|folder| folder.is_dir())
        .with_context(|| format!("no folder of backup {}", backup.id))
}

/// Each is asked by several connections what is dirty, and QEMU's server takes no more than a hundred.
#[test]
fn many_disks_share_the_connections_that_qemu_takes() -> Result<()> {
    let names: Vec<_> = (0..16).map(|number| format!("d{number}")).collect();
    let disks: Vec<_> = names.iter().map(|name| Disk::raw(name, 4 * MIB)).collect();
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let site = Site::new()?;
    let order = site.order(&daemon, "chunked")?;
    let first = site.backup(&order)?;
    let block = vec![7; 64 << 10];
    for name in &names {
        let mut disk = daemon.writer_access(name)?;
        // Every other block, so that there is something to ask of each.
        for number in (0..64).step_by(2) {
            disk.write(number * block.len() as u64, &block)?;
        }
        disk.flush()?;
    }
    let second = site.backup(&order)?;
    for name in &names {
        second.assert_base(name, Some(&first));
        assert_eq!(second.dirty_bytes(name), 2 * MIB);
    }
    let restored = site.restore(&order.archive, &second.id)?;
    for (name, disk) in names.iter().zip(daemon.disks()) {
        compare::same_bytes(&restored.join(format!("{name}.raw")), &disk.path)?;
    }
    Ok(())
}
