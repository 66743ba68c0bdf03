//! What an operator, a guest or another tool does to a VM in the middle of its backup and between two backups: a reset, a
//! resize, an unplugged disk, another backup tool at work. Each time: what the VM keeps, what the archive keeps, and what
//! the next run does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    At, Backup, Emulator, Fault, Held, MIB, Order, Proxy, QemuState, Qmp, QmpError, Running, Site,
    Stage, What,
};
use serde_json::{Value, json};

const SIZE: u64 = 8 * MIB;
const BLOCK: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(60);
const FORMS: [&str; 2] = ["job", "filter"];

/// `va`, raw on virtio-blk, and `vb`, qcow2 on virtio-scsi, which a guest need not let go of to be unplugged.
fn two_disks(folder: &Path) -> Result<Vec<String>> {
    let (raw, qcow2) = (folder.join("a.raw"), folder.join("b.qcow2"));
    std::fs::File::create(&raw)?.set_len(SIZE)?;
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&qcow2);
    ensure!(create.arg(SIZE.to_string()).status()?.success());
    let blockdev = |driver: &str, node: &str, file: &Path| {
        json!({"driver": driver, "node-name": node, "file": {"driver": "file", "filename": file}})
            .to_string()
    };
    let words = [
        "-blockdev",
        &blockdev("raw", "na", &raw),
        "-device",
        "virtio-blk-pci,id=va,drive=na",
        "-blockdev",
        &blockdev("qcow2", "nb", &qcow2),
        "-device",
        "virtio-scsi-pci,id=scsi",
        "-device",
        "scsi-hd,id=vb,drive=nb",
    ];
    Ok(words.map(Into::into).to_vec())
}

/// A machine without a guest, whose devices write on command, and what they wrote.
struct Scene {
    vm: Emulator,
    proxy: Proxy,
    site: Site,
    order: Order,
    before: QemuState,
    /// What each disk holds.
    contents: BTreeMap<&'static str, Vec<u8>>,
}

impl Scene {
    fn new(form: &str) -> Result<Self> {
        let site = Site::new()?;
        site.configure(&format!("[vm.web]\npoint-in-time = '{form}'\n"))?;
        let vm = Emulator::running(two_disks)?;
        let proxy = Proxy::start(vm.monitors())?;
        let blank = vec![0; SIZE as usize];
        let mut scene = Self {
            order: site.order_for(proxy.socket(), "chunked")?,
            before: QemuState::read(vm.monitors())?,
            site,
            vm,
            proxy,
            contents: BTreeMap::from([("va", blank.clone()), ("vb", blank)]),
        };
        for disk in ["va", "vb"] {
            scene.write(disk, 1, 0, SIZE / 2)?;
        }
        Ok(scene)
    }

    fn write(&mut self, disk: &'static str, byte: u8, offset: u64, length: u64) -> Result<()> {
        self.vm.write(disk, byte, offset, length)?;
        let content = self.contents.get_mut(disk).context("no such disk")?;
        content[offset as usize..][..length as usize].fill(byte);
        Ok(())
    }

    /// Starts a backup and stops it when its point in time is there and nothing has been read.
    fn held(&self) -> Result<(Running, Held)> {
        self.proxy.forget_commands();
        self.proxy.inject(Fault {
            at: At::Named("block-export-add", 1),
            stage: Stage::BeforeQemu,
            what: What::Hold,
        });
        let running = self.site.backup_command(&self.order).start()?;
        match self.proxy.wait_held(LIMIT) {
            Ok(held) => Ok((running, held)),
            Err(error) => Err(error.context(running.finish()?.stderr)),
        }
    }

    fn backup(&self) -> Result<Backup> {
        let backup = self.site.backup(&self.order)?;
        self.proxy.references()?;
        Ok(backup)
    }

    fn holds(&self, backup: &Backup, contents: &BTreeMap<&str, Vec<u8>>) -> Result<()> {
        self.site.verify(&self.site.archive(), &backup.id)?;
        let restored = self.site.restore(&self.site.archive(), &backup.id)?;
        for (disk, content) in contents {
            let bytes = std::fs::read(restored.join(format!("{disk}.raw")))?;
            let differs = bytes
                .iter()
                .zip(content)
                .position(|(one, other)| one != other);
            ensure!(
                bytes.len() == content.len() && differs.is_none(),
                "{disk} of {}: {} bytes where {} were expected, the first difference at {differs:?}",
                backup.id,
                bytes.len(),
                content.len()
            );
        }
        Ok(())
    }

