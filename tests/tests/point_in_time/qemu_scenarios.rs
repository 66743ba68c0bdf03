//! The scenarios by which QEMU tests its own fleecing, expressed as backups of ours: `image-fleecing`,
//! `copy-before-write` and `backup-discard-source` of `tests/qemu-iotests`. Where those use nodes of their own, the
//! product's nodes are here what is tested; what fails or is slow under a fleecing image is put under the product's own.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fleecebox_tests::{
    At, Backup, Emulator, Fault, Held, MIB, Order, Proxy, QemuState, Qmp, Running, Site, Stage,
    What, eventually,
};
use serde_json::{Value, json};

const KIB: u64 = 1024;
const LIMIT: Duration = Duration::from_secs(60);

/// Bytes of one value at an offset.
#[derive(Clone, Copy)]
struct Range {
    byte: u8,
    offset: u64,
    length: u64,
}

const fn range(byte: u8, offset: u64, length: u64) -> Range {
    Range {
        byte,
        offset,
        length,
    }
}

/// One disk, `va`, in a machine without a guest.
struct Scene {
    vm: Emulator,
    proxy: Proxy,
    site: Site,
    order: Order,
    before: QemuState,
    content: Vec<u8>,
}

impl Scene {
    fn new(driver: &str, form: &str, size: u64) -> Result<Self> {
        let site = Site::new()?;
        site.configure(&format!("[vm.web]\npoint-in-time = '{form}'\n"))?;
        let vm = Emulator::running(|folder| one_disk(folder, driver, size))?;
        let proxy = Proxy::start(vm.monitors())?;
        Ok(Self {
            order: site.order_for(proxy.socket(), "chunked")?,
            before: QemuState::read(vm.monitors())?,
            site,
            vm,
            proxy,
            content: vec![0; size as usize],
        })
    }

    fn write(&mut self, ranges: &[Range]) -> Result<()> {
        for &Range {
            byte,
            offset,
            length,
        } in ranges
        {
            self.vm.write("va", byte, offset, length)?;
            self.content[offset as usize..][..length as usize].fill(byte);
        }
        Ok(())
    }

    /// A backup that has its point in time and has read nothing yet.
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

    fn holds(&self, backup: &Backup, content: &[u8]) -> Result<()> {
        self.proxy.references()?;
        let restored = self.site.restore(&self.site.archive(), &backup.id)?;
        let bytes = std::fs::read(restored.join("va.raw"))?;
        std::fs::remove_dir_all(restored)?;
        let differs = bytes
            .iter()
            .zip(content)
            .position(|(one, other)| one != other);
        ensure!(
            bytes.len() == content.len() && differs.is_none(),
            "{} differs at {differs:?}",
            backup.id
        );
        Ok(())
    }

    /// What the machine sees of its disk.
    fn live_disk_reads(&self, ranges: &[Range]) -> Result<()> {
        let devices = self.vm.devices()?;
        let (path, _) = devices.first().context("no device")?;
        let mut qmp = self.vm.control()?;
        let before = self.printed()?.len();
        for Range {
            byte,
            offset,
            length,
        } in ranges
        {
            let line = format!("qemu-io -d {path} \"read -P {byte} {offset} {length}\"");
            let said = qmp.execute("human-monitor-command", json!({"command-line": line}))?;
            ensure!(said == "", "{line}: {said}");
        }
        let printed = self.printed()?;
        let is_wrong = |line: &str| line.contains("failed");
        let wrong = printed[before..].lines().find(|line| is_wrong(line));
        ensure!(wrong.is_none(), "{wrong:?}");
        Ok(())
    }

