//! Disks as operators attach them, all in one machine, in both forms of the point in time. What the devices write before
//! and after it is known byte by byte.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    At, Backup, Emulator, Fault, MIB, Order, Proxy, QemuState, Random, Site, Stage, What,
};
use serde_json::json;

const SIZE: u64 = 8 * MIB;
const LIMIT: Duration = Duration::from_secs(60);
/// Half of the smallest unit of tracking, so that offsets fall within blocks as well as between them.
const PIECE: u64 = 32 << 10;

/// A block device of the host, detached with this value.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path) -> Result<Option<Self>> {
        std::fs::File::create(file)?.set_len(SIZE)?;
        let attached = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        let device = attached.ok().filter(|output| output.status.success());
        let Some(device) = device else {
            fleecebox_tests::not_shown(
                "a block device of the host (losetup needs root and /dev/loop-control)",
            );
            return Ok(None);
        };
        Ok(Some(Self(
            String::from_utf8(device.stdout)?.trim_end().into(),
        )))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

fn qcow2(folder: &Path, name: &str, options: &str) -> Result<String> {
    let path = folder.join(format!("{name}.qcow2"));
    let mut create = Command::new("qemu-img");
    create
        .args(["create", "-q", "-f", "qcow2", "-o"])
        .arg(format!("preallocation=off{options}"));
    ensure!(
        create.arg(&path).arg(SIZE.to_string()).status()?.success(),
        "qemu-img create"
    );
    Ok(path.to_str().context("UTF-8")?.into())
}

fn raw(folder: &Path, name: &str) -> Result<String> {
    let path = folder.join(format!("{name}.raw"));
    std::fs::File::create(&path)?.set_len(SIZE)?;
    Ok(path.to_str().context("UTF-8")?.into())
}

/// Every way to attach a disk that is tested.
fn machine(folder: &Path, host_device: Option<&Loop>) -> Result<Vec<String>> {
    let file = |path: &str| json!({"driver": "file", "filename": path});
    let data = |name: &str| folder.join(name).display().to_string();
    let external = format!(",data_file={}", data("external.data"));
    let mut blockdevs = vec![
        json!({"driver": "raw", "node-name": "raw", "file": file(&raw(folder, "raw")?)}),
        json!({"driver": "qcow2", "node-name": "qcow2", "file": file(&qcow2(folder, "qcow2", "")?)}),
        json!({"driver": "throttle", "node-name": "throttled", "throttle-group": "limits",
            "file": {"driver": "qcow2", "file": file(&qcow2(folder, "throttled", "")?)}}),
        json!({"driver": "raw", "node-name": "threaded", "file": file(&raw(folder, "threaded")?)}),
        json!({"driver": "qcow2", "node-name": "external", "file": file(&qcow2(folder, "external", &external)?)}),
        json!({"driver": "raw", "node-name": "on-ide", "file": file(&raw(folder, "on-ide")?)}),
    ];
    let mut devices = vec![
        "virtio-blk-pci,id=d-raw,drive=raw".to_string(),
        "virtio-scsi-pci,id=scsi0".into(),
        "scsi-hd,id=d-qcow2,drive=qcow2,bus=scsi0.0".into(),
        "virtio-blk-pci,id=d-throttled,drive=throttled".into(),
        "virtio-blk-pci,id=d-threaded,drive=threaded,iothread=thread0".into(),
        "virtio-scsi-pci,id=scsi1,iothread=thread1".into(),
        "scsi-hd,id=d-external,drive=external,bus=scsi1.0".into(),
        "ide-hd,id=d-ide,drive=on-ide".into(),
        // An old-style drive, and a device without an id.
        "virtio-blk-pci,drive=old-b".into(),
    ];
    if let Some(Loop(path)) = host_device {
        blockdevs.push(json!({"driver": "raw", "node-name": "host",
            "file": {"driver": "host_device", "filename": path}}));
        devices.push("virtio-blk-pci,id=d-host,drive=host".into());
    }
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.to_string(), value]);
    add("-object", "iothread,id=thread0".into());
    add("-object", "iothread,id=thread1".into());
    add(
        "-object",
        "throttle-group,id=limits,x-iops-total=20000".into(),
    );
    for blockdev in blockdevs {
        add("-blockdev", blockdev.to_string());
    }
    add(
        "-drive",
        format!(
            "file={},format=qcow2,if=virtio,id=old-a",
            qcow2(folder, "old-a", "")?
        ),
    );
    add(
        "-drive",
        format!("file={},format=raw,if=none,id=old-b", raw(folder, "old-b")?),
    );
    for device in devices {
        add("-device", device);
    }
    Ok(arguments)
}

/// What each disk must hold, by the volume's name.
struct Disks {
    /// The device's id or path.
    devices: BTreeMap<String, String>,
    contents: BTreeMap<String, Vec<u8>>,
    random: Random,
    worst: Duration,
}

impl Disks {
    fn of(vm: &Emulator) -> Result<Self> {
        let blocks = vm.control()?.execute("query-block", json!({}))?;
        let mut devices = BTreeMap::new();
        for block in blocks.as_array().context("no list")? {
            let text = |field: &str| block[field].as_str().unwrap_or_default().to_string();
            let id = text("qdev");
            let name = match id.strip_prefix("/machine/peripheral/") {
                Some(id) => id.split('/').next().unwrap_or_default().to_string(),
                None if id.starts_with('/') => text("device"),
                None => id.clone(),
            };
            devices.insert(name, id);
        }
        let contents = devices
            .keys()
            .map(|name| (name.clone(), vec![0; SIZE as usize]));
        Ok(Self {
            contents: contents.collect(),
            devices,
            random: Random::new(5),
            worst: Duration::ZERO,
        })
    }