    /// Nothing of the job is left, in QEMU or in the folder for fleecing images, and the VM runs.
    fn undisturbed(&self) -> Result<()> {
        self.proxy.references()?;
        QemuState::read(self.vm.monitors())?.assert_restored(&self.before, |_| true);
        ensure!(self.vm.status()? == "running");
        self.site.check_no_fleecing_images()
    }

    /// A backup as if nothing had been, and incremental on `base`.
    fn next(&self, base: &Backup) -> Result<()> {
        let next = self.backup()?;
        for disk in self.contents.keys() {
            next.assert_base(disk, Some(base));
        }
        self.holds(&next, &self.contents)?;
        self.undisturbed()
    }
}

#[test]
fn a_reset_machine_is_backed_up_as_if_it_had_not_been_reset() -> Result<()> {
    for form in FORMS {
        let mut scene = Scene::new(form)?;
        let expected = scene.contents.clone();
        let (running, held) = scene.held()?;
        let mut qmp = scene.vm.control()?;
        qmp.execute("system_reset", json!({}))?;
        qmp.event("RESET", LIMIT, |_| true)?;
        drop(qmp);
        scene.write("va", 2, 0, MIB)?;
        held.go_on();
        let backup = Backup::told_by(&running.finish()?.assert_success())?;
        scene.holds(&backup, &expected).context(form)?;
        scene.undisturbed()?;
        scene.next(&backup).context(form)?;
    }
    Ok(())
}

fn resize(qmp: &mut Qmp, node: &str, size: u64) -> Result<Value, QmpError> {
    qmp.execute("block_resize", json!({"node-name": node, "size": size}))
}

/// QEMU itself refuses it: an operator hears why, and tries again after the backup.
#[test]
fn a_resize_in_the_middle_of_a_backup_is_refused_by_qemu() -> Result<()> {
    for form in FORMS {
        let mut scene = Scene::new(form)?;
        let base = scene.backup()?;
        for size in [SIZE + MIB, SIZE / 4] {
            scene.write("va", 2, 0, BLOCK)?;
            let expected = scene.contents.clone();
            let (running, held) = scene.held()?;
            let mut qmp = scene.vm.control()?;
            for node in ["na", "nb"] {
                let resized = resize(&mut qmp, node, size);
                ensure!(
                    matches!(resized, Err(QmpError::Refused { .. })),
                    "{form}: QEMU resizes {node} under a backup"
                );
            }
            drop(qmp);
            held.go_on();
            let backup = Backup::told_by(&running.finish()?.assert_success())?;
            scene.holds(&backup, &expected).context(form)?;
            scene.undisturbed()?;
        }
        ensure!(scene.site.list(&scene.site.archive())?.contains(&base.id));
    }
    Ok(())
}

#[test]
fn a_disk_that_was_resized_between_two_backups_is_read_in_full() -> Result<()> {
    let mut scene = Scene::new("job")?;
    let mut base = scene.backup()?;
    for size in [SIZE + 3 * 512, SIZE / 2 + 512] {
        let mut qmp = scene.vm.control()?;
        for (disk, node) in [("va", "na"), ("vb", "nb")] {
            resize(&mut qmp, node, size)?;
            scene
                .contents
                .get_mut(disk)
                .context("no such disk")?
                .resize(size as usize, 0);
        }
        drop(qmp);
        // Of another size, QEMU shows it otherwise.
        scene.before = QemuState::read(scene.vm.monitors())?;
        scene.write("va", 3, size - 512, 512)?;
        let next = scene.backup()?;
        for disk in ["va", "vb"] {
            let why = format!("in the base {} and has {size} now", base.id);
            next.assert_read_in_full_because(disk, &why);
        }
        scene.holds(&next, &scene.contents)?;
        scene.undisturbed()?;
        base = next;
    }
    scene.next(&base)
}

