//! A soak: for a given time, whatever can happen to a VM and its backups happens in a random order.
//!
//! The guest writes, zeroes and discards all the while. Backups go to two archives by two providers, in part or in full;
//! jobs and sandboxes are killed, cancelled, cut from their monitor; QEMU is restarted in good order and killed. The
//! images beneath are snapshotted, committed, pulled, moved, thrown away, replaced by older copies; bits of the archives
//! rot. Each backup that is committed, whatever became of its job, is verified, restored, and held against what QEMU itself copied
//! at its point in time; some are kept and restored once more, much later.
//!
//! `make soak SECONDS=3600 SEED=7`. The seed decides what is done and written; how far each thing gets before the next
//! one disturbs it is the machine's affair, so a seed alone does not always bring a failure back.

mod graph;
mod harm;
mod world;

use anyhow::{Context, Result};
use fleecebox_tests::Random;
use graph::Change;
use std::collections::BTreeMap;
use std::fmt;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use world::{Ended, World};

/// How long it takes where nothing is said: as part of all tests.
const SHORT: Duration = Duration::from_secs(15);

/// Steps in one world. Its archives only ever grow, by up to the size of the disks a backup.
const STEPS: u64 = 60;

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Backup,
    FullBackup,
    KillAtCommand,
    KillAtSomeTime,
    KillSandbox,
    Cancel,
    CutMonitor,
    Recover,
    RestoreAnother,
    RestartQemu,
    KillQemu,
    Images(Change),
    Damage,
    RestoreAmongLinks,
}

/// How often each comes, relative to the others.
const STEP_WEIGHTS: [(Step, u64); 20] = [
    (Step::Backup, 8),
    (Step::FullBackup, 1),
    (Step::KillAtCommand, 4),
    (Step::KillAtSomeTime, 3),
    (Step::KillSandbox, 2),
    (Step::Cancel, 3),
    (Step::CutMonitor, 3),
    (Step::Recover, 2),
    (Step::RestoreAnother, 3),
    (Step::RestartQemu, 1),
    (Step::KillQemu, 1),
    (Step::Images(Change::Snapshot), 2),
    (Step::Images(Change::Commit), 1),
    (Step::Images(Change::Pull), 1),
    (Step::Images(Change::Mirror), 1),
    (Step::Images(Change::Revert), 1),
    (Step::Images(Change::PutBack), 1),
    (Step::Images(Change::Clear), 1),
    (Step::Damage, 1),
    (Step::RestoreAmongLinks, 1),
];

impl Step {
    fn random(random: &mut Random) -> Self {
        let mut left = random.below(STEP_WEIGHTS.iter().map(|(_, weight)| weight).sum());
        for (step, weight) in STEP_WEIGHTS {
            if left < weight {
                return step;
            }
            left -= weight;
        }
        Self::Backup
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backup => "backup",
            Self::FullBackup => "backup in full",
            Self::KillAtCommand => "job killed at a QMP command",
            Self::KillAtSomeTime => "job killed at some time",
            Self::KillSandbox => "sandbox killed",
            Self::Cancel => "job cancelled",
            Self::CutMonitor => "monitor lost at a QMP command",
            Self::Recover => "recover",
            Self::RestoreAnother => "older backup restored",
            Self::RestartQemu => "QEMU restarted",
            Self::KillQemu => "QEMU killed",
            Self::Images(Change::Snapshot) => "external snapshot",
            Self::Images(Change::Commit) => "overlay committed",
            Self::Images(Change::Pull) => "backing images pulled",
            Self::Images(Change::Mirror) => "disk moved",
            Self::Images(Change::Revert) => "overlay thrown away",
            Self::Images(Change::PutBack) => "older copy put back",
            Self::Images(Change::Clear) => "bitmap cleared",
            Self::Damage => "a bit of an archive rotten",
            Self::RestoreAmongLinks => "restored among links",
        })
    }
}

/// What came of all steps of one kind.
#[derive(Default)]
struct Tally {
    steps: u64,
    committed: u64,
    compared: u64,
    worst_write: Duration,
}

