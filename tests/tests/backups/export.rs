//! `fleecebox export`: tools that are not ours read the point in time, and tracking follows what they say of it.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Disk, Fleecebox, MIB, NbdClient, Outcome, Proxy, QemuState, Random, Running, Site,
    StorageDaemon, compare, nbd_map,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
const SIZE: u64 = 16 * MIB;
const BLOCK: u64 = 64 << 10;

/// A daemon with a raw and a qcow2 disk that are written to, and the commands for them.
struct Scene {
    site: Site,
    proxy: Proxy,
    daemon: StorageDaemon,
    random: Random,
}

/// An export that is held.
struct Held {
    running: Running,
    told: Value,
}

impl Scene {
    fn new() -> Result<Self> {
        let disks = [Disk::raw("da", SIZE), Disk::qcow2("db", SIZE)];
        let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
        let mut scene = Self {
            site: Site::new()?,
            proxy: Proxy::start(daemon.monitors())?,
            daemon,
            random: Random::new(11),
        };
        for node in ["da", "db"] {
            scene.write(node, 3..40)?;
        }
        Ok(scene)
    }

    /// Random bytes in these blocks of a disk.
    fn write(&mut self, node: &str, blocks: Range<u64>) -> Result<()> {
        let mut access = self.daemon.writer_access(node)?;
        let mut bytes = vec![0; BLOCK as usize];
        for block in blocks {
            self.random.fill(&mut bytes);
            access.write(block * BLOCK, &bytes)?;
        }
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Fleecebox {
        let command = self
            .site
            .command(&["export", "web", "--json", "--disk", "da", "--disk", "db"])
            .arg("--qmp")
            .arg(self.proxy.socket())
            .arg("--nbd")
            .arg(self.daemon.nbd_socket())
            .arg("--fleecing")
            .arg(self.site.path("fleecing"));
        arguments
            .iter()
            .fold(command, |command, &argument| command.arg(argument))
    }

    fn hold(&self, arguments: &[&str]) -> Result<Held> {
        let running = self.command(arguments).start()?;
        let told = running.wait_for_event(SOON, |event| event["volumes"].is_array())?;
        Ok(Held { running, told })
    }

    fn end(&self, held: Held, verdict: &str) -> Result<()> {
        let end = self.site.command(&["export", "end", "web", verdict]);
        end.run()?.assert_success();
        held.running.finish()?.assert_success();
        self.site.check_no_fleecing_images()
    }

    fn state(&self) -> Result<QemuState> {
        QemuState::read(self.daemon.monitors())
    }
}

impl Held {
    fn volume(&self, name: &str) -> Result<&Value> {
        let volumes = self.told["volumes"].as_array().context("no volumes")?;
        let volume = volumes.iter().find(|volume| volume["name"] == name);
        volume.context("no such volume")
    }

    fn text(&self, volume: &str, key: &str) -> Result<String> {
        let text = self.volume(volume)?[key].as_str();
        Ok(text
            .with_context(|| format!("no {key}: {}", self.told))?
            .into())
    }

    fn socket(&self) -> Result<PathBuf> {
        Ok(self.told["socket"].as_str().context("no socket")?.into())
    }

    /// What `nbdinfo` reads of the bitmap; all of a disk without one.
    fn dirty(&self, volume: &str) -> Result<Vec<Range<u64>>> {
        let (socket, export) = (self.socket()?, self.text(volume, "nbd_export")?);
        match self.volume(volume)?["dirty_context"].as_str() {
            Some(context) => nbd_map::dirty_ranges(&socket, &export, context),
            None => Ok(blocks(&[(0, SIZE / BLOCK)])),
        }
    }

    /// As a tool of incremental copies does: only what is dirty goes into `image`.
    fn copy_dirty(&self, volume: &str, image: &Path) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(image)?;
        file.set_len(SIZE)?;
        let export = self.text(volume, "nbd_export")?;
        let mut disk = NbdClient::connect(&self.socket()?, &export)?;
        for range in self.dirty(volume)? {
            let mut bytes = vec![0; usize::try_from(range.end - range.start)?];
            disk.read(range.start, &mut bytes)?;
            file.write_all_at(&bytes, range.start)?;
        }
        Ok(())
    }
}