    /// What a device's command came to, QEMU prints to its own output.
    fn printed(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.vm.path("emulator.log"))?)
    }

    fn undisturbed(&self) -> Result<()> {
        self.proxy.references()?;
        QemuState::read(self.vm.monitors())?.assert_restored(&self.before, |_| true);
        self.site.check_no_fleecing_images()
    }

    /// Bytes that the fleecing images take up.
    fn fleecing(&self) -> Result<u64> {
        let mut bytes = 0;
        for job in std::fs::read_dir(self.site.path("fleecing"))? {
            for image in std::fs::read_dir(job?.path())? {
                bytes += image?.metadata()?.blocks() * 512;
            }
        }
        Ok(bytes)
    }
}

fn one_disk(folder: &Path, driver: &str, size: u64) -> Result<Vec<String>> {
    let file = folder.join("disk");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", driver]).arg(&file);
    ensure!(create.arg(size.to_string()).status()?.success());
    let blockdev = json!({"driver": driver, "node-name": "na",
        "file": {"driver": "file", "filename": file}});
    Ok(vec![
        "-blockdev".into(),
        blockdev.to_string(),
        "-device".into(),
        "virtio-blk-pci,id=va,drive=na".into(),
    ])
}

mod image_fleecing {
    use super::*;

    const SIZE: u64 = 64 * MIB;
    /// What the disk holds at the point in time: at its start, at a MiB, in its middle, and at its very end.
    const PATTERNS: [Range; 4] = [
        range(0x5d, 0, 64 * KIB),
        range(0xd5, MIB, 64 * KIB),
        range(0xdc, 32 * MIB, 64 * KIB),
        range(0xcd, SIZE - 64 * KIB, 64 * KIB),
    ];
    /// What is written over it: all of a pattern, its first half and what is before, its second half and what is after,
    /// and what touches one without hitting it.
    const OVERWRITE: [Range; 4] = [
        range(0xab, 0, 64 * KIB),
        range(0xad, MIB - 32 * KIB, 64 * KIB),
        range(0x1d, 32 * MIB + 32 * KIB, 64 * KIB),
        range(0xea, SIZE - 128 * KIB, 64 * KIB),
    ];
    /// What of these was zero before.
    const ZEROES: [Range; 3] = [
        range(0, MIB - 32 * KIB, 32 * KIB),
        range(0, 32 * MIB + 64 * KIB, 32 * KIB),
        range(0, SIZE - 128 * KIB, 64 * KIB),
    ];
    /// What of the patterns is left.
    const REMAINDER: [Range; 3] = [
        range(0xd5, MIB + 32 * KIB, 32 * KIB),
        range(0xdc, 32 * MIB, 32 * KIB),
        range(0xcd, SIZE - 64 * KIB, 64 * KIB),
    ];

    fn holds_each(content: &[u8], ranges: &[Range]) -> bool {
        ranges.iter().all(|range| {
            let part = &content[range.offset as usize..][..range.length as usize];
            part.iter().all(|&byte| byte == range.byte)
        })
    }

    fn patterns_survive(driver: &str, form: &str) -> Result<()> {
        let mut scene = Scene::new(driver, form, SIZE)?;
        // In full, and as an incremental whose bitmap holds the patterns alone.
        for base in [false, true] {
            if base {
                scene.site.backup(&scene.order)?;
                scene.proxy.references()?;
                // A bitmap counts a write whatever it writes.
                scene.write(&OVERWRITE.map(|range| super::range(0, range.offset, range.length)))?;
            }
            scene.write(&PATTERNS)?;
            let expected = scene.content.clone();
            ensure!(holds_each(&expected, &PATTERNS) && holds_each(&expected, &ZEROES));
            let (running, held) = scene.held()?;
            scene.write(&OVERWRITE)?;
            held.go_on();
            let backup = Backup::told_by(&running.finish()?.assert_success())?;
            ensure!(backup.volume("va")["base"].is_null() != base);
            scene.holds(&backup, &expected)?;
            scene.live_disk_reads(&OVERWRITE)?;
            scene.live_disk_reads(&REMAINDER)?;
            scene.undisturbed()?;
        }
        Ok(())
    }

