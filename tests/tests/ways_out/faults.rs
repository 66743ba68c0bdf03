//! Faults in the middle of an incremental backup that are not a kill of the job: signals, a lost monitor, a dead QEMU,
//! full file systems, a second job. The job ends with a clear error, the VM never notices, the next backup is right.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::crash::{Attempt, DISKS, Server, Site};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{At, Fault, MIB, Outcome, QemuState, Qmp, Stage, What, compare, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// A job that is told to end does not wait for a provider; the rest is for a busy machine.
const CANCEL_LIMIT: Duration = Duration::from_secs(20);

fn send(pid: i32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid).context("no process")?;
    Ok(kill_process(pid, signal)?)
}

/// Its error is one line, whatever came before.
#[track_caller]
fn assert_failed(outcome: &Outcome, reason: &str) {
    assert_ended(outcome, 1, reason);
}

/// As the shell knows it.
#[track_caller]
fn assert_cancelled(outcome: &Outcome) {
    assert_ended(outcome, 130, "cancelled");
}

#[track_caller]
fn assert_ended(outcome: &Outcome, status: i32, reason: &str) {
    assert_eq!(outcome.code(), Some(status), "{}", outcome.stderr);
    let last = outcome.stderr.lines().last().unwrap_or_default();
    assert!(
        last.contains(reason),
        "{reason:?} is not named:\n{}",
        outcome.stderr
    );
}

fn bitmaps(site: &Site) -> Result<BTreeSet<String>> {
    let state = QemuState::read(site.daemon.monitors())?;
    Ok(state.bitmaps().map(ToString::to_string).collect())
}

/// All clean, and tracking as before: without a journal, the next run finds nothing to do.
fn nothing_happened(site: &mut Site, tracking: &BTreeSet<String>) -> Result<()> {
    let failed = site.attempt()?;
    assert_eq!(failed.journal, None);
    assert_eq!(&bitmaps(site)?, tracking);
    site.assert_clean()?;
    let next = site.recover_from(&failed)?;
    assert!(!next.stderr.contains("died"), "{}", next.stderr);
    Ok(())
}

#[test]
fn a_signal_ends_a_backup_as_if_it_had_not_been_tried() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        let tracking = bitmaps(&site)?;
        let running = site.stalled_backup()?;
        site.write_some()?;
        send(running.process().pid, signal)?;
        let asked = Instant::now();
        let outcome = running.finish()?;
        assert!(asked.elapsed() < CANCEL_LIMIT, "{:?}", asked.elapsed());
        assert_cancelled(&outcome);
        nothing_happened(&mut site, &tracking).with_context(|| format!("{signal:?}"))?;
    }
    Ok(())
}

#[test]
fn a_backup_is_not_suspended() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let tracking = bitmaps(&site)?;
    let running = site.stalled_backup()?;
    send(running.process().pid, Signal::TSTP)?;
    running.wait_for_line(SOON, |line| {
        line.starts_with("a backup cannot be suspended")
    })?;
    site.write_some()?;
    send(running.process().pid, Signal::INT)?;
    assert_cancelled(&running.finish()?);
    nothing_happened(&mut site, &tracking)
}

#[test]
fn a_sandbox_that_does_not_move_does_not_hold_up_a_cancel() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let tracking = bitmaps(&site)?;
    let running = site.stalled_backup()?;
    for sandbox in running.family()? {
        send(sandbox.pid, Signal::STOP)?;
    }
    send(running.process().pid, Signal::INT)?;
    let asked = Instant::now();
    let outcome = running.finish()?;
    assert!(asked.elapsed() < CANCEL_LIMIT, "{:?}", asked.elapsed());
    assert_cancelled(&outcome);
    nothing_happened(&mut site, &tracking)
}

#[test]
fn nobody_reading_its_output_harms_no_backup() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    for (closed, redirection) in [("output", ">&-"), ("errors", "2>&-"), ("both", ">&- 2>&-")] {
        site.backup_in_a_shell(redirection)
            .with_context(|| closed.to_string())?;
    }
    // Pipes whose other end is gone.
    site.backup_in_a_shell("2>&1 | true")?;
    Ok(())
}