/// What was cut off is zero now, and neither the size nor a bitmap tells.
#[test]
fn a_disk_that_was_shrunk_and_grown_again_loses_its_tail_in_the_backup_too() -> Result<()> {
    // Up to where the disks hold data, and where the disks were cut.
    for (data, cut) in [
        (SIZE, SIZE / 2),
        (SIZE / 2, SIZE / 4),
        (SIZE / 2, SIZE / 2 - BLOCK),
    ] {
        let mut scene = Scene::new("job")?;
        for disk in ["va", "vb"] {
            scene.write(disk, 4, 0, data)?;
        }
        let base = scene.backup()?;
        let mut qmp = scene.vm.control()?;
        for node in ["na", "nb"] {
            resize(&mut qmp, node, cut)?;
            resize(&mut qmp, node, SIZE)?;
        }
        drop(qmp);
        for content in scene.contents.values_mut() {
            content[cut as usize..].fill(0);
        }
        let next = scene.backup()?;
        scene
            .holds(&next, &scene.contents)
            .with_context(|| format!("data to {data}, cut at {cut}, {}", next.said))?;
        for disk in ["va", "vb"] {
            next.assert_base(disk, None);
        }
        ensure!(
            next.said.contains("although no bitmap says so"),
            "{}",
            next.said
        );
        ensure!(scene.site.list(&scene.site.archive())?.contains(&base.id));
        scene.next(&next)?;
    }
    Ok(())
}

#[test]
fn a_disk_that_is_unplugged_in_the_middle_leaves_nothing_of_the_backup_behind() -> Result<()> {
    for form in FORMS {
        let mut scene = Scene::new(form)?;
        scene.backup()?;
        scene.write("va", 5, 0, BLOCK)?;
        scene.write("vb", 5, 0, BLOCK)?;
        let expected = scene.contents.clone();
        let (running, held) = scene.held()?;
        let mut qmp = scene.vm.control()?;
        qmp.execute("device_del", json!({"id": "vb"}))?;
        qmp.event("DEVICE_DELETED", LIMIT, |event| {
            event["data"]["device"] == "vb"
        })?;
        // The disk itself is still in use.
        let deleted = qmp.execute("blockdev-del", json!({"node-name": "nb"}));
        ensure!(
            matches!(deleted, Err(QmpError::Refused { .. })),
            "{form}: {deleted:?}"
        );
        held.go_on();
        // Its bytes of the point in time are all there.
        let backup = Backup::told_by(&running.finish()?.assert_success())?;
        scene.proxy.references()?;
        scene.holds(&backup, &expected).context(form)?;
        scene.site.check_no_fleecing_images()?;

        // Now nothing holds it any more, and the VM goes on with the other one.
        qmp.execute("blockdev-del", json!({"node-name": "nb"}))
            .with_context(|| format!("{form}: something still holds the disk"))?;
        drop(qmp);
        ensure!(scene.vm.status()? == "running");
        scene.contents.remove("vb");
        let next = scene.backup()?;
        ensure!(next.said.contains("vb was in"), "{}", next.said);
        next.assert_base("va", Some(&backup));
        scene.holds(&next, &scene.contents).context(form)?;
    }
    Ok(())
}

/// What another tool has in QEMU: bitmaps on `va` that it will need, a job that keeps a snapshot of another disk, and an
/// NBD server with an export of it.
struct OtherTool {
    socket: PathBuf,
}

impl OtherTool {
    /// `node` is the disk that its job is on.
    fn at_work(vm: &Emulator, node: &str) -> Result<Self> {
        let socket = vm.path("other.sock");
        let mut qmp = vm.control()?;
        let address = json!({"type": "unix", "data": {"path": socket}});
        let target = vm.path("other.fleecing");
        std::fs::File::create(&target)?.set_len(SIZE)?;
        let target = json!({"driver": "raw", "node-name": "other-target",
            "file": {"driver": "file", "filename": target}});
        for (command, arguments) in [
            (
                "block-dirty-bitmap-add",
                json!({"node": "na", "name": "other-bitmap"}),
            ),
            (
                "block-dirty-bitmap-add",
                json!({"node": "na", "name": "other-off", "disabled": true}),
            ),
            ("blockdev-add", target),
            (
                "blockdev-backup",
                json!({"job-id": "other-job", "device": node, "target": "other-target",
                    "sync": "none", "filter-node-name": "other-filter"}),
            ),
            (
                "blockdev-add",
                json!({"driver": "snapshot-access", "node-name": "other-access",
                    "file": "other-filter"}),
            ),
            ("nbd-server-start", json!({"addr": address})),
            (
                "block-export-add",
                json!({"type": "nbd", "id": "other-export", "node-name": "other-access",
                    "name": "other", "writable": true}),
            ),
        ] {
            qmp.execute(command, arguments)?;
        }
        Ok(Self { socket })
    }

