//! Proxmox's QEMU, by a process that stands for it: its backup-access API makes the point in time where it is asked for,
//! and nothing of ours stays there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, Emulator, MIB, Order, QemuState, Qmp, Random, Site, StorageDaemon, compare,
    eventually,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: u64 = 8 * MIB;
const BLOCK: u64 = 64 << 10;
const BACKUP_ACCESS: &str = "[vm.web]\npoint-in-time = 'backup-access'\n";

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
        site.configure(BACKUP_ACCESS)?;
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
fn a_set_up_that_is_not_what_was_asked_for_is_taken_back() -> Result<()> {
    let scene = Scene::new(&["--action", "used"])?;
    let order = scene.order("chunked")?;
    let before = scene.state()?;
    let outcome = scene.site.backup_command(&order).run()?;
    assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
    let words = "tracks it by a bitmap that nobody asked for";
    ensure!(outcome.stderr.contains(words), "{}", outcome.stderr);
    scene.state()?.assert_restored(&before, |_| false);
    scene.site.check_no_fleecing_images()?;
    ensure!(scene.site.list(&order.archive)?.is_empty());
    Ok(())
}

/// QEMU does not take back what it had done of it, and nobody else can: it is named, and the rest is taken back.
#[test]
fn what_a_set_up_that_fails_half_way_leaves_is_named() -> Result<()> {
    let mut scene = Scene::new(&["--fail", "no such luck"])?;
    let order = scene.order("chunked")?;
    let mut running = scene.site.backup_command(&order).start()?;
    // Its watchdog would go on trying for a while.
    let code = running.wait_for_the_job()?;
    let said = running.wait_for_line(LIMIT, |line| line.contains("no such luck"))?;
    running.kill()?;
    assert_eq!(code, Some(1), "{said}");
    for words in [
        "no such luck",
        "QEMU left of it ",
        "snapshot-access-0",
        "the form `job` leaves nothing",
    ] {
        ensure!(said.contains(words), "{words}: {said}");
    }
    ensure!(scene.site.list(&order.archive)?.is_empty());
    // The guest goes on, and no bitmap of the failed one is left.
    scene.write("drive-scsi0", 3, 1)?;
    let nodes = scene
        .daemon
        .control()?
        .execute("query-named-block-nodes", json!({"flat": true}))?;
    ensure!(!nodes.to_string().contains("fleecebox:"), "{nodes}");
    Ok(())
}

/// As another program's, such as vzdump: one at a time.
#[test]
fn while_another_program_has_its_backup_access_ours_is_busy_and_a_job_is_not() -> Result<()> {
    let scene = Scene::new(&[])?;
    let order = scene.order("chunked")?;
    let mut other = Qmp::connect(&scene.site.path("pve.qmp"))?;
    let mut devices = Vec::new();
    for (name, size) in [("drive-scsi0", SIZE), ("drive-efidisk0", MIB)] {
        let file = scene.site.path(&format!("vzdump-{name}"));
        fs::File::create(&file)?.set_len(size)?;
        let node = json!({"driver": "raw", "node-name": format!("{name}-fleecing"),
            "file": {"driver": "file", "filename": file}});
        other.execute("blockdev-add", node)?;
        devices.push(json!({"device": name, "bitmap-mode": "none"}));
    }
    let arguments = json!({"target-id": "vzdump", "devices": devices});
    other.execute("backup-access-setup", arguments)?;
    drop(other);
    let before = scene.state()?;
    let busy = scene.site.backup_command(&order).run()?;
    ensure!(
        busy.code() == Some(11),
        "{:?}: {}",
        busy.code(),
        busy.stderr
    );
    let says = "another backup of this VM is under way in QEMU";
    ensure!(busy.stderr.contains(says), "{}", busy.stderr);
    scene.state()?.assert_restored(&before, |_| false);
    scene.site.configure("")?;
    let backup = scene.site.backup(&order)?;
    scene.site.verify(&order.archive, &backup.id)?;
    ensure!(scene.state()?.differences(&before, |_| true).is_empty());
    Ok(())
}