#[test]
fn a_job_that_loses_its_monitor_cleans_up_over_a_new_connection() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    // Once all is read and the snapshot was found intact, the backup does not need QEMU any more.
    let [before, after] = [false, true];
    for (command, stage, committed) in [
        ("query-named-block-nodes", Stage::BeforeQemu, before),
        ("blockdev-add", Stage::BeforeAnswer, before),
        ("transaction", Stage::BeforeQemu, before),
        ("transaction", Stage::BeforeAnswer, before),
        ("block-export-add", Stage::BeforeAnswer, before),
        ("query-block-jobs", Stage::BeforeQemu, before),
        ("block-export-del", Stage::BeforeAnswer, after),
        ("job-dismiss", Stage::BeforeQemu, after),
        ("block-dirty-bitmap-remove", Stage::BeforeQemu, after),
        ("block-dirty-bitmap-remove", Stage::BeforeAnswer, after),
    ] {
        let tracking = bitmaps(&site)?;
        site.renew_proxy()?;
        site.proxy.inject(Fault {
            at: At::Named(command, 1),
            stage,
            what: What::Cut,
        });
        let outcome = site.backup().run()?;
        let lost = || format!("lost at {command}, {stage:?}: {}", outcome.stderr);
        let references = site.proxy.references()?;
        if committed {
            ensure!(outcome.code() == Some(0), "{}", lost());
            site.base = site.prove(&outcome, &references).with_context(lost)?;
        } else {
            assert_failed(&outcome, "the connection to the monitor was lost");
            assert_eq!(bitmaps(&site)?, tracking, "{}", lost());
        }
        let dead = site.attempt()?;
        assert_eq!(dead.journal, None, "{}", lost());
        site.assert_clean().with_context(lost)?;
        site.recover_from(&dead).with_context(lost)?;
    }
    Ok(())
}

/// What QEMU holds back of the old data is gone from one moment to the next, and no event tells of it.
#[test]
fn a_snapshot_that_breaks_after_the_last_read_is_no_backup() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let tracking = bitmaps(&site)?;

    // Between the last read and the provider's end: the canary cannot be read any more.
    let running = site.until_logged(site.backup(), "dawdles", "all of it is stored")?;
    break_snapshot(&site, "da")?;
    assert_failed(&running.finish()?, "volume da: reading the snapshot failed");
    nothing_happened(&mut site, &tracking)?;

    // After the canary has been read: the job that kept the old data does not run any more.
    let tracking = bitmaps(&site)?;
    let running = site.until_logged(site.backup(), "dawdles", "all of it is stored")?;
    site.proxy.forget_commands();
    site.proxy.inject(Fault {
        at: At::Named("query-jobs", 1),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    });
    let held = site.proxy.wait_held(SOON)?;
    break_snapshot(&site, "db")?;
    held.go_on();
    assert_failed(&running.finish()?, "the snapshot of disk db is broken");
    nothing_happened(&mut site, &tracking)
}

/// Ends the job that keeps the disk's old data, as `break-snapshot` or an operator would.
fn break_snapshot(site: &Site, disk: &str) -> Result<()> {
    let index = DISKS.iter().position(|name| *name == disk);
    let ending = format!("-job{}", index.context("no such disk")?);
    // A monitor has one client at a time.
    let mut qmp = site.daemon.control()?;
    let ours = |qmp: &mut Qmp| -> Result<Value> {
        let jobs = qmp.execute("query-jobs", json!({}))?;
        let is_ours = |job: &&Value| {
            let id = job["id"].as_str().unwrap_or_default();
            id.starts_with("fbx-") && id.ends_with(&ending)
        };
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(is_ours));
        job.cloned().context("no job of ours")
    };
    let id = ours(&mut qmp)?["id"].clone();
    qmp.execute("block-job-cancel", json!({"device": id}))?;
    eventually("the job to end", SOON, || {
        Ok((ours(&mut qmp)?["status"] == "concluded").then_some(()))
    })
}

