//! What a hostile neighbour costs an honest job: the same backup alone, and beside one whose provider spins.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use fleecebox_tests::{Disk, MIB, Running, StorageDaemon, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::product::{Mode, Provider};
use crate::{NODE, ROUNDS, fill, table};

/// The honest job's disk: long enough for a scheduler to settle.
const SIZE: u64 = 512 * MIB;

/// When a sandbox has used so much processor time it spins; no start or compiling takes as long.
const SETTLED: Duration = Duration::from_secs(3);

/// A spinning provider has one thread, which can take no more than one of two processors.
const GOAL: f64 = 2.0;

const SPINS: Provider = Provider {
    name: "spins",
    settings: "",
};

/// How much longer the backup takes beside the neighbour, of each round.
pub(crate) fn cost(name: &str, honest: Provider) -> Result<Value> {
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, SIZE)])?;
    fill(&daemon.disks()[0].path, SIZE)?;
    // A VM of its own.
    let next_door = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, MIB)])?;
    fill(&next_door.disks()[0].path, MIB)?;
    honest.back_up(&daemon, Mode::Full)?;
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let alone = honest.back_up(&daemon, Mode::Full)?.to_commit();
        let neighbour = SPINS.command(&next_door, Mode::Full)?.start()?;
        eventually("the neighbour to spin", Duration::from_secs(120), || {
            let processes = neighbour.family()?;
            let spins = |pid: i32| processor_time(pid).is_some_and(|time| time > SETTLED);
            Ok(processes
                .iter()
                .any(|process| spins(process.pid))
                .then_some(()))
        })?;
        let beside = honest.back_up(&daemon, Mode::Full)?.to_commit();
        end(neighbour)?;
        ratios.push(beside / alone);
    }
    Ok(table::ratio(name, &ratios, GOAL))
}

fn end(neighbour: Running) -> Result<()> {
    let job = Pid::from_raw(neighbour.process().pid).context("no such process")?;
    kill_process(job, Signal::TERM)?;
    neighbour.finish()?;
    Ok(())
}

/// `utime` of `/proc/PID/stat`, in hundredths of a second (proc_pid_stat(5)).
fn processor_time(pid: i32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u64 = fields.split_whitespace().nth(11)?.parse().ok()?;
    Some(Duration::from_millis(ticks * 10))
}