    #[test]
    fn patterns_and_zeroes_survive_overwriting_by_jobs() -> Result<()> {
        ["raw", "qcow2"]
            .iter()
            .try_for_each(|driver| patterns_survive(driver, "job"))
    }

    #[test]
    fn patterns_and_zeroes_survive_overwriting_by_filters() -> Result<()> {
        ["raw", "qcow2"]
            .iter()
            .try_for_each(|driver| patterns_survive(driver, "filter"))
    }
}

mod copy_before_write {
    use super::*;

    const SIZE: u64 = 4 * MIB;

    /// The product's fleecing node, and the one below it.
    fn fleecing_nodes(qmp: &mut Qmp) -> Result<(String, String)> {
        let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
        let nodes: Vec<Value> = nodes.as_array().cloned().unwrap_or_default();
        let name = |node: &Value| node["node-name"].as_str().map(String::from);
        let image = nodes
            .iter()
            .filter_map(name)
            .find(|name| name.starts_with("fbx-") && name.ends_with("-fl0"));
        let image = image.with_context(|| format!("no fleecing node: {nodes:?}"))?;
        let file = nodes.iter().find(|node| node["node-name"] == *image);
        let path = file.and_then(|node| node["file"].as_str());
        let below = nodes
            .iter()
            .find(|node| node["drv"] == "file" && path.is_some_and(|path| node["file"] == path));
        let below = below.and_then(name).context("nothing below it")?;
        Ok((image, below))
    }

    /// Puts a node of the test's own, with these options, between the product's fleecing node and its file.
    fn put_below(scene: &Scene, mut node: Value) -> Result<String> {
        let mut qmp = scene.vm.control()?;
        let (image, below) = fleecing_nodes(&mut qmp)?;
        node["node-name"] = json!("between");
        match node["driver"].as_str() {
            Some("blkdebug") => node["image"] = json!(below),
            _ => node["file"] = json!(below),
        }
        qmp.execute("blockdev-add", node)?;
        let options = json!({"options": [{"driver": "raw", "node-name": image, "discard": "unmap", "file": "between"}]});
        qmp.execute("blockdev-reopen", options)?;
        Ok(image)
    }

    /// Every write to the fleecing image fails from here on.
    fn fail_below(scene: &Scene) -> Result<()> {
        put_below(
            scene,
            json!({"driver": "blkdebug",
                "inject-error": [{"event": "none", "iotype": "write", "errno": 5}]}),
        )
        .map(drop)
    }

    fn slow_down_below(scene: &Scene) -> Result<()> {
        let limits = json!({"qom-type": "throttle-group", "id": "slow",
            "limits": {"bps-write": 1000, "bps-write-max": 1000}});
        scene.vm.control()?.execute("object-add", limits)?;
        put_below(
            scene,
            json!({"driver": "throttle", "throttle-group": "slow"}),
        )
        .map(drop)
    }

    /// The test's node goes when the product's, which stands on it, is gone.
    fn take_away(scene: &Scene) -> Result<()> {
        let mut qmp = scene.vm.control()?;
        qmp.execute("blockdev-del", json!({"node-name": "between"}))?;
        Ok(())
    }

    /// `on-cbw-error=break-snapshot`: the guest does not notice.
    #[test]
    fn what_cannot_be_kept_breaks_the_snapshot_by_filters() -> Result<()> {
        let mut scene = Scene::new("raw", "filter", SIZE)?;
        scene.write(&[range(1, 0, SIZE)])?;
        let (running, held) = scene.held()?;
        fail_below(&scene)?;
        scene.write(&[range(2, MIB, MIB)])?;
        held.go_on();
        let outcome = running.finish()?;
        assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
        ensure!(
            outcome.stderr.contains("reading the snapshot failed"),
            "{}",
            outcome.stderr
        );
        take_away(&scene)?;
        ensure!(scene.site.list(&scene.site.archive())?.is_empty());
        scene.live_disk_reads(&[range(2, MIB, MIB)])?;
        scene.undisturbed()?;
        let next = scene.site.backup(&scene.order)?;
        scene.holds(&next, &scene.content)
    }