/// From the first of some blocks to the one behind the last, each.
fn blocks(ranges: &[(u64, u64)]) -> Vec<Range<u64>> {
    let bytes = |&(start, end): &(u64, u64)| start * BLOCK..end * BLOCK;
    ranges.iter().map(bytes).collect()
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {said}");
    Ok(())
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

#[test]
fn nbdcopy_and_qemu_img_read_the_point_in_time_and_nothing_is_left() -> Result<()> {
    let mut scene = Scene::new()?;
    let before = scene.state()?;
    let held = scene.hold(&[])?;
    for node in ["da", "db"] {
        scene.write(node, 0..60)?;
    }
    for reference in scene.proxy.references()? {
        let uri = held.text(&reference.device, "uri")?;
        let copy = scene.site.path(&format!("{}.copy", reference.device));
        run("nbdcopy", &[&uri, utf8(&copy)?])?;
        compare::same_bytes(&copy, &reference.path)?;
        let image = scene.site.path(&format!("{}.qcow2", reference.device));
        run("qemu-img", &["convert", "-O", "qcow2", &uri, utf8(&image)?])?;
        compare::same_disk(&image, &reference.path)?;
    }
    let pid = Pid::from_raw(held.running.process().pid).context("no process")?;
    kill_process(pid, Signal::INT)?;
    let outcome = held.running.finish()?.assert_success();
    ensure!(outcome.stderr.contains("a signal ended"), "{outcome:?}");
    scene.state()?.assert_restored(&before, |_| false);
    scene.site.check_no_fleecing_images()
}

#[test]
fn a_socket_of_its_own_lies_in_a_folder_that_nobody_else_may_enter() -> Result<()> {
    let daemon = StorageDaemon::start(&[Disk::raw("da", MIB)])?;
    let site = Site::new()?;
    let before = QemuState::read(daemon.monitors())?;
    let command = site.command(&["export", "web", "--disk", "da"]);
    let command = command
        .arg("--fleecing")
        .arg(site.path("fleecing"))
        .arg("--qmp");
    let running = command.arg(&daemon.monitors().product).start()?;
    let line = running.wait_for_line(SOON, |line| line.starts_with("da\t"))?;
    let uri = line.split('\t').nth(1).context("no URI")?;
    let socket = uri.split("socket=").nth(1).context("no socket")?;
    let folder = Path::new(socket).parent().context("no folder")?;
    assert_eq!(fs::metadata(folder)?.permissions().mode() & 0o777, 0o700);
    run("nbdinfo", &[uri])?;
    let end = site.command(&["export", "end", "web", "--failure"]).run()?;
    end.assert_success();
    running.finish()?.assert_success();
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    site.check_no_fleecing_images()
}

#[test]
fn an_increment_is_what_changed_since_the_last_success_also_across_failures() -> Result<()> {
    let mut scene = Scene::new()?;
    let copy = scene.site.path("copy.raw");
    let tracked = ["--tracking", "nightly"];
    let first = scene.hold(&tracked)?;
    ensure!(first.dirty("da")? == blocks(&[(0, SIZE / BLOCK)]));
    first.copy_dirty("da", &copy)?;
    scene.end(first, "--success")?;

    scene.write("da", 5..7)?;
    let failed = scene.hold(&tracked)?;
    ensure!(failed.dirty("da")? == blocks(&[(5, 7)]), "{}", failed.told);
    ensure!(failed.dirty("db")?.is_empty(), "{}", failed.told);
    // Meanwhile, and in a backup's eyes it is another archive's.
    scene.write("da", 100..101)?;
    scene.end(failed, "--failure")?;
    let order = scene.site.order(&scene.daemon, "chunked")?;
    let backup = scene.site.backup(&order)?;
    backup.assert_base("da", None);

    scene.write("da", 50..52)?;
    let union = scene.hold(&tracked)?;
    let expected = blocks(&[(5, 7), (50, 52), (100, 101)]);
    ensure!(union.dirty("da")? == expected, "{:?}", union.dirty("da"));
    union.copy_dirty("da", &copy)?;
    scene.end(union, "--success")?;
    scene.proxy.references()?;

    scene.write("da", 200..201)?;
    let last = scene.hold(&tracked)?;
    ensure!(last.dirty("da")? == blocks(&[(200, 201)]));
    scene.write("da", 0..250)?;
    last.copy_dirty("da", &copy)?;
    let reference = scene.proxy.references()?;
    compare::same_bytes(&copy, &reference[0].path)?;
    scene.end(last, "--success")?;

    // The backup's own tracking saw the same writes.
    let second = scene.site.backup(&order)?;
    second.assert_base("da", Some(&backup));
    assert_eq!(second.dirty_bytes("da"), 250 * BLOCK);
    Ok(())
}

#[test]
fn an_export_that_is_killed_counts_as_a_failure_and_the_next_one_cleans_up() -> Result<()> {
    let mut scene = Scene::new()?;
    let tracked = ["--tracking", "nightly"];
    let first = scene.hold(&tracked)?;
    scene.end(first, "--success")?;
    scene.proxy.references()?;
    let before = scene.state()?;
    scene.write("db", 8..9)?;
    for mechanism in ["nbd", "file-handle"] {
        let killed = scene.hold(&["--tracking", "nightly", "--mechanism", mechanism])?;
        scene.write("db", 12..13)?;
        killed.running.kill()?;
        let end = scene.site.command(&["export", "end", "web", "--success"]);
        end.run()?
            .assert_refused(2, "no export of VM 'web' is held");
        scene.proxy.references()?;
    }
    let next = scene.hold(&tracked)?;
    ensure!(next.dirty("db")? == blocks(&[(8, 9), (12, 13)]));
    scene.end(next, "--failure")?;
    scene.proxy.references()?;
    scene.state()?.assert_restored(&before, |_| false);
    Ok(())
}

/// It needs no archive for it: the VM was never backed up.
#[test]
fn what_a_killed_export_left_is_settled_by_recover() -> Result<()> {
    let mut scene = Scene::new()?;
    let tracked = ["--tracking", "nightly"];
    let first = scene.hold(&tracked)?;
    scene.end(first, "--success")?;
    scene.proxy.references()?;
    let before = scene.state()?;
    scene.write("db", 8..9)?;
    let killed = scene.hold(&tracked)?;
    scene.write("db", 12..13)?;
    killed.running.kill()?;
    scene.proxy.references()?;

    let recover = scene.site.command(&["recover", "web"]);
    let recover = recover.arg("--qmp").arg(scene.proxy.socket());
    let recover = recover.arg("--fleecing").arg(scene.site.path("fleecing"));
    let nbd = scene.daemon.nbd_socket();
    let recovered = recover.arg("--nbd").arg(nbd).run()?.assert_success();
    ensure!(
        recovered.stderr.contains("its changes are merged back"),
        "{}",
        recovered.stderr
    );
    scene.state()?.assert_restored(&before, |_| false);
    scene.site.check_no_fleecing_images()?;
    let next = scene.hold(&tracked)?;
    ensure!(next.dirty("db")? == blocks(&[(8, 9), (12, 13)]));
    scene.end(next, "--failure")
}

#[test]
fn a_success_is_not_believed_where_the_snapshot_cannot_be_read_any_more() -> Result<()> {
    let mut scene = Scene::new()?;
    let tracked = ["--tracking", "nightly"];
    let first = scene.hold(&tracked)?;
    scene.end(first, "--success")?;
    scene.write("da", 0..2)?;
    let held = scene.hold(&tracked)?;
    let export = held.text("da", "nbd_export")?;
    NbdClient::connect(&held.socket()?, &export)?.trim(0, u32::try_from(2 * BLOCK)?)?;
    let end = scene.site.command(&["export", "end", "web", "--success"]);
    let refused = end.run()?;
    assert_eq!(refused.code(), Some(1), "{}", refused.stderr);
    ensure!(
        refused.stderr.contains("counts as a failure"),
        "{}",
        refused.stderr
    );
    let outcome = held.running.finish()?;
    assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
    ensure!(outcome.stderr.contains("disk da"), "{}", outcome.stderr);
    let next = scene.hold(&tracked)?;
    ensure!(next.dirty("da")? == blocks(&[(0, 2)]), "{}", next.told);
    scene.end(next, "--success")
}

#[test]
fn each_disk_is_a_file_with_its_dirty_regions_beside_it() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.hold(&["--tracking", "files"])?;
    scene.end(first, "--success")?;
    scene.proxy.references()?;
    scene.write("da", 20..23)?;
    let before = scene.state()?;
    let held = scene.hold(&["--tracking", "files", "--mechanism", "file-handle"])?;
    scene.write("da", 0..60)?;
    for reference in scene.proxy.references()? {
        let file = PathBuf::from(held.text(&reference.device, "file")?);
        compare::same_bytes(&file, &reference.path)?;
        let regions = fs::read(held.text(&reference.device, "regions")?)?;
        let regions: Value = serde_json::from_slice(&regions)?;
        ensure!(regions["size"] == SIZE, "{regions}");
        let expected: Vec<Value> = held
            .dirty(&reference.device)?
            .into_iter()
            .map(|range| serde_json::json!({"offset": range.start, "length": range.end - range.start}))
            .collect();
        ensure!(regions["dirty"] == Value::Array(expected), "{regions}");
        let punched = run("fallocate", &["-p", "-l", "65536", utf8(&file)?]);
        ensure!(
            punched.is_err(),
            "a hole was punched into {}",
            file.display()
        );
    }
    ensure!(held.dirty("da")? == blocks(&[(20, 23)]));
    scene.end(held, "--failure")?;
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    ensure!(
        !mounts.contains(utf8(&scene.site.path("fleecing"))?),
        "{mounts}"
    );
    scene.state()?.assert_restored(&before, |_| false);
    Ok(())
}