    /// Each device writes `pieces` pieces of `byte`.
    fn write(&mut self, vm: &Emulator, byte: u8, pieces: usize) -> Result<()> {
        for (name, device) in &self.devices {
            for _ in 0..pieces {
                let offset = self.random.below(SIZE / PIECE) * PIECE;
                let took = vm.write(device, byte, offset, PIECE)?;
                self.worst = self.worst.max(took);
                let content = self.contents.get_mut(name).context("no such disk")?;
                content[offset as usize..][..PIECE as usize].fill(byte);
            }
        }
        Ok(())
    }
}

/// Backs up, with writes of `byte` right after the point in time, and holds what is restored against what the disks held
/// then.
fn backup(
    site: &Site,
    order: &Order,
    (vm, proxy): (&Emulator, &Proxy),
    disks: &mut Disks,
    byte: u8,
) -> Result<Backup> {
    let expected = disks.contents.clone();
    let before = QemuState::read(vm.monitors())?;
    proxy.forget_commands();
    proxy.inject(Fault {
        at: At::Named("block-export-add", 1),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    });
    let running = site.backup_command(order).start()?;
    let held = match proxy.wait_held(LIMIT) {
        Ok(held) => held,
        Err(error) => {
            let outcome = running.finish()?;
            return Err(error.context(outcome.stderr));
        }
    };
    assert_eq!(vm.status()?, "running");
    disks.write(vm, byte, 12)?;
    held.go_on();
    let outcome = running.finish()?.assert_success();
    let backup = Backup::told_by(&outcome)?;
    let stopped = &outcome.document()?["stopped_ms"];
    println!(
        "stopped for {stopped} ms; worst write of a device {:?}",
        disks.worst
    );
    site.check_no_fleecing_images()?;
    proxy.references()?;
    QemuState::read(vm.monitors())?.assert_restored(&before, |_| true);
    assert_eq!(backup.volumes.len(), disks.devices.len());
    site.verify(&site.archive(), &backup.id)?;
    let restored = site.restore(&site.archive(), &backup.id)?;
    for (name, content) in &expected {
        let bytes = std::fs::read(restored.join(format!("{name}.raw")))?;
        ensure!(bytes == *content, "{name} of {} differs", backup.id);
    }
    Ok(backup)
}

fn every_disk_in(form: &str) -> Result<()> {
    let site = Site::new()?;
    site.configure(&format!("[vm.web]\npoint-in-time = '{form}'\n"))?;
    let host_device = Loop::attach(&site.path("host.img"))?;
    let vm = Emulator::running(|folder| machine(folder, host_device.as_ref()))?;
    let proxy = Proxy::start(vm.monitors())?;
    let order = site.order_for(proxy.socket(), "chunked")?;
    let mut disks = Disks::of(&vm)?;
    ensure!(disks.devices.len() >= 8, "{:?}", disks.devices);
    disks.write(&vm, 1, 40)?;
    let first = backup(&site, &order, (&vm, &proxy), &mut disks, 2)?;
    disks.write(&vm, 3, 8)?;
    let second = backup(&site, &order, (&vm, &proxy), &mut disks, 4)?;
    for name in disks.devices.keys() {
        second.assert_base(name, Some(&first));
        // Twenty pieces at most since the first, each in one block.
        ensure!(second.dirty_bytes(name) <= 20 * (64 << 10), "{name}");
    }
    Ok(())
}

#[test]
fn every_kind_of_disk_is_backed_up_by_jobs() -> Result<()> {
    every_disk_in("job")
}

#[test]
fn every_kind_of_disk_is_backed_up_by_filters() -> Result<()> {
    every_disk_in("filter")
}

/// As Proxmox VE attaches a disk: the tracking is in the image below the limit, and so it outlives the machine.
#[test]
fn a_disk_with_a_limit_of_io_stays_incremental_over_a_restart() -> Result<()> {
    const DISK: &str = "scsi0";
    let site = Site::new()?;
    let mut vm = Emulator::new(|folder| qcow2(folder, "image", "").map(|_| Vec::new()))?;
    let image = vm.path("image.qcow2");
    let format = format!("f{}", "0123456789abcdef".repeat(2).split_at(30).0);
    let node = json!({"driver": "throttle", "node-name": "drive-scsi0", "throttle-group": "limit",
        "file": {"driver": "qcow2", "node-name": format,
            "file": {"driver": "file", "filename": image}}});
    let node = node.to_string();
    let words = [
        "-object",
        "throttle-group,id=limit,x-iops-total=20000",
        "-blockdev",
        &node,
        "-device",
        "virtio-scsi-pci",
        "-device",
        "scsi-hd,id=scsi0,drive=drive-scsi0",
    ];
    let mut order = site.order_for(&vm.monitors().product, "chunked")?;
    order.disks = vec![DISK.into()];
    let mut last = None;
    for byte in 1..4 {
        vm.start(&words)?;
        vm.write(DISK, byte, u64::from(byte) * MIB, PIECE)?;
        let backup = site.backup(&order)?;
        backup.assert_base(DISK, last.as_ref());
        site.verify(&site.archive(), &backup.id)?;
        let restored = site.restore(&site.archive(), &backup.id)?;
        let bytes = std::fs::read(restored.join(format!("{DISK}.raw")))?;
        for written in 1..=byte {
            ensure!(bytes[usize::from(written) << 20] == written, "{written}");
        }
        last = Some(backup);
        vm.quit()?;
    }
    Ok(())
}
