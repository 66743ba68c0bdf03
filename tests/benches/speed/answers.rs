//! How long a second monitor of the VM waits for its answer at each moment of a backup's end, the storage of a disk that is
//! not in the backup hanging and not.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Disk, FarStorage, Fleecebox, MIB, NbdClient, Running, StorageDaemon, eventually,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::product::Mode;
use crate::{NODE, PUT, ROUNDS, fill, table};

const SIZE: u64 = 64 * MIB;
const LIMIT: Duration = Duration::from_secs(60);

/// How long the moments last in which nothing happens.
const WATCHED: Duration = Duration::from_secs(2);

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(1);

/// The longest wait of each moment, in their order.
type Waits = Vec<(String, Duration)>;

/// Prints them, and gives them as JSON.
pub(crate) fn longest_waits() -> Result<Vec<Value>> {
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, SIZE)])?;
    fill(&daemon.disks()[0].path, SIZE)?;
    let far = FarStorage::start(1)?;
    let mut qmp = daemon.control()?;
    qmp.execute("blockdev-add", far.node("far"))?;
    qmp.execute(
        "block-export-add",
        json!({"type": "nbd", "id": "writer-far", "node-name": "far", "name": "far"}),
    )?;
    drop(qmp);
    let mut all = Vec::new();
    let ends: [fn(&StorageDaemon, &FarStorage) -> Result<Waits>; 2] = [answers, hangs];
    for end in ends {
        let mut rounds: Vec<Waits> = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(end(&daemon, &far)?);
        }
        for (moment, _) in &rounds[0] {
            let is_meant = |wait: &&(String, Duration)| wait.0 == *moment;
            let waits = rounds
                .iter()
                .filter_map(|round| round.iter().find(is_meant));
            let seconds: Vec<f64> = waits.map(|(_, wait)| wait.as_secs_f64()).collect();
            let name = format!("answers: longest wait of a second monitor, {moment}");
            all.push(table::longest(&name, &seconds));
        }
    }
    Ok(all)
}

/// The backup ends well.
fn answers(daemon: &StorageDaemon, _far: &FarStorage) -> Result<Waits> {
    watch(daemon, |moment| {
        let running = PUT.command(daemon, Mode::Full)?.start()?;
        let journal = daemon.folder().join("state/vms/bench/journal.json");
        let stat = format!("/proc/{}/stat", running.process().pid);
        while !std::fs::read_to_string(&stat)?.contains(") Z ") {
            let text = std::fs::read_to_string(&journal).unwrap_or_default();
            let ends = ["releasing", "proving", "committing", "switching-bitmaps"];
            let step = ends
                .iter()
                .find(|step| text.contains(&format!("\"step\": \"{step}\"")));
            if let Some(step) = step {
                moment(step);
            }
            std::thread::sleep(PAUSE);
        }
        running.finish()?.assert_success();
        std::fs::remove_dir_all(daemon.folder().join("archive-full"))?;
        Ok(())
    })
}

/// The storage hangs when the backup is to be released: it is told to end, twice, and ends; the storage answers, and the
/// watchdog does the rest.
fn hangs(daemon: &StorageDaemon, far: &FarStorage) -> Result<Waits> {
    watch(daemon, |moment| {
        let backup: Fleecebox = PUT.command(daemon, Mode::Full)?;
        let mut running = backup.env("FLEECEBOX_STOP_AT", "releasing").start()?;
        let stat = format!("/proc/{}/stat", running.process().pid);
        eventually("the job to stop itself", LIMIT, || {
            Ok(std::fs::read_to_string(&stat)?
                .contains(") T ")
                .then_some(()))
        })?;
        far.hang()?;
        let mut user = NbdClient::connect(&daemon.nbd_socket(), "far")?;
        let user = std::thread::spawn(move || user.read(0, &mut [0; 4096]).is_ok());
        std::thread::sleep(Duration::from_millis(200));
        moment("hanging, releasing");
        send(&running, Signal::INT)?;
        send(&running, Signal::CONT)?;
        running.wait_for_line(LIMIT, |line| line.contains("waiting for the storage"))?;
        moment("hanging, told to end at once");
        send(&running, Signal::INT)?;
        running.wait_for_the_job()?;
        moment("hanging, left to the watchdog");
        std::thread::sleep(WATCHED);
        ensure!(!user.is_finished(), "the storage did not hang all the time");
        moment("answering again, taken down by the watchdog");
        far.go_on()?;
        running.finish()?;
        ensure!(user.join().is_ok_and(|read| read), "the user broke");
        std::fs::remove_dir_all(daemon.folder().join("archive-full"))?;
        Ok(())
    })
}

fn send(running: &Running, signal: Signal) -> Result<()> {
    let job = Pid::from_raw(running.process().pid).context("no process")?;
    Ok(kill_process(job, signal)?)
}

/// Asks a second monitor all the time while `run` says which moment it is.
fn watch(daemon: &StorageDaemon, run: impl FnOnce(&dyn Fn(&str)) -> Result<()>) -> Result<Waits> {
    let waits: Mutex<Waits> = Mutex::default();
    let over = AtomicBool::new(false);
    let mut qmp = daemon.control()?;
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                let began = Instant::now();
                let moments = lock(&waits).len();
                qmp.execute("query-block-exports", json!({}))?;
                let took = began.elapsed();
                // Whoever was asked in one moment and answered in the next counts for both.
                for (_, longest) in lock(&waits).iter_mut().skip(moments.saturating_sub(1)) {
                    *longest = took.max(*longest);
                }
                std::thread::sleep(PAUSE);
            }
            Ok(())
        });
        let ran = run(&|moment| {
            let mut waits = lock(&waits);
            if waits.last().is_none_or(|(last, _)| last != moment) {
                waits.push((moment.into(), Duration::ZERO));
            }
        });
        over.store(true, Ordering::Relaxed);
        asked.join().ok().context("the asking broke")??;
        ran
    })?;
    Ok(waits
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner()))
}

fn lock(waits: &Mutex<Waits>) -> std::sync::MutexGuard<'_, Waits> {
    // No value here is left half-changed by a panic.
    waits
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