#[test]
fn files_of_a_qemu_that_was_killed_are_unmounted() -> Result<()> {
    let mut scene = Scene::new()?;
    let held = scene.hold(&["--mechanism", "file-handle"])?;
    scene.daemon.kill()?;
    let outcome = held.running.finish()?;
    assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    ensure!(
        !mounts.contains(utf8(&scene.site.path("fleecing"))?),
        "{mounts}"
    );
    scene.site.check_no_fleecing_images()
}

#[test]
fn mistakes_are_named_and_nothing_is_touched() -> Result<()> {
    let scene = Scene::new()?;
    let before = scene.state()?;
    for (arguments, words) in [
        (
            &["--tracking", "../x"][..],
            "'../x' cannot name what is tracked",
        ),
        (&["--tracking", ""], "'' cannot name what is tracked"),
        (&["--mechanism", "ftp"], "'ftp'"),
        (&["--disk", "dx"], "dx"),
    ] {
        let outcome = scene.command(arguments).arg("--quiet").run()?;
        assert_eq!(outcome.code(), Some(2), "{outcome:?}");
        ensure!(
            outcome.stderr.contains(words),
            "{words}: {}",
            outcome.stderr
        );
    }
    for (arguments, words) in [
        (
            &["export", "end", "web", "--success"][..],
            "no export of VM 'web' is held",
        ),
        (
            &["export", "end", "../web", "--success"],
            "cannot name a VM",
        ),
        (&["export", "end", "web"], "--success"),
        (
            &["export", "end", "web", "--success", "--failure"],
            "cannot be used with",
        ),
        (&["export"], "VM"),
        (&["export", "wbe"], "no VM named 'wbe'"),
    ] {
        let outcome: Outcome = scene.site.command(arguments).run()?;
        assert_eq!(outcome.code(), Some(2), "{outcome:?}");
        ensure!(
            outcome.stderr.contains(words),
            "{words}: {}",
            outcome.stderr
        );
    }
    scene.state()?.assert_restored(&before, |_| false);

    let held = scene.hold(&[])?;
    let second = scene.command(&[]).arg("--quiet").run()?;
    ensure!(
        second.stderr.contains("another job is running"),
        "{}",
        second.stderr
    );
    scene.end(held, "--failure")
}
