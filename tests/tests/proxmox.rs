//! Proxmox's QEMU, by a process that stands for it: its backup-access API makes the point in time, both forms of its
//! arguments, and nothing of ours stays there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, MIB, Order, QemuState, Random, Site, StorageDaemon, compare, eventually,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: u64 = 8 * MIB;
const BLOCK: u64 = 64 << 10;

/// A storage daemon with two disks, and the process before it.
struct Scene {
    site: Site,
    daemon: StorageDaemon,
    random: Random,
    proxmox: Child,
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.proxmox.kill();
        let _ = self.proxmox.wait();
    }
}

impl Scene {
    fn new(arguments: &[&str]) -> Result<Self> {
        let disks = [
            Disk::raw("drive-scsi0", SIZE),
            Disk::qcow2("drive-efidisk0", MIB),
        ];
        let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
        let site = Site::new()?;
        fs::create_dir(site.path("copies"))?;
        let proxmox = Command::new(env!("CARGO_BIN_EXE_fleecebox-proxmox-qemu"))
            .arg("--listen")
            .arg(site.path("pve.qmp"))
            .arg("--qemu")
            .arg(&daemon.monitors().product)
            .arg("--own")
            .arg(&daemon.monitors().control)
            .arg("--copies")
            .arg(site.path("copies"))
            .arg("--log")
            .arg(site.path("pve.log"))
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()?;
        let mut scene = Self {
            site,
            daemon,
            random: Random::new(21),
            proxmox,
        };
        eventually("the process to listen", LIMIT, || {
            Ok(scene.site.path("pve.qmp").exists().then_some(()))
        })?;
        for node in ["drive-scsi0", "drive-efidisk0"] {
            scene.write(node, 0, 12)?;
        }
        Ok(scene)
    }

    fn write(&mut self, node: &str, block: u64, blocks: u64) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(blocks * BLOCK)?];
        self.random.fill(&mut bytes);
        Ok(self
            .daemon
            .writer_access(node)?
            .write(block * BLOCK, &bytes)?)
    }

    fn order(&self, provider: &str) -> Result<Order> {
        Ok(Order {
            qmp: self.site.path("pve.qmp"),
            ..self.site.order(&self.daemon, provider)?
        })
    }

    /// What Proxmox's QEMU copied by itself at its `number`th point in time is what is restored.
    fn check(&self, number: u32, order: &Order, backup: &Backup) -> Result<()> {
        self.site.verify(&order.archive, &backup.id)?;
        let restored = self.site.restore(&order.archive, &backup.id)?;
        for disk in &order.disks {
            let copy = self.site.path(&format!("copies/{number}-{disk}.raw"));
            compare::same_bytes(&restored.join(format!("{disk}.raw")), &copy)?;
        }
        Ok(())
    }

    fn log(&self) -> Result<Vec<Value>> {
        commands(&self.site.path("pve.log"))
    }

    fn state(&self) -> Result<QemuState> {
        QemuState::read(self.daemon.monitors())
    }
}

fn commands(log: &Path) -> Result<Vec<Value>> {
    let text = match log.exists() {
        true => fs::read_to_string(log)?,
        false => String::new(),
    };
    text.lines()
        .map(|line| Ok(serde_json::from_str(line)?))
        .collect()
}

fn count(log: &[Value], command: &str) -> usize {
    log.iter()
        .filter(|entry| entry["execute"] == command)
        .count()
}

fn full_and_incremental(arguments: &[&str]) -> Result<Vec<Value>> {
    let mut scene = Scene::new(arguments)?;
    let order = scene.order("chunked")?;
    let before = scene.state()?;
    let full = scene.site.backup(&order)?;
    scene.check(1, &order, &full)?;
    for said in [
        "drive-scsi0: QEMU's own tracking is not used, 8388608 of 8388608 bytes dirty",
        "drive-efidisk0: QEMU's own tracking is not used",
    ] {
        ensure!(full.said.contains(said), "{said}: {}", full.said);
    }
    scene.write("drive-scsi0", 50, 3)?;
    let next = scene.site.backup(&order)?;
    next.assert_base("drive-scsi0", Some(&full));
    assert_eq!(next.dirty_bytes("drive-scsi0"), 3 * BLOCK);
    assert_eq!(next.dirty_bytes("drive-efidisk0"), 0);
    scene.check(2, &order, &next)?;
    scene.state()?.assert_restored(&before, |_| true);
    let log = scene.log()?;
    assert_eq!(count(&log, "backup-access-setup"), 2);
    Ok(log)
}