    /// `on-cbw-error=break-guest-write`, which is all that jobs offer up to QEMU 10.0: the snapshot is whole.
    #[test]
    fn what_cannot_be_kept_breaks_the_guests_write_by_jobs() -> Result<()> {
        let mut scene = Scene::new("raw", "job", SIZE)?;
        scene.write(&[range(1, 0, SIZE)])?;
        let schema = scene.vm.control()?.execute("query-qmp-schema", json!({}))?;
        if schema.to_string().contains("\"on-cbw-error\"") && job_takes_on_cbw_error(&schema) {
            fleecebox_tests::not_shown("this QEMU's jobs can break the snapshot instead");
            return Ok(());
        }
        let expected = scene.content.clone();
        let (running, held) = scene.held()?;
        fail_below(&scene)?;
        scene.vm.write("va", 2, MIB, MIB)?;
        let printed = scene.printed()?;
        ensure!(
            printed.contains("write failed: Input/output error"),
            "the write went through uncopied: {printed}"
        );
        held.go_on();
        let outcome = running.finish()?;
        take_away(&scene)?;
        scene.proxy.references()?;
        let left = QemuState::read(scene.vm.monitors())?.differences(&scene.before, |_| true);
        ensure!(
            left.iter().all(|line| line.contains("io-status")),
            "{left:?}"
        );
        println!("{:?}: {}", outcome.code(), outcome.stderr);
        // Whether the job could still trust its snapshot or gave it up, no wrong backup comes of it.
        match outcome.code() {
            Some(0) => scene.holds(&Backup::told_by(&outcome)?, &expected)?,
            Some(1) => ensure!(scene.site.list(&scene.site.archive())?.is_empty()),
            _ => bail!("{}", outcome.stderr),
        }
        // With the fleecing image gone, the guest's write works.
        scene.write(&[range(2, MIB, MIB)])?;
        let next = scene.site.backup(&scene.order)?;
        scene.holds(&next, &scene.content)
    }

    /// Whether `blockdev-backup` has the argument.
    fn job_takes_on_cbw_error(schema: &Value) -> bool {
        let entries = schema.as_array().into_iter().flatten();
        let find = |name: &Value| entries.clone().find(|entry| entry["name"] == *name);
        let command = find(&json!("blockdev-backup"));
        let arguments = command.and_then(|command| find(&command["arg-type"]));
        let members = arguments.and_then(|arguments| arguments["members"].as_array());
        members.is_some_and(|members| {
            members
                .iter()
                .any(|member| member["name"] == "on-cbw-error")
        })
    }

    /// `cbw-timeout` with `break-snapshot`: the guest waits so long and no longer.
    #[test]
    fn what_takes_too_long_to_keep_breaks_the_snapshot_by_filters() -> Result<()> {
        let mut scene = Scene::new("raw", "filter", SIZE)?;
        scene.write(&[range(1, 0, SIZE)])?;
        let (running, held) = scene.held()?;
        slow_down_below(&scene)?;
        // The limit lets one go, and then none for a quarter of an hour.
        scene.write(&[range(2, 0, MIB)])?;
        let started = Instant::now();
        scene.write(&[range(2, MIB, MIB)])?;
        let first = started.elapsed();
        let started = Instant::now();
        scene.write(&[range(3, 2 * MIB, MIB)])?;
        let second = started.elapsed();
        println!("the first write took {first:?}, the next one {second:?}");
        ensure!(
            first > Duration::from_secs(15) && first < Duration::from_secs(50),
            "{first:?}"
        );
        ensure!(second < Duration::from_secs(10), "{second:?}");
        held.go_on();
        let outcome = running.finish()?;
        assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
        take_away(&scene)?;
        scene.live_disk_reads(&[range(2, MIB, MIB), range(3, 2 * MIB, MIB)])?;
        scene.undisturbed()?;
        let next = scene.site.backup(&scene.order)?;
        scene.holds(&next, &scene.content)
    }
}