fn main() -> ExitCode {
    let (limit, seed) = match arguments() {
        Ok(Some(arguments)) => arguments,
        // A filter for other tests.
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            return ExitCode::from(2);
        }
    };
    println!("soak: {} s, seed {seed}", limit.as_secs());
    let mut tallies = BTreeMap::new();
    let result = soak(limit, seed, &mut tallies);
    print(&tallies);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("soak: FAILED with seed {seed}: {error:?}");
            ExitCode::FAILURE
        }
    }
}

/// `--seconds N`, `--seed N`, and nothing else of libtest's but words, of which one must be in this test's name.
fn arguments() -> Result<Option<(Duration, u64)>> {
    let mut limit = SHORT;
    let mut seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(1, |now| now.as_secs());
    let mut words = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<u64> {
            let value = arguments.next().context("it needs a number");
            Ok(value?.parse()?)
        };
        match argument.as_str() {
            "--seconds" => limit = Duration::from_secs(number().context(argument)?),
            "--seed" => seed = number().context(argument)?,
            flag if flag.starts_with('-') => {}
            word => words.push(word.to_string()),
        }
    }
    let wanted = words.is_empty() || words.iter().any(|word| "soak".contains(word.as_str()));
    Ok(wanted.then_some((limit, seed)))
}

fn soak(limit: Duration, seed: u64, tallies: &mut BTreeMap<Step, Tally>) -> Result<()> {
    let mut random = Random::new(seed);
    let end = Instant::now() + limit;
    let mut done = 0;
    for number in 1.. {
        if Instant::now() >= end {
            break;
        }
        eprintln!("world {number}, {done} steps so far");
        let mut world = World::new(random.bits())?;
        for _ in 0..STEPS {
            if Instant::now() >= end {
                break;
            }
            done += 1;
            let step = Step::random(&mut random);
            let before = world.counts();
            take(step, &mut world).with_context(|| format!("step {done}, {step}"))?;
            let tally = tallies.entry(step).or_default();
            tally.steps += 1;
            tally.committed += world.counts().committed - before.committed;
            tally.compared += world.counts().compared - before.compared;
            tally.worst_write = tally.worst_write.max(world.worst_write()?);
        }
        world.end().context("at a world's end")?;
    }
    Ok(())
}

fn take(step: Step, world: &mut World) -> Result<()> {
    match step {
        Step::Backup => world.back_up(false),
        Step::FullBackup => world.back_up(true),
        Step::KillAtCommand => world.kill_at_command(),
        Step::KillAtSomeTime => world.disturb(Ended::Killed, |running, _| {
            let _ = running.process().kill();
            Ok(())
        }),
        Step::KillSandbox => world.disturb(Ended::Failed, |running, random| {
            let family: Vec<_> = running.family()?.into_iter().collect();
            match family.len() as u64 {
                0 => {}
                some => {
                    // It may have ended by itself since.
                    let _ = family[random.below(some) as usize].kill();
                }
            }
            Ok(())
        }),
        Step::Cancel => world.disturb(Ended::Failed, |running, _| {
            let pid = rustix::process::Pid::from_raw(running.process().pid);
            let pid = pid.context("no process")?;
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            Ok(())
        }),
        Step::CutMonitor => world.cut_monitor(),
        Step::Recover => world.recover(),
        Step::RestoreAnother => world.restore_another(),
        Step::RestartQemu => world.restart_qemu(),
        Step::KillQemu => world.kill_qemu(),
        Step::Images(change) => world.change_images(change),
        Step::Damage => world.damage(),
        Step::RestoreAmongLinks => world.restore_among_links(),
    }
}

fn print(tallies: &BTreeMap<Step, Tally>) {
    println!(
        "{:<30} {:>6} {:>10} {:>9} {:>12}",
        "what happened", "times", "committed", "compared", "worst write"
    );
    for (step, tally) in tallies {
        println!(
            "{:<30} {:>6} {:>10} {:>9} {:>9} ms",
            step.to_string(),
            tally.steps,
            tally.committed,
            tally.compared,
            tally.worst_write.as_millis()
        );
    }
}