/// In a storage daemon nothing can be stopped, so each disk has a moment of its own, which is said wherever somebody
/// looks; by default there is one moment.
#[test]
fn a_form_that_has_no_one_moment_says_so_and_is_not_the_default() -> Result<()> {
    let scene = Scene::new(&[])?;
    let order = scene.order("chunked")?;
    let asked = scene.site.backup_command(&order).run()?.assert_success();
    let backup = Backup::told_by(&asked)?;
    ensure!(backup.said.contains("not of one moment"), "{}", backup.said);
    ensure!(asked.document()?["moment"] == "one-for-each");
    let archive = order.archive.display().to_string();
    let listed = scene
        .site
        .command(&["list", "--archive", &archive])
        .run()?
        .assert_success();
    ensure!(
        listed.stdout.contains("NOT OF ONE MOMENT"),
        "{}",
        listed.stdout
    );
    let show = scene
        .site
        .command(&["show", &backup.id, "--archive", &archive, "--json"]);
    let shown = show.run()?.assert_success();
    ensure!(shown.stdout.contains("one-for-each"), "{}", shown.stdout);

    // A single disk is of one moment by itself.
    let one = scene
        .site
        .backup_command(&order.clone().only(&["drive-scsi0"]));
    let one = one.run()?.assert_success();
    ensure!(one.document()?["moment"] == "one", "{}", one.stdout);

    scene.site.configure("")?;
    let default = scene.site.backup_command(&order).run()?.assert_success();
    ensure!(default.document()?["moment"] == "one", "{}", default.stdout);
    ensure!(!default.stderr.contains("moment"), "{}", default.stderr);
    assert_eq!(count(&scene.log()?, "backup-access-setup"), 2);
    Ok(())
}

/// A machine with two disks, and the process before it.
fn machine(site: &Site) -> Result<(Emulator, Child)> {
    let vm = Emulator::running(|folder| {
        let mut arguments: Vec<String> = vec!["-device".into(), "virtio-scsi-pci,id=vs".into()];
        for (number, name) in [(0, "scsi0"), (1, "scsi1")] {
            let file = folder.join(name);
            Random::new(number).fill_file(&file, 4)?;
            let drive = format!("if=none,id=drive-{name},format=raw,file={}", file.display());
            let device = format!("scsi-hd,bus=vs.0,id={name},drive=drive-{name}");
            arguments.extend(["-drive".into(), drive, "-device".into(), device]);
        }
        Ok(arguments)
    })?;
    fs::create_dir(site.path("copies"))?;
    site.configure(BACKUP_ACCESS)?;
    let proxmox = Command::new(env!("CARGO_BIN_EXE_fleecebox-proxmox-qemu"))
        .arg("--listen")
        .arg(site.path("pve.qmp"))
        .arg("--qemu")
        .arg(&vm.monitors().product)
        .arg("--own")
        .arg(&vm.monitors().control)
        .arg("--copies")
        .arg(site.path("copies"))
        .arg("--log")
        .arg(site.path("pve.log"))
        .stdin(Stdio::null())
        .spawn()?;
    eventually("the process to listen", LIMIT, || {
        Ok(site.path("pve.qmp").exists().then_some(()))
    })?;
    Ok((vm, proxmox))
}

#[test]
fn a_machine_is_stopped_for_it_so_that_there_is_one_moment() -> Result<()> {
    let site = Site::new()?;
    let (vm, mut proxmox) = machine(&site)?;
    let order = Order {
        disks: vec!["scsi0".into(), "scsi1".into()],
        ..site.order_for(&site.path("pve.qmp"), "chunked")?
    };
    let outcome = site.backup_command(&order).run()?.assert_success();
    let told = outcome.document()?;
    ensure!(told["moment"] == "one", "{told}");
    ensure!(told["stopped_ms"].as_f64() > Some(0.0), "{told}");
    assert_eq!(vm.status()?, "running");
    let backup = Backup::told_by(&outcome)?;
    let restored = site.restore(&order.archive, &backup.id)?;
    for name in ["scsi0", "scsi1"] {
        compare::same_bytes(&restored.join(format!("{name}.raw")), &vm.path(name))?;
    }
    proxmox.kill()?;
    proxmox.wait()?;
    Ok(())
}

#[test]
fn a_disk_that_was_unplugged_meanwhile_does_not_cost_the_vm() -> Result<()> {
    let site = Site::new()?;
    let (vm, mut proxmox) = machine(&site)?;
    let order = Order {
        disks: vec!["scsi0".into(), "scsi1".into()],
        ..site.order_for(&site.path("pve.qmp"), "stalls-half-way")?
    };
    let mut running = site.backup_command(&order).start()?;
    running.wait_for_line(LIMIT, |line| line.contains("half of it is stored"))?;
    // Unplugged as the machine's end does it: no guest has to agree.
    vm.control()?
        .execute("device_del", json!({"id": "scsi1"}))?;
    eventually("the disk to be unplugged", LIMIT, || {
        let devices = vm.devices()?;
        Ok(devices
            .iter()
            .all(|(qdev, _)| !qdev.contains("scsi1"))
            .then_some(()))
    })?;
    let job = rustix::process::Pid::from_raw(running.process().pid).context("no such process")?;
    rustix::process::kill_process(job, rustix::process::Signal::TERM)?;
    running.wait_for_the_job()?;
    running.wait_for_line(LIMIT, |line| {
        line.contains("drive-scsi1 was unplugged or moved meanwhile")
    })?;
    // It would go on trying for a while.
    running.kill()?;
    assert_eq!(vm.status()?, "running");
    proxmox.kill()?;
    proxmox.wait()?;
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
    scene.site.configure(BACKUP_ACCESS)?;
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