mod backup_discard_source {
    use super::*;

    /// Two spans of those that are given back when they are finished.
    const SIZE: u64 = 128 * MIB;

    fn discarding(form: &str) -> Result<()> {
        let mut scene = Scene::new("raw", form, SIZE)?;
        scene.write(&[range(1, 0, SIZE)])?;
        scene.order = Order {
            provider: fleecebox_tests::component("stalls-half-way")?
                .display()
                .to_string(),
            ..scene.order.clone()
        };
        // Old data of both halves is kept first.
        let (running, held) = scene.held()?;
        scene.write(&[range(2, 0, 16 * MIB), range(2, SIZE - 16 * MIB, 16 * MIB)])?;
        let kept = scene.fleecing()?;
        ensure!(kept >= 32 * MIB, "{kept} bytes are kept");
        held.go_on();
        running.wait_for_line(LIMIT, |line| line.contains("half of it is stored"))?;

        // What was read of the first half is freed,
        let freed = eventually("the first half to be given back", LIMIT, || {
            let bytes = scene.fleecing()?;
            // But for the one block that is kept to the end.
            Ok((bytes <= kept - 15 * MIB).then_some(bytes))
        })?;
        // and is copied no more, neither where it had been kept nor where not;
        scene.write(&[range(3, 0, 32 * MIB)])?;
        let after = scene.fleecing()?;
        ensure!(after <= freed + MIB, "{freed} bytes became {after}");
        // what was not read yet still is.
        scene.write(&[range(3, SIZE - 32 * MIB, 16 * MIB)])?;
        let after = scene.fleecing()?;
        ensure!(after >= freed + 16 * MIB, "{freed} bytes became {after}");

        let pid = rustix::process::Pid::from_raw(running.process().pid).context("no process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        let outcome = running.finish()?;
        assert_eq!(outcome.code(), Some(130), "{}", outcome.stderr);
        scene.undisturbed()
    }

    #[test]
    fn what_was_read_is_freed_and_copied_no_more_by_jobs() -> Result<()> {
        discarding("job")
    }

    #[test]
    fn what_was_read_is_freed_and_copied_no_more_by_filters() -> Result<()> {
        discarding("filter")
    }

    /// The clean ranges of an incremental are given back before anything is read.
    #[test]
    fn what_an_incremental_does_not_read_is_never_copied() -> Result<()> {
        let mut scene = Scene::new("raw", "job", SIZE)?;
        scene.write(&[range(1, 0, SIZE)])?;
        let base = scene.site.backup(&scene.order)?;
        scene.proxy.references()?;
        scene.write(&[range(2, 0, 2 * MIB)])?;
        let namespaced = format!(
            "[provider.slow]\ncomponent = '{}'\nnamespace = 'chunked'\n",
            fleecebox_tests::component("stalls-half-way")?.display()
        );
        scene.site.configure(&namespaced)?;
        scene.order.provider = "slow".into();
        let running = scene.site.backup_command(&scene.order).start()?;
        running.wait_for_line(LIMIT, |line| line.contains("half of it is stored"))?;
        let before = scene.fleecing()?;
        scene.write(&[range(3, 32 * MIB, 64 * MIB)])?;
        let after = scene.fleecing()?;
        // Samples of clean blocks, and the one that shows that the snapshot is whole, are spared.
        ensure!(after <= before + MIB, "{before} bytes became {after}");
        let pid = rustix::process::Pid::from_raw(running.process().pid).context("no process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        running.finish()?;
        scene.proxy.references()?;
        ensure!(scene.site.list(&scene.site.archive())? == [base.id]);
        scene.undisturbed()
    }
}
