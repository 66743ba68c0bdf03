//! A machine with one disk, whose images come and go.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Backup, Emulator, MIB, Order, Site, eventually};
use serde_json::{Value, json};

pub(crate) const SIZE: u64 = 16 * MIB;
pub(crate) const BLOCK: u64 = 64 << 10;
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const DISK: &str = "va";

/// One disk of a machine without a guest, and where its backups go.
pub(crate) struct Scene {
    pub(crate) vm: Emulator,
    pub(crate) site: Site,
    pub(crate) order: Order,
    /// Byte for the next write, so that no two are alike.
    next: u8,
}

pub(crate) fn qemu_img<const N: usize>(arguments: [&str; N]) -> Result<()> {
    let output = Command::new("qemu-img").args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "qemu-img {arguments:?}: {said}");
    Ok(())
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the folder's name is plain")
}

impl Scene {
    /// `start.qcow2` over `template.qcow2`, which holds data.
    pub(crate) fn new() -> Result<Self> {
        let scene = Self::without_images()?;
        let template = scene.template("template.qcow2", 1)?;
        scene.overlay(&scene.path("start.qcow2"), &template)?;
        scene.started("start.qcow2")
    }

    pub(crate) fn without_images() -> Result<Self> {
        let vm = Emulator::new(|_| Ok(Vec::new()))?;
        let site = Site::new()?;
        let mut order = site.order_for(&vm.monitors().product, "chunked")?;
        order.disks = vec![DISK.into()];
        Ok(Self {
            vm,
            site,
            order,
            next: 10,
        })
    }

    pub(crate) fn started(mut self, active: &str) -> Result<Self> {
        self.start(active, "")?;
        Ok(self)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.vm.path(name)
    }

    /// An image whose first 4 MiB hold `byte`.
    pub(crate) fn template(&self, name: &str, byte: u8) -> Result<PathBuf> {
        let path = self.path(name);
        qemu_img(["create", "-q", "-f", "qcow2", text(&path), "16M"])?;
        self.write_offline(&path, byte, 0, 4 * MIB)?;
        Ok(path)
    }

    pub(crate) fn overlay(&self, path: &Path, below: &Path) -> Result<()> {
        qemu_img([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(below),
            "-F",
            "qcow2",
            text(path),
        ])
    }

    pub(crate) fn write_offline(
        &self,
        path: &Path,
        byte: u8,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        let line = format!("write -P {byte} {offset} {length}");
        let output = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", &line])
            .arg(path)
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    }

    /// Starts the machine on that image.
    pub(crate) fn start(&mut self, active: &str, device: &str) -> Result<()> {
        let file = self.path(active);
        let node = json!({"driver": "qcow2", "node-name": "active", "file": {"driver": "file", "filename": file}});
        let device = format!("virtio-blk-pci,id={DISK},drive=active{device}");
        self.vm
            .start(&["-S", "-blockdev", &node.to_string(), "-device", &device])
    }

    pub(crate) fn restart(&mut self, active: &str) -> Result<()> {
        self.vm.quit()?;
        self.start(active, "")
    }