#[test]
fn a_qemu_that_is_killed_leaves_its_disks_to_be_read_in_full() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let running = site.stalled_backup()?;
    site.writers.clear();
    site.daemon.kill()?;
    let outcome = running.finish()?;
    assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
    site.daemon.start_again()?;
    // QEMU's own names of nodes differ from one start to the next.
    site.before = QemuState::read(site.daemon.monitors())?;
    site.renew_proxy()?;
    site.start_writers(40)?;
    site.write_some()?;
    let next = site.backup().run()?.assert_success();
    let references = site.proxy.references()?;
    assert!(
        next.stderr
            .contains("could not take back all that it had made"),
        "{}",
        next.stderr
    );
    // The bitmap of the qcow2 disk is spoilt, which is said; the raw disk has none any more.
    assert!(
        next.stderr.contains("QEMU ended without storing it"),
        "{}",
        next.stderr
    );
    site.base = site.prove(&next, &references)?;
    site.recover_from(&Attempt::default())?;
    Ok(())
}

#[test]
fn a_second_job_on_the_same_vm_is_refused() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let tracking = bitmaps(&site)?;
    let running = site.stalled_backup()?;
    site.backup()
        .run()?
        .assert_refused(11, "another job is running on this VM");
    send(running.process().pid, Signal::INT)?;
    assert_cancelled(&running.finish()?);
    nothing_happened(&mut site, &tracking)
}

#[test]
fn what_a_dead_job_left_is_found_without_its_journal() -> Result<()> {
    for server in [Server::Shared, Server::Own] {
        let mut site = Site::new(server)?;
        site.stalled_backup()?.kill()?;
        std::fs::remove_dir_all(site.path("state"))?;
        let dead = Attempt {
            journal: None,
            references: site.proxy.references()?,
        };
        // Nobody knows of the backup any more that the job had begun in the archive.
        let listed = site.listed()?;
        for entry in std::fs::read_dir(site.path("archive/namespaces/chunked/backups"))? {
            let entry = entry?;
            if !listed.contains(&*entry.file_name().to_string_lossy()) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        site.forget_temporaries()?;
        let next = site
            .recover_from(&dead)
            .with_context(|| format!("{server:?}"))?;
        assert!(
            next.stderr.contains("no journal tells of"),
            "{}",
            next.stderr
        );
    }
    Ok(())
}

/// A file system of its own; gone when this is dropped.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(at: &'a Path, bytes: u64) -> Result<Self> {
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o"])
            .arg(format!("size={bytes}"));
        let mounted = mount.arg("tmpfs").arg(at).status()?;
        ensure!(
            mounted.success(),
            "cannot mount a tmpfs at {}",
            at.display()
        );
        Ok(Self(at))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        // Also with files still open in it.
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Mounting needs root, and nothing else makes a file system full that is not the machine's own.
fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        fleecebox_tests::not_shown("no file system can be mounted here (this needs root)");
    }
    may
}

#[test]
fn a_full_archive_is_said_and_its_backups_stay_whole() -> Result<()> {
    if !may_mount() {
        return Ok(());
    }
    let mut site = Site::new(Server::Shared)?;
    let (small, large) = (site.path("small"), site.path("archive"));
    std::fs::create_dir(&small)?;
    let used = used_bytes(&large)?;
    let tmpfs = Tmpfs::mount(&small, used + 4 * MIB)?;
    let copied = Command::new("cp")
        .arg("-a")
        .arg(large.join("."))
        .arg(&small)
        .status()?;
    ensure!(copied.success(), "cannot copy the archive");
    std::fs::rename(&large, site.path("first"))?;
    std::os::unix::fs::symlink(&small, &large)?;
    let tracking = bitmaps(&site)?;
    // More random bytes than there is room for.
    site.writers.clear();
    site.start_writers(1000)?;
    site.writers
        .iter()
        .try_for_each(|writer| writer.wait_for(100))?;
    site.writers.clear();
    site.start_writers(40)?;
    let outcome = site.backup().run()?;
    assert_failed(&outcome, "the archive is full");
    let failed = site.attempt()?;
    assert_eq!(failed.journal, None);
    assert_eq!(bitmaps(&site)?, tracking);
    site.assert_clean()?;
    let verified = site.fleecebox(&["verify", &site.base]).run()?;
    verified.assert_success();

    let mut remount = Command::new("mount");
    remount.args(["-o", "remount,size=1g"]).arg(&small);
    ensure!(remount.status()?.success(), "cannot enlarge the tmpfs");
    site.recover_from(&failed)?;
    drop(tmpfs);
    Ok(())
}

