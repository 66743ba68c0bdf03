//! Measures backups against the tools that people use, on the same snapshot of the same disk, in turns.
//!
//! `make bench` runs it. Everything lies on one file system in memory, so that what is measured is the way of the
//! bytes and not a disk. Times of the product are its own, per step, and begin with the export being up, as the peers'
//! do.

mod answers;
mod neighbour;
mod peer;
mod product;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use fleecebox_tests::{Disk, MIB, Random, StorageDaemon};
use peer::{Export, Peer, fill};
use product::{Backup, Mode, Provider};
use serde_json::{Value, json};
use table::Row;

const NODE: &str = "disk";

/// The dense disk: large enough that a start does not show.
const SIZE: u64 = 1536 * MIB;

/// What is on the file system at once: the disk, and two copies at the most.
const ROOM: u64 = 3 * SIZE + 512 * MIB;

/// Of the disk whose scattered changes are backed up.
const LARGE: u64 = 1 << 40;

/// What the product asks for as free to fleece that disk, and some more.
const FLEECING_ROOM: u64 = LARGE / 16 + 512 * MIB;

/// Rounds, each with a turn of every row. An odd number has a median.
const ROUNDS: usize = 5;

const SPLICE: Provider = provider("splices-everything", "encoding = 'identity'");
const SPLICE_ZSTD: Provider = provider("splices-everything", "encoding = 'zstd'");
const PUT: Provider = provider("chunked", "encoding = 'identity'");
const PUT_ZSTD: Provider = provider("chunked", "encoding = 'zstd'");
const IMAGE: Provider = provider("image", "encoding = 'identity'");

/// A way of the product's to copy the disk, what counts of its time, and the peers with the ratio to be reached.
struct Way {
    name: &'static str,
    provider: Provider,
    seconds: fn(&Backup) -> f64,
    against: &'static [(Peer, Option<f64>)],
}

const WAYS: [Way; 5] = [
    Way {
        name: "splice, identity",
        provider: SPLICE,
        seconds: Backup::to_commit,
        against: &[
            (Peer::NbdcopyNull, None),
            (Peer::NbdcopyFile, Some(1.0)),
            (Peer::QemuImg, None),
        ],
    },
    Way {
        name: "put, identity",
        provider: PUT,
        seconds: Backup::to_commit,
        against: &[(Peer::NbdcopyNull, None), (Peer::NbdcopyFile, None)],
    },
    Way {
        name: "splice, zstd",
        provider: SPLICE_ZSTD,
        seconds: Backup::to_commit,
        against: &[(Peer::NbdcopyZstd, Some(0.95))],
    },
    Way {
        name: "put, zstd",
        provider: PUT_ZSTD,
        seconds: Backup::to_commit,
        against: &[(Peer::NbdcopyZstd, None)],
    },
    Way {
        name: "through memory",
        provider: IMAGE,
        seconds: Backup::without_proof,
        against: &[(Peer::NbdcopyNull, None), (Peer::NbdcopyFile, Some(0.9))],
    },
];

/// The same runs as those of the last way.
const WITH_PROOF: &str = "through memory, with reading back";

const PEERS: [Peer; 4] = [
    Peer::NbdcopyNull,
    Peer::NbdcopyFile,
    Peer::QemuImg,
    Peer::NbdcopyZstd,
];

const fn provider(name: &'static str, settings: &'static str) -> Provider {
    Provider { name, settings }
}

fn main() -> Result<()> {
    let only: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part));
    let folder = std::env::temp_dir();
    check_room(
        &folder,
        ROOM,
        "name another folder with FLEECEBOX_BENCH_FOLDER",
    )?;
    if wanted("incremental") {
        let folder = report_path()?.with_file_name("");
        let other = "name what is to be measured: splice, put, memory, start, neighbour, answers";
        check_room(&folder, FLEECING_ROOM, other)?;
    }

    println!(
        "{} MiB dense raw disk, {ROUNDS} rounds, all in {}, {} processors",
        SIZE / MIB,
        folder.display(),
        std::thread::available_parallelism()?
    );
    let speeds = dense_disk(&wanted)?;
    let mut times = Vec::new();
    if wanted("start") {
        times.push(start_of_a_provider()?);
    }
    if wanted("incremental") {
        times.push(scattered_incremental()?);
    }
    for (name, provider) in [("put", PUT_ZSTD), ("through memory", IMAGE)] {
        let name = format!("neighbour: {name}, time beside a spinning provider");
        if wanted(&name) {
            times.push(neighbour::cost(&name, provider)?);
        }
    }

    if wanted("answers") {
        times.extend(answers::longest_waits()?);
    }

    let report = report_path()?;
    let all = json!({"rows": speeds, "times": times});
    std::fs::write(&report, format!("{all:#}\n"))?;
    println!("as JSON: {}", report.display());
    Ok(())
}

