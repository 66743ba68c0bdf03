//! A job process that does not run at all in the middle of its reading: stopped by SIGSTOP as a debugger, a frozen cgroup
//! or a starved machine would stop it. QEMU holds answers that nobody takes, and must go on all the same: drains, which
//! wait for answers to be sent, must not wait for the job, as the monitor and the guest's writes would wait with them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, Guest, Load, MIB, Proxy, QemuState, Qmp, Random, Running, Site, StorageDaemon,
    Writer, bytes_below, eventually,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
/// For what takes milliseconds on a quiet machine. A QEMU that waits for the job waits for ever.
const AT_ONCE: Duration = Duration::from_secs(25);
/// Long enough to be read that a job can be caught in the middle of it several times.
const BULK_MIB: u64 = 192;

fn send(running: &Running, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(running.process().pid).context("no process")?;
    Ok(kill_process(pid, signal)?)
}

/// Stops the job as soon as `bytes` more than before are in the archive. Whether it was caught before its end.
fn stop_in_the_middle(running: &Running, archive: &Path, bytes: u64) -> Result<bool> {
    let before = bytes_below(archive)?;
    let stat = format!("/proc/{}/stat", running.process().pid);
    let has_state =
        |wanted: &str| -> Result<bool> { Ok(std::fs::read_to_string(&stat)?.contains(wanted)) };
    eventually("the job to store what it reads", LIMIT, || {
        let stored = bytes_below(archive).unwrap_or_default();
        Ok((stored >= before + bytes || has_state(") Z ")?).then_some(()))
    })?;
    send(running, Signal::STOP)?;
    eventually("the job to stop", LIMIT, || {
        Ok((has_state(") T ")? || has_state(") Z ")?).then_some(()))
    })?;
    has_state(") T ")
}

/// What others ask of QEMU, and what drains all of its disks.
fn qemu_answers(qmp: &mut Qmp, node: &str) -> Result<()> {
    for (command, arguments) in [
        ("query-block", json!({})),
        ("query-block-exports", json!({})),
        (
            "transaction",
            json!({"actions": [
                {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": "other"}}]}),
        ),
        (
            "transaction",
            json!({"actions": [
                {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": "other"}}]}),
        ),
    ] {
        let asked = Instant::now();
        qmp.execute(command, arguments)?;
        let took = asked.elapsed();
        ensure!(took < AT_ONCE, "{command} took {took:?}");
    }
    Ok(())
}

#[test]
fn a_job_that_stands_still_holds_up_no_drain_and_no_write() -> Result<()> {
    let site = Site::new()?;
    let content = site.path("content");
    Random::new(1).fill_file(&content, BULK_MIB)?;
    let size = BULK_MIB * MIB;
    let daemon = StorageDaemon::start_with_writer_exports(&[
        Disk::raw("da", size).holding(&content),
        Disk::qcow2("db", size).holding(&content),
    ])?;
    std::fs::remove_file(content)?;
    let proxy = Proxy::start(daemon.monitors())?;
    let mut order = site.order(&daemon, "chunked")?.through(&proxy);
    order.full = true;
    let before = QemuState::read(daemon.monitors())?;
    let load = |seed| Load {
        seed,
        rate: 40,
        regions: None,
    };
    let writers = [("da", 2), ("db", 3)]
        .map(|(disk, seed)| Writer::start(daemon.writer_access(disk)?, load(seed)));
    let writers = writers.into_iter().collect::<Result<Vec<_>>>()?;

    let running = site.backup_command(&order).start()?;
    let mut caught = 0;
    for _ in 0..6 {
        if !stop_in_the_middle(&running, &site.archive(), 8 * MIB)? {
            break;
        }
        caught += 1;
        let mut qmp = daemon.control()?;
        qemu_answers(&mut qmp, "da")?;
        drop(qmp);
        for writer in &writers {
            writer.wait_for(8)?;
        }
        if caught == 1 {
            let second = site.backup_command(&order).arg("--quiet").run()?;
            second.assert_refused(11, "another job is running on this VM");
        }
        send(&running, Signal::CONT)?;
    }
    ensure!(caught > 2, "it was caught {caught} times only");
    let outcome = running.finish()?.assert_success();
    for writer in writers {
        let worst = writer.stop()?.worst_latency;
        ensure!(worst < AT_ONCE, "a write took {worst:?}");
    }
    site.check(&order, &Backup::told_by(&outcome)?, &proxy.references()?)?;
    site.check_no_fleecing_images()?;
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| true);
    Ok(())
}

#[test]
fn a_job_that_stands_still_holds_up_no_guest() -> Result<()> {
    let site = Site::new()?;
    let mut guest = Guest::boot(&Guest::usual_disks())?;
    // Enough to read that the job can be caught at it.
    let bulk = guest.folder().join("bulk");
    Random::new(4).fill_file(&bulk, BULK_MIB)?;
    let node = json!({"driver": "raw", "node-name": "bulk",
        "file": {"driver": "file", "filename": bulk}});
    guest.control()?.execute("blockdev-add", node)?;
    let before = QemuState::read(guest.monitors())?;
    let order = site.order_for(&guest.monitors().product, "chunked")?;
    let order = order.only(&["device-a", "device-b", "bulk"]);
    let command = site.backup_command(&order);
    let position = guest.position();

    let running = command.arg("--agent").arg(guest.agent_socket()).start()?;
    ensure!(
        stop_in_the_middle(&running, &site.archive(), 8 * MIB)?,
        "it was not caught"
    );
    let mut qmp = guest.control()?;
    for node in ["disk-a", "bulk"] {
        qemu_answers(&mut qmp, node)?;
    }
    // Drains all disks as well, and stands for whatever else an operator does meanwhile.
    qmp.execute("stop", json!({}))?;
    qmp.execute("cont", json!({}))?;
    drop(qmp);
    guest.wait_for_writes_within(LIMIT)?;
    guest.wait_for_writes_within(LIMIT)?;
    ensure!(guest.is_running()?, "the guest is stopped");
    let worst = guest.worst_write_latency(position);
    ensure!(worst < Some(AT_ONCE), "a write of the guest took {worst:?}");

    send(&running, Signal::CONT)?;
    let outcome = running.finish()?.assert_success();
    site.verify(&site.archive(), &Backup::told_by(&outcome)?.id)?;
    site.check_no_fleecing_images()?;
    QemuState::read(guest.monitors())?.assert_restored(&before, |_| true);
    guest.wait_for_writes()
}