    /// Whether its snapshot reads as `byte` there.
    fn reads(&self, byte: u8, offset: u64, length: u64) -> Result<bool> {
        let uri = format!("nbd+unix:///other?socket={}", self.socket.display());
        let mut read = Command::new("qemu-io");
        let command = format!("read -P {byte} {offset} {length}");
        read.args(["-r", "-f", "raw", "-c", &command]).arg(uri);
        Ok(read.output()?.status.success())
    }
}

#[test]
fn another_backup_tool_keeps_its_bitmaps_its_snapshot_and_its_server() -> Result<()> {
    let mut scene = Scene::new("job")?;
    scene.order = scene.order.only(&["va"]);
    scene.contents.remove("vb");
    let base = scene.backup()?;
    let other = OtherTool::at_work(&scene.vm, "nb")?;
    scene.before = QemuState::read(scene.vm.monitors())?;

    // QEMU has one server, and where it listens only its owner knows.
    let refused = scene
        .site
        .backup_command(&scene.order)
        .arg("--quiet")
        .run()?;
    refused.assert_refused(2, "with the key `nbd`");
    scene.undisturbed()?;
    scene.order.nbd = Some(other.socket.clone());

    scene.write("va", 6, 0, BLOCK)?;
    let expected = scene.contents.clone();
    let (running, held) = scene.held()?;
    scene.write("va", 7, 0, 2 * BLOCK)?;
    scene.vm.write("vb", 8, 0, 2 * BLOCK)?;
    held.go_on();
    let backup = Backup::told_by(&running.finish()?.assert_success())?;
    backup.assert_base("va", Some(&base));
    scene.holds(&backup, &expected)?;
    scene.undisturbed()?;

    // What a killed job of ours left is removed, and nothing of theirs.
    let (running, held) = scene.held()?;
    running.kill()?;
    held.cut();
    let next = scene.backup()?;
    ensure!(next.said.contains("died at step"), "{}", next.said);
    next.assert_base("va", Some(&backup));
    scene.holds(&next, &scene.contents)?;
    scene.undisturbed()?;

    ensure!(other.reads(1, 0, SIZE / 2)?, "its snapshot was spoilt");
    let mut qmp = scene.vm.control()?;
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    let bitmaps = nodes.as_array().into_iter().flatten();
    let bitmaps = bitmaps.filter_map(|node| node["dirty-bitmaps"].as_array());
    let bitmaps: Vec<_> = bitmaps.flatten().collect();
    for (name, recording, bytes) in [("other-bitmap", true, 2 * BLOCK), ("other-off", false, 0)] {
        let bitmap = bitmaps.iter().find(|bitmap| bitmap["name"] == name);
        let bitmap = bitmap.with_context(|| format!("{name} is gone"))?;
        ensure!(
            bitmap["recording"] == recording && bitmap["count"] == bytes,
            "{bitmap}"
        );
    }
    Ok(())
}

/// QEMU runs one backup job on a disk. By filters, which stand above the other tool's, there is room for both.
#[test]
fn a_disk_that_another_tools_job_is_on_is_refused_by_jobs_and_backed_up_by_filters() -> Result<()> {
    for form in FORMS {
        let mut scene = Scene::new(form)?;
        let other = OtherTool::at_work(&scene.vm, "na")?;
        scene.before = QemuState::read(scene.vm.monitors())?;
        scene.order.nbd = Some(other.socket.clone());
        let expected = scene.contents.clone();
        if form == "job" {
            let outcome = scene.site.backup_command(&scene.order).run()?;
            assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
            ensure!(
                outcome.stderr.contains("'other-filter' is busy"),
                "{}",
                outcome.stderr
            );
        } else {
            let (running, held) = scene.held()?;
            scene.write("va", 2, 0, MIB)?;
            held.go_on();
            let backup = Backup::told_by(&running.finish()?.assert_success())?;
            scene.holds(&backup, &expected)?;
        }
        scene.undisturbed()?;
        ensure!(
            other.reads(1, 0, SIZE / 2)?,
            "{form}: its snapshot was spoilt"
        );
    }
    Ok(())
}