/// Beside the report: for a disk of a TiB the product asks for more free space than there is memory.
fn fleecing_folder() -> Result<PathBuf> {
    Ok(report_path()?.with_file_name("bench-fleecing"))
}

fn check_room(folder: &std::path::Path, room: u64, otherwise: &str) -> Result<()> {
    let stat =
        rustix::fs::statvfs(folder).with_context(|| format!("the folder {}", folder.display()))?;
    let free = stat.f_bavail * stat.f_frsize;
    if free < room {
        bail!(
            "{} has {} MiB free, {} are needed; {otherwise}",
            folder.display(),
            free / MIB,
            room / MIB
        );
    }
    Ok(())
}

fn dense_disk(wanted: &impl Fn(&str) -> bool) -> Result<Vec<Value>> {
    let ways: Vec<&Way> = WAYS.iter().filter(|way| wanted(way.name)).collect();
    if ways.is_empty() {
        return Ok(Vec::new());
    }
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, SIZE)])?;
    fill(&daemon.disks()[0].path, SIZE)?;

    let mut ours: Vec<Row> = Vec::new();
    for way in &ways {
        // Also compiles the component, so that the timed rounds find it in the cache.
        let memory = way.provider.weigh(&daemon, Mode::Full)?;
        let against = way.against.iter().map(|&(peer, goal)| (peer.name(), goal));
        ours.push(Row {
            name: way.name.into(),
            seconds: Vec::new(),
            against: against.collect(),
            memory: Some(memory),
        });
    }
    let mut with_proof = row(WITH_PROOF);
    let mut theirs: Vec<Row> = PEERS.iter().map(|peer| row(peer.name())).collect();
    for _ in 0..ROUNDS {
        let export = Export::open(&daemon, NODE)?;
        for (row, &peer) in theirs.iter_mut().zip(&PEERS) {
            row.seconds.push(export.read_by(peer)?);
        }
        export.close()?;
        for (row, way) in ours.iter_mut().zip(&ways) {
            let backup = way.provider.back_up(&daemon, Mode::Full)?;
            row.seconds.push((way.seconds)(&backup));
            if way.provider.name == IMAGE.name {
                with_proof.seconds.push(backup.to_commit());
            }
        }
    }
    theirs.extend(ours);
    if !with_proof.seconds.is_empty() {
        theirs.push(with_proof);
    }
    Ok(table::speeds(&theirs, SIZE))
}

fn row(name: &str) -> Row {
    Row {
        name: name.into(),
        seconds: Vec::new(),
        against: Vec::new(),
        memory: None,
    }
}

/// The whole run on a disk with next to nothing on it: connecting, asking for extents, the process of the provider
/// and its end. What is asked for, that it runs by then, is less.
fn start_of_a_provider() -> Result<Value> {
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, MIB)])?;
    PUT.back_up(&daemon, Mode::Full)?;
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS {
        seconds.push(PUT.back_up(&daemon, Mode::Full)?.running());
    }
    Ok(table::time(
        "start of a cached provider, its whole run included",
        &seconds,
        0.05,
        None,
    ))
}

/// 64 MiB in blocks of 64 KiB at random places of a TiB.
fn scattered_incremental() -> Result<Value> {
    const DISK: u64 = LARGE;
    const BLOCK: u64 = 64 << 10;
    const DIRTY: u64 = 64 * MIB;
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, DISK)])?;
    let mut random = Random::new(DISK);
    let mut bytes = vec![0; BLOCK as usize];
    let mut scatter = || -> Result<()> {
        let mut disk = daemon.writer_access(NODE)?;
        for _ in 0..DIRTY / BLOCK {
            random.fill(&mut bytes);
            disk.write(random.below(DISK / BLOCK) * BLOCK, &bytes)?;
        }
        Ok(())
    };
    scatter()?;
    PUT.back_up(&daemon, Mode::Incremental)?;
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS {
        scatter()?;
        seconds.push(PUT.back_up(&daemon, Mode::Incremental)?.to_commit());
    }
    scatter()?;
    let memory = PUT.weigh(&daemon, Mode::Incremental)?;
    Ok(table::time(
        "incremental of 64 MiB scattered over 1 TiB, from the point in time to the commit",
        &seconds,
        2.0,
        Some(memory),
    ))
}

/// `bench.json` in cargo's target folder, where this program lies in `release/deps`.
fn report_path() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(3);
    Ok(target
        .context("this program lies in no target folder")?
        .join("bench.json"))
}