    pub(crate) fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.vm.control()?.execute(command, arguments)?)
    }

    /// The guest writes a block that no one wrote before, and forces it to the image.
    pub(crate) fn write(&mut self, block: u64) -> Result<()> {
        self.next += 1;
        self.vm.write(DISK, self.next, block * BLOCK, BLOCK)?;
        self.flush()
    }

    /// So that others see in the image what the machine sees.
    pub(crate) fn flush(&self) -> Result<()> {
        let (path, _) = self.vm.devices()?.remove(0);
        let line = json!({"command-line": format!("qemu-io -d {path} flush")});
        self.qmp("human-monitor-command", line).map(drop)
    }

    /// The node of the machine's disk, and its bitmaps by name.
    pub(crate) fn active(&self) -> Result<(String, Vec<String>)> {
        let blocks = self.qmp("query-block", json!({}))?;
        let inserted = &blocks[0]["inserted"];
        let bitmaps = inserted["dirty-bitmaps"].as_array().into_iter().flatten();
        let names = bitmaps.filter_map(|bitmap| bitmap["name"].as_str().map(Into::into));
        let node = inserted["node-name"].as_str().context("no node")?;
        Ok((node.into(), names.collect()))
    }

    /// An overlay above the disk, as libvirt makes one: each bitmap that records gets an empty one of its name there.
    pub(crate) fn snapshot(&self, name: &str) -> Result<()> {
        let (_, bitmaps) = self.active()?;
        self.snapshot_carrying(name, &bitmaps)
    }

    pub(crate) fn snapshot_carrying(&self, name: &str, bitmaps: &[String]) -> Result<()> {
        let (node, _) = self.active()?;
        let path = self.path(&format!("{name}.qcow2"));
        let below = self.qmp("query-block", json!({}))?;
        let below = below[0]["inserted"]["file"]
            .as_str()
            .context("no file")?
            .to_string();
        self.overlay(&path, Path::new(&below))?;
        self.qmp(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "backing": null,
            "file": {"driver": "file", "filename": path}}),
        )?;
        let adds = bitmaps.iter().map(|bitmap| {
            json!({"type": "block-dirty-bitmap-add",
                "data": {"node": name, "name": bitmap, "persistent": true}})
        });
        let snapshot =
            json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": name}});
        let actions: Vec<Value> = adds.chain([snapshot]).collect();
        self.qmp("transaction", json!({"actions": actions}))
            .map(drop)
    }

    /// A block job up to its end, with the pivot where it waits for one.
    pub(crate) fn job(&self, command: &str, mut arguments: Value) -> Result<()> {
        arguments["job-id"] = json!("job");
        let mut qmp = self.vm.control()?;
        qmp.execute(command, arguments)?;
        eventually("the block job", LIMIT, || {
            let jobs = qmp.execute("query-block-jobs", json!({}))?;
            let Some(job) = jobs.as_array().and_then(|jobs| jobs.first()) else {
                return Ok(Some(()));
            };
            if job["status"] == "ready" {
                qmp.execute("job-complete", json!({"id": "job"}))?;
            }
            Ok(None)
        })
    }

    pub(crate) fn backup(&self) -> Result<Backup> {
        self.site.backup(&self.order)
    }

    /// A backup that restores to what is in the machine's image now.
    pub(crate) fn right(&self) -> Result<Backup> {
        let backup = self.backup()?;
        self.holds_the_disk(&backup)?;
        Ok(backup)
    }

    /// The same, of what changed since `base`.
    pub(crate) fn incremental(&self, base: &Backup, blocks: u64) -> Result<Backup> {
        let backup = self.right()?;
        backup.assert_base(DISK, Some(base));
        ensure!(
            backup.dirty_bytes(DISK) == blocks * BLOCK,
            "{:?}",
            backup.volumes
        );
        Ok(backup)
    }

    /// The same, read in full for this reason, and the next one is an increment again.
    pub(crate) fn full_because(&self, why: &str) -> Result<()> {
        let foretold = self.foretold()?;
        let backup = self.right()?;
        backup.assert_read_in_full_because(DISK, why);
        let reason = foretold["reason"].as_str().unwrap_or_default();
        ensure!(
            foretold["mode"] != "incremental" && reason.contains(why),
            "{foretold}"
        );
        let next = self.right()?;
        if foretold["mode"] == "full" {
            next.assert_base(DISK, Some(&backup));
        }
        Ok(())
    }

    pub(crate) fn foretold(&self) -> Result<Value> {
        let outcome = self
            .site
            .backup_command(&self.order)
            .arg("--dry-run")
            .run()?;
        Ok(outcome.assert_success().document()?["disks"][0].clone())
    }

    pub(crate) fn holds_the_disk(&self, backup: &Backup) -> Result<()> {
        self.flush()?;
        let blocks = self.qmp("query-block", json!({}))?;
        let active = blocks[0]["inserted"]["file"].as_str().context("no file")?;
        let restored = self.site.restore(&self.order.archive, &backup.id)?;
        let raw = restored.join(format!("{DISK}.raw"));
        qemu_img([
            "compare",
            "-U",
            "-f",
            "raw",
            "-F",
            "qcow2",
            text(&raw),
            active,
        ])
        .with_context(|| format!("backup {}:\n{}", backup.id, backup.said))
    }
}
