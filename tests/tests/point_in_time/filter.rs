//! The form of the point in time that protects the guest: a filter between device and disk. What becomes of the VM when
//! the job dies, the fleecing image fails, or somebody else moves the disk.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    At, Backup, Disk, Emulator, Fault, Guest, MIB, Order, Proxy, QemuState, Site, Stage,
    StorageDaemon, What, compare, eventually,
};
use serde_json::json;

const SIZE: u64 = 4 * MIB;
const LIMIT: Duration = Duration::from_secs(60);
const BY_FILTER: &str = "[vm.web]\npoint-in-time = 'filter'\n";

/// Two raw disks, `va` and `vb`.
fn two_disks(folder: &Path) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    for name in ["a", "b"] {
        let file = folder.join(name);
        std::fs::File::create(&file)?.set_len(SIZE)?;
        let blockdev = json!({"driver": "raw", "node-name": format!("n{name}"),
            "file": {"driver": "file", "filename": file}});
        let device = format!("virtio-blk-pci,id=v{name},drive=n{name}");
        arguments.extend([
            "-blockdev".into(),
            blockdev.to_string(),
            "-device".into(),
            device,
        ]);
    }
    Ok(arguments)
}

struct Scene {
    site: Site,
    vm: Emulator,
    proxy: Proxy,
    order: Order,
    before: QemuState,
}

impl Scene {
    fn new() -> Result<Self> {
        let site = Site::new()?;
        site.configure(BY_FILTER)?;
        let vm = Emulator::running(two_disks)?;
        let proxy = Proxy::start(vm.monitors())?;
        for device in ["va", "vb"] {
            vm.write(device, 1, 0, SIZE)?;
        }
        Ok(Self {
            order: site.order_for(proxy.socket(), "chunked")?,
            before: QemuState::read(vm.monitors())?,
            site,
            vm,
            proxy,
        })
    }

    fn hold(&self, command: &'static str, number: usize, stage: Stage) {
        self.proxy.forget_commands();
        let at = At::Named(command, number);
        self.proxy.inject(Fault {
            at,
            stage,
            what: What::Hold,
        });
    }

    fn check(&self, backup: &Backup, byte: u8) -> Result<()> {
        self.site.verify(&self.site.archive(), &backup.id)?;
        let restored = self.site.restore(&self.site.archive(), &backup.id)?;
        for device in ["va", "vb"] {
            let bytes = std::fs::read(restored.join(format!("{device}.raw")))?;
            ensure!(bytes.iter().all(|&found| found == byte), "{device} differs");
        }
        QemuState::read(self.vm.monitors())?.assert_restored(&self.before, |_| true);
        self.site.check_no_fleecing_images()
    }
}

#[test]
fn a_vm_whose_job_is_killed_while_it_is_stopped_is_continued_and_cleaned_up() -> Result<()> {
    let scene = Scene::new()?;
    // Before anything is put in, half-way, with all of it in, and after the VM was continued.
    for (command, number, stage) in [
        ("transaction", 1, Stage::BeforeQemu),
        ("qom-set", 1, Stage::BeforeAnswer),
        ("cont", 1, Stage::BeforeQemu),
        ("cont", 1, Stage::BeforeAnswer),
    ] {
        scene.hold(command, number, stage);
        let running = scene.site.backup_command(&scene.order).start()?;
        let held = scene.proxy.wait_held(LIMIT)?;
        let stopped = scene.vm.status()? == "paused";
        ensure!(
            stopped == (stage == Stage::BeforeQemu || command != "cont"),
            "{command}"
        );
        running.process().kill()?;
        held.cut();
        eventually("the watchdog to continue the VM", LIMIT, || {
            Ok((scene.vm.status()? == "running").then_some(()))
        })?;
        // Writes go through, with whatever is left over the disks.
        for device in ["va", "vb"] {
            scene.vm.write(device, 2, 0, SIZE)?;
        }
        let outcome = running.finish()?;
        assert_eq!(outcome.signal(), Some(9));
        let next = scene.site.backup(&scene.order)?;
        ensure!(
            next.said.contains("died at step 'snapshot'"),
            "{}",
            next.said
        );
        scene.check(&next, 2)?;
    }
    Ok(())
}