#[test]
fn a_fleecing_folder_that_fills_up_ends_the_backup_and_not_the_guest() -> Result<()> {
    if !may_mount() {
        return Ok(());
    }
    let mut site = Site::with_disks(Server::Shared, 64 * MIB)?;
    let fleecing = site.path("fleecing");
    // A sixteenth of the disks and the reserve of 32 MiB are asked for at the start.
    let tmpfs = Tmpfs::mount(&fleecing, 42 * MIB)?;
    let tracking = bitmaps(&site)?;
    // In full, because an incremental keeps old data only of what had changed: that may not be enough to fill it.
    let running = site.until_logged(
        site.backup().arg("--full"),
        "stalls-half-way",
        "half of it is stored",
    )?;
    site.start_writers(400)?;
    let outcome = running.finish()?;
    assert_failed(&outcome, "the fleecing folder is nearly full");
    for writer in site.writers.drain(..) {
        writer.stop().context("the guest saw an error")?;
    }
    assert_eq!(bitmaps(&site)?, tracking);
    drop(tmpfs);
    site.start_writers(40)?;
    nothing_happened(&mut site, &tracking)
}

fn used_bytes(folder: &Path) -> Result<u64> {
    let mut used = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        used += if meta.is_dir() {
            used_bytes(&entry.path())?
        } else {
            meta.len().next_multiple_of(4096)
        };
    }
    Ok(used)
}

#[test]
fn a_damaged_base_makes_its_disks_be_read_in_full_and_says_so() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let path = format!(
        "archive/namespaces/chunked/backups/{}/manifest.json",
        site.base
    );
    let path = site.path(&path);
    let mut bytes = std::fs::read(&path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes)?;
    let outcome = site.backup().run()?.assert_success();
    let references = site.proxy.references()?;
    let said = format!("the base {} is damaged", site.base);
    assert_eq!(
        outcome.stderr.matches(&said).count(),
        DISKS.len(),
        "{}",
        outcome.stderr
    );
    std::fs::remove_dir_all(path.parent().context("a file in a folder")?)?;
    site.base = site.prove(&outcome, &references)?;
    site.recover_from(&Attempt::default())?;
    Ok(())
}

impl Site {
    /// A backup with its output redirected as a shell writes it. What it printed is lost, so the archive tells.
    fn backup_in_a_shell(&mut self, redirection: &str) -> Result<()> {
        let before = self.listed()?;
        let product = std::env::current_exe()?
            .ancestors()
            .nth(2)
            .context("a test lies in release/deps")?
            .join("fleecebox");
        let script = format!("\"$0\" \"$@\" {redirection}");
        let status = Command::new("bash")
            .args(["-c", &format!("set -o pipefail; {script}")])
            .arg(product)
            .arg("--config")
            .arg(self.path("fleecebox.toml"))
            .args(["backup", "box", "--qmp"])
            .arg(self.proxy.socket())
            .output()?
            .status;
        ensure!(status.success(), "it ended with {status}");
        let references = self.proxy.references()?;
        let after = eventually("the backup", SOON, || {
            let listed = self.listed()?;
            Ok((listed.len() > before.len()).then_some(listed))
        })?;
        let id = after.difference(&before).next().context("no new backup")?;
        self.assert_clean()?;
        let restored = self.path("restored");
        self.fleecebox(&["restore", id, "--to"])
            .arg(&restored)
            .run()?
            .assert_success();
        for reference in &references {
            let path = restored.join(format!("{}.raw", reference.device));
            compare::same_bytes(&reference.path, &path)?;
            std::fs::remove_file(path)?;
        }
        self.base = id.clone();
        Ok(())
    }

    /// Packs that were never finished and that no journal tells of any more.
    fn forget_temporaries(&self) -> Result<()> {
        for folder in ["packs", "components"] {
            for entry in std::fs::read_dir(self.path("archive/namespaces/chunked").join(folder))? {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "tmp") {
                    std::fs::remove_file(path)?;
                }
            }
        }
        Ok(())
    }
}
