//! Two operators on one QEMU who know nothing of each other: each has a monitor, a state folder, a fleecing folder and an
//! archive of its own. Who comes second leaves the first one's job alone, and is told whose it is.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Disk, Emulator, Fleecebox, MIB, Monitors, Order, QemuState, Random, Site, StorageDaemon,
    eventually,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const SIZE: u64 = 4 * MIB;
const LIMIT: Duration = Duration::from_secs(60);
const BUSY: i32 = 11;

/// The first, who is in the midst of a job, and the second.
struct Operators {
    first: Site,
    second: Site,
    order: Order,
    other: Order,
}

impl Operators {
    fn new(monitors: &Monitors, disk: &str) -> Result<Self> {
        let (first, second) = (Site::new()?, Site::new()?);
        let order = first.order_for(&monitors.product, "chunked")?.only(&[disk]);
        let other = second
            .order_for(&monitors.control, "chunked")?
            .only(&[disk]);
        Ok(Self {
            first,
            second,
            order,
            other,
        })
    }

    /// All that the second can do that would tear down a job.
    fn commands(&self) -> Vec<(&'static str, Fleecebox)> {
        let site = &self.second;
        let monitor = self.other.qmp.display().to_string();
        let archive = site.archive().display().to_string();
        let fleecing = site.path("fleecing").display().to_string();
        let disk = self.other.disks[0].clone();
        let on = ["--qmp", &monitor, "--fleecing", &fleecing];
        let recover = [&["recover", "web"], &on[..], &["--archive", &archive]].concat();
        let export = [&["export", "web"], &on[..], &["--disk", &disk]].concat();
        vec![
            ("backup", site.backup_command(&self.other)),
            ("dry run", site.backup_command(&self.other).arg("--dry-run")),
            ("recover", site.command(&recover)),
            ("export", site.command(&export)),
        ]
    }

    fn in_the_midst(&self, monitors: &Monitors) -> Result<()> {
        // The archive is made, as it would be by then.
        self.second_makes_its_archive(monitors)?;
        let command = self.first.backup_command(&self.order);
        let running = command.env("FLEECEBOX_STOP_AT", "running").start()?;
        reads_the_snapshot(&self.first)?;
        let before = QemuState::read(monitors)?;
        let pid = running.process().pid;
        for (what, command) in self.commands() {
            let outcome = command.run()?;
            ensure!(outcome.code() == Some(BUSY), "{what}: {}", outcome.stderr);
            let whose = format!("process {pid} of user ");
            ensure!(
                outcome.stderr.contains(&whose),
                "{what}: {}",
                outcome.stderr
            );
            QemuState::read(monitors)?.assert_restored(&before, |_| false);
        }
        let job = Pid::from_raw(pid).context("no such process")?;
        kill_process(job, Signal::CONT)?;
        let outcome = running.finish()?.assert_success();
        let backup = fleecebox_tests::Backup::told_by(&outcome)?;
        self.first.verify(&self.order.archive, &backup.id)
    }

    fn second_makes_its_archive(&self, monitors: &Monitors) -> Result<()> {
        let before = QemuState::read(monitors)?;
        let backup = self.second.backup(&self.other)?;
        self.second.verify(&self.other.archive, &backup.id)?;
        QemuState::read(monitors)?.assert_restored(&before, |_| true);
        Ok(())
    }

    /// One that was killed is gone, and the second cleans up after it.
    fn after_a_kill(&self, monitors: &Monitors) -> Result<()> {
        let before = QemuState::read(monitors)?;
        std::fs::remove_file(self.first.path("state/vms/web/journal.json")).ok();
        let command = self.first.backup_command(&self.order);
        let running = command.env("FLEECEBOX_STOP_AT", "running").start()?;
        reads_the_snapshot(&self.first)?;
        // Its watchdog may be at it, too.
        running.kill()?;
        let backup = self.second.backup(&self.other)?;
        self.second.verify(&self.other.archive, &backup.id)?;
        QemuState::read(monitors)?.assert_restored(&before, |_| true);
        Ok(())
    }
}

fn reads_the_snapshot(site: &Site) -> Result<()> {
    let journal = site.path("state/vms/web/journal.json");
    eventually("the job to take its snapshot", LIMIT, || {
        let text = std::fs::read_to_string(&journal).unwrap_or_default();
        Ok(text.contains(r#""step": "running""#).then_some(()))
    })
}

fn one_disk(folder: &Path) -> Result<Vec<String>> {
    let file = folder.join("a");
    Random::new(1).fill_file(&file, SIZE / MIB)?;
    let node = json!({"driver": "raw", "node-name": "na",
        "file": {"driver": "file", "filename": file}});
    let device = "virtio-blk-pci,id=va,drive=na";
    Ok(["-blockdev", &node.to_string(), "-device", device]
        .map(Into::into)
        .to_vec())
}

#[test]
fn a_live_job_in_a_machine_is_left_alone_by_who_does_not_know_it() -> Result<()> {
    let vm = Emulator::running(one_disk)?;
    let operators = Operators::new(vm.monitors(), "va")?;
    operators.in_the_midst(vm.monitors())?;
    operators.after_a_kill(vm.monitors())?;
    assert_eq!(vm.status()?, "running");
    let left = vm.control()?.execute("query-chardev", json!({}))?;
    ensure!(!left.to_string().contains("fbx-owner"), "{left}");
    Ok(())
}

#[test]
fn a_live_job_in_a_storage_daemon_is_left_alone_by_who_does_not_know_it() -> Result<()> {
    let daemon = StorageDaemon::start(&[Disk::qcow2("da", SIZE)])?;
    let operators = Operators::new(daemon.monitors(), "da")?;
    operators.in_the_midst(daemon.monitors())?;
    operators.after_a_kill(daemon.monitors())
}

/// Of those that begin at the same moment one at most has the VM; all others say that it is busy, and nothing is left.
#[test]
fn of_two_that_begin_at_once_neither_tears_the_other_down() -> Result<()> {
    let daemon = StorageDaemon::start(&[Disk::raw("da", SIZE)])?;
    let before = QemuState::read(daemon.monitors())?;
    for _ in 0..5 {
        let operators = Operators::new(daemon.monitors(), "da")?;
        let runs = [
            operators.first.backup_command(&operators.order).start()?,
            operators.second.backup_command(&operators.other).start()?,
        ];
        for run in runs {
            let outcome = run.finish()?;
            let code = outcome.code();
            ensure!(code == Some(0) || code == Some(BUSY), "{}", outcome.stderr);
        }
        QemuState::read(daemon.monitors())?.assert_restored(&before, |_| true);
    }
    Ok(())
}