/// QEMU 10.0.2 aborts on a `qom-set` of the node that the device has already.
#[test]
fn a_disk_that_somebody_else_moved_meanwhile_is_not_moved_again() -> Result<()> {
    let scene = Scene::new()?;
    scene.proxy.forget_commands();
    scene.check(&scene.site.backup(&scene.order)?, 1)?;
    let commands = scene.proxy.commands();
    let before = commands.split(|command| command == "qom-set").next();
    let looks = before.context("no command")?.iter();
    let looks = looks.filter(|command| *command == "query-block").count();
    // The look right before the device is given its filter: what it shows is changed under the held command.
    scene.hold("query-block", looks, Stage::BeforeQemu);
    let running = scene.site.backup_command(&scene.order).start()?;
    let held = scene.proxy.wait_held(LIMIT)?;
    let mut qmp = scene.vm.control()?;
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    let names = nodes
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| node["node-name"].as_str());
    let filter = names
        .filter(|name| name.ends_with("-cbw0"))
        .collect::<Vec<_>>();
    let [filter] = filter[..] else {
        anyhow::bail!("not one filter of the first disk: {nodes}");
    };
    let moved = json!({"path": "/machine/peripheral/va", "property": "drive", "value": filter});
    qmp.execute("qom-set", moved)?;
    drop(qmp);
    held.go_on();
    running.finish()?.assert_success();
    QemuState::read(scene.vm.monitors())?.assert_restored(&scene.before, |_| true);

    scene.check(&scene.site.backup(&scene.order)?, 1)
}

#[test]
fn what_a_filter_cannot_see_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let refused = |name: &str| -> Result<()> {
        let outcome = scene
            .site
            .backup_command(&scene.order)
            .arg("--quiet")
            .run()?;
        outcome.assert_refused(2, name);
        ensure!(scene.vm.status()? == "running");
        scene.site.check_no_fleecing_images()
    };
    let mut qmp = scene.vm.control()?;
    let address = json!({"type": "unix", "data": {"path": scene.vm.path("other.sock")}});
    qmp.execute("nbd-server-start", json!({"addr": address}))?;
    let export = json!({"type": "nbd", "id": "other", "node-name": "na", "name": "other"});
    qmp.execute("block-export-add", export)?;
    drop(qmp);
    refused("through the export other")?;

    // A storage daemon has no machine to stop.
    let daemon = StorageDaemon::start(&[Disk::raw("da", MIB)])?;
    let order = scene.site.order(&daemon, "chunked")?;
    let before = QemuState::read(daemon.monitors())?;
    let outcome = scene.site.backup_command(&order).arg("--quiet").run()?;
    outcome.assert_refused(2, "no machine that could be stopped");
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    Ok(())
}

/// A small file system for fleecing images, unmounted with this value.
struct SmallFolder(PathBuf);

impl Drop for SmallFolder {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_guest_writes_on_when_its_fleecing_image_is_full() -> Result<()> {
    let site = Site::new()?;
    site.configure(BY_FILTER)?;
    let small = SmallFolder(site.path("fleecing"));
    let mut mount = Command::new("mount");
    mount
        .args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"])
        .arg(&small.0);
    if !mount.status()?.success() {
        fleecebox_tests::not_shown("no file system can be mounted here (this needs root)");
        return Ok(());
    }
    let mut guest = Guest::boot(&Guest::usual_disks())?;
    let before = QemuState::read(guest.monitors())?;
    let order = site.order_for(&guest.monitors().product, "chunked")?;
    let agent = guest.agent_socket();
    let command = || site.backup_command(&order).arg("--agent").arg(&agent);
    let running = command().env("FLEECEBOX_STOP_AT", "running").start()?;
    let stat = format!("/proc/{}/stat", running.process().pid);
    eventually("the job to stop itself", LIMIT, || {
        Ok(std::fs::read_to_string(&stat)?
            .contains(") T ")
            .then_some(()))
    })?;
    let filler = small.0.join("filler");
    let full = std::fs::write(&filler, vec![1; 64 << 20]);
    ensure!(full.is_err(), "the file system is not full");
    let position = guest.position();
    for _ in 0..4 {
        guest.wait_for_writes_within(LIMIT)?;
    }
    println!(
        "worst write with a full image: {:?}",
        guest.worst_write_latency(position)
    );
    ensure!(guest.is_running()?, "the guest was stopped");
    std::fs::remove_file(&filler)?;
    let pid = rustix::process::Pid::from_raw(running.process().pid).context("no process")?;
    rustix::process::kill_process(pid, rustix::process::Signal::CONT)?;
    let outcome = running.finish()?;
    // The snapshot broke without a word from QEMU, and the backup must not pass.
    assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
    println!("{}", outcome.stderr);
    QemuState::read(guest.monitors())?.assert_restored(&before, |_| true);
    ensure!(!guest.is_frozen()?);

    let position = guest.position();
    let outcome = command().run()?.assert_success();
    let backup = Backup::told_by(&outcome)?;
    guest.wait_for_writes()?;
    let told = outcome.document()?;
    println!(
        "stopped for {} ms, frozen for {} ms, worst write {:?}",
        told["stopped_ms"],
        told["frozen_ms"],
        guest.worst_write_latency(position)
    );
    let restored = site.restore(&site.archive(), &backup.id)?;
    for volume in ["device-a.raw", "device-b.raw"] {
        compare::ext4_is_clean(&restored.join(volume))?;
    }
    QemuState::read(guest.monitors())?.assert_restored(&before, |_| true);
    Ok(())
}