#[test]
fn backups_by_backup_access_are_of_the_point_in_time_and_incremental() -> Result<()> {
    let log = full_and_incremental(&[])?;
    let setup = log
        .iter()
        .find(|entry| entry["execute"] == "backup-access-setup");
    let devices = &setup.context("no set-up")?["arguments"]["devices"];
    for (index, device) in ["drive-scsi0", "drive-efidisk0"].iter().enumerate() {
        ensure!(devices[index]["device"] == *device, "{devices}");
        ensure!(devices[index]["bitmap-mode"] == "none", "{devices}");
    }
    Ok(())
}

#[test]
fn so_they_are_with_the_older_form_of_its_arguments() -> Result<()> {
    let log = full_and_incremental(&["--older"])?;
    let setup = log
        .iter()
        .find(|entry| entry["execute"] == "backup-access-setup");
    let list = &setup.context("no set-up")?["arguments"]["devlist"];
    ensure!(*list == "drive-scsi0,drive-efidisk0", "{list}");
    Ok(())
}

#[test]
fn a_set_up_that_fails_leaves_everything_as_it_was() -> Result<()> {
    for (arguments, words) in [
        (["--fail", "no such luck"], "no such luck"),
        (
            ["--action", "used"],
            "tracks it by a bitmap that nobody asked for",
        ),
    ] {
        let scene = Scene::new(&arguments)?;
        let order = scene.order("chunked")?;
        let before = scene.state()?;
        let outcome = scene.site.backup_command(&order).run()?;
        assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
        ensure!(outcome.stderr.contains(words), "{}", outcome.stderr);
        scene.state()?.assert_restored(&before, |_| false);
        scene.site.check_no_fleecing_images()?;
        ensure!(scene.site.list(&order.archive)?.is_empty());
    }
    Ok(())
}

#[test]
fn what_a_killed_job_left_is_taken_down_by_the_next() -> Result<()> {
    let mut scene = Scene::new(&[])?;
    let order = scene.order("chunked")?;
    let full = scene.site.backup(&order)?;
    let before = scene.state()?;
    scene.write("drive-scsi0", 70, 2)?;
    let stalled = scene.order("stalls-half-way")?;
    let running = scene.site.backup_command(&stalled).arg("--full").start()?;
    running.wait_for_line(LIMIT, |line| line.contains("half of it is stored"))?;
    running.kill()?;
    scene.write("drive-scsi0", 90, 1)?;
    let next = scene.site.backup(&order)?;
    next.assert_base("drive-scsi0", Some(&full));
    assert_eq!(next.dirty_bytes("drive-scsi0"), 3 * BLOCK);
    scene.check(3, &order, &next)?;
    scene.state()?.assert_restored(&before, |_| true);
    scene.site.check_no_fleecing_images()
}

#[test]
fn the_form_can_be_set_and_is_refused_where_it_is_not_offered() -> Result<()> {
    let scene = Scene::new(&[])?;
    let order = scene.order("chunked")?;
    scene.site.configure("[vm.web]\npoint-in-time = 'job'\n")?;
    scene.site.backup(&order)?;
    assert_eq!(count(&scene.log()?, "backup-access-setup"), 0);
    scene
        .site
        .configure("[vm.web]\npoint-in-time = 'backup-access'\n")?;
    let stock = Order {
        qmp: PathBuf::from(&scene.daemon.monitors().product),
        ..order.clone()
    };
    // Its monitor serves one client at a time.
    let before = scene.state()?;
    let refused = scene.site.backup_command(&stock).arg("--quiet").run()?;
    refused.assert_refused(2, "does not offer Proxmox's backup-access API");
    scene.state()?.assert_restored(&before, |_| false);
    scene.site.backup(&order)?;
    assert_eq!(count(&scene.log()?, "backup-access-setup"), 1);
    Ok(())
}