/// Any bitmap that records keeps QEMU from reverting; those of Fleecebox's can be seen and dropped.
#[test]
fn a_vm_can_be_reverted_to_an_internal_snapshot_once_its_tracking_is_dropped() -> Result<()> {
    let site = Site::new()?;
    site.configure(&format!(
        "[archive.main]\npath = '{}'\n",
        site.archive().display()
    ))?;
    let vm = Emulator::running(|folder| {
        let words = two_disks(folder)?;
        // What has no internal snapshots cannot be in one.
        Ok(words.into_iter().skip(4).collect())
    })?;
    let order = Order {
        archive: "main".into(),
        ..site.order_for(&vm.monitors().product, "chunked")?
    };
    let hmp = |line: &str| -> Result<String> {
        let said = vm
            .control()?
            .execute("human-monitor-command", json!({"command-line": line}))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    };
    let qmp = vm.monitors().product.clone();
    let tracking = |words: &[&str]| site.command(words).arg("--json").arg("--qmp").arg(&qmp);
    assert_eq!(hmp("savevm before")?, "");
    let first = site.backup(&order)?;
    let other = Order {
        archive: site.path("other"),
        ..order.clone()
    };
    std::fs::create_dir(&other.archive)?;
    let elsewhere = site.backup(&other)?;
    ensure!(
        hmp("loadvm before")?.contains("bitmap"),
        "QEMU reverts in spite of bitmaps"
    );
    // What refused it leaves the machine stopped.
    assert_eq!(hmp("cont")?, "");

    let listed = tracking(&["tracking", "list", "web"])
        .run()?
        .assert_success();
    let listed = listed.document()?;
    let rows = listed.as_array().context("no list")?;
    assert_eq!(rows.len(), 2, "{listed:#}");
    let of = |id: &str| rows.iter().find(|row| row["backup"] == id);
    assert_eq!(of(&first.id).context("not listed")?["archive_name"], "main");
    let gone = of(&elsewhere.id).context("not listed")?;
    assert_eq!(gone["archive_name"], Value::Null);

    // One archive's, by its id, although it is gone.
    std::fs::remove_dir_all(&other.archive)?;
    let id = gone["archive"].as_str().context("no id")?;
    let dropped = tracking(&["tracking", "drop", "web", "--archive", id]).run()?;
    assert_eq!(
        dropped
            .assert_success()
            .document()?
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    let next = site.backup(&order)?;
    next.assert_base("vb", Some(&first));

    // Not while a job runs.
    let running = site
        .backup_command(&order)
        .env("FLEECEBOX_STOP_AT", "proving")
        .start()?;
    let stat = format!("/proc/{}/stat", running.process().pid);
    fleecebox_tests::eventually("the job to stop itself", LIMIT, || {
        Ok(std::fs::read_to_string(&stat)?
            .contains(") T ")
            .then_some(()))
    })?;
    let dead = site
        .command(&["tracking", "drop", "web", "--all"])
        .arg("--qmp")
        .arg(&vm.monitors().control);
    dead.run()?.assert_refused(11, "another job is running");
    running.kill()?;
    dead.run()?.assert_refused(2, "fleecebox recover");
    let recover = site.command(&["recover", "web", "--archive", "main"]);
    recover
        .arg("--qmp")
        .arg(&qmp)
        .arg("--fleecing")
        .arg(site.path("fleecing"))
        .run()?
        .assert_success();

    tracking(&["tracking", "drop", "web", "--all"])
        .run()?
        .assert_success();
    assert_eq!(hmp("loadvm before")?, "");
    let full = site.backup(&order)?;
    full.assert_base("vb", None);
    Ok(())
}
