//! What a provider's language costs: the size of a component, its first and its later starts, and the throughput
//! through its memory and by `put`, which must not depend on the language.
//!
//! `make bench-languages` runs it. The same two programs in each language: Rust's are `image` and `chunked`, the others'
//! what the templates become. All encode with zstd. The disk holds random bytes and lies in memory.

use std::time::Instant;

use anyhow::{Context, Result};
use fleecebox_tests::{Disk, Fleecebox, MIB, Random, StorageDaemon, component};
use serde_json::Value;

const NODE: &str = "disk";

/// Large enough that a start does not show.
const SIZE: u64 = 512 * MIB;

/// An odd number has a median.
const ROUNDS: usize = 5;

/// A language, and the providers in it: one that reads the bytes, and a blind one.
const LANGUAGES: [(&str, &str, &str); 4] = [
    ("Rust", "image", "chunked"),
    ("C", "c-sighted", "c-blind"),
    ("Python", "python-sighted", "python-blind"),
    ("JavaScript", "javascript-sighted", "javascript-blind"),
];

fn main() -> Result<()> {
    let small = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, MIB)])?;
    let large = StorageDaemon::start_with_writer_exports(&[Disk::raw(NODE, SIZE)])?;
    Random::new(1).fill_file(&large.disks()[0].path, SIZE / MIB)?;
    println!(
        "{:<11} {:>9} {:>13} {:>13} {:>15} {:>12}",
        "", "component", "first start", "later starts", "through memory", "by put"
    );
    for (language, sighted, blind) in LANGUAGES {
        let size = std::fs::metadata(component(sighted)?)?.len() as f64 / MIB as f64;
        // What the first backup takes longer than the next: to compile the component and to keep what became of it.
        let begun = Instant::now();
        back_up(&small, sighted)?;
        let first = begun.elapsed();
        let begun = Instant::now();
        back_up(&small, sighted)?;
        let first = first.saturating_sub(begun.elapsed()).as_secs_f64();
        let later = median(|| back_up(&small, sighted))?;
        let memory = SIZE as f64 / MIB as f64 / median(|| back_up(&large, sighted))?;
        back_up(&large, blind)?;
        let put = SIZE as f64 / MIB as f64 / median(|| back_up(&large, blind))?;
        println!(
            "{language:<11} {size:>5.2} MiB {first:>11.2} s {:>10.0} ms {memory:>9.0} MiB/s {put:>6.0} MiB/s",
            later * 1000.0
        );
    }
    Ok(())
}

fn median(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut seconds = (0..ROUNDS).map(|_| measure()).collect::<Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[ROUNDS / 2])
}

/// A full backup into an archive of its own: the seconds from the export being up to the provider's end. On a small disk
/// that is the provider's start, its process included.
fn back_up(daemon: &StorageDaemon, provider: &str) -> Result<f64> {
    let folder = daemon.folder();
    let archive = folder.join("archive");
    std::fs::create_dir_all(&archive)?;
    std::fs::write(folder.join("fleecebox.toml"), "")?;
    let outcome = Fleecebox::new(["backup", "bench", "--json", "--quiet"])
        .arg("--config")
        .arg(folder.join("fleecebox.toml"))
        .arg("--state")
        .arg(folder.join("state"))
        .arg("--disk")
        .arg(NODE)
        .arg("--fleecing")
        .arg(folder)
        .arg("--qmp")
        .arg(&daemon.monitors().product)
        .arg("--nbd")
        .arg(daemon.nbd_socket())
        .arg("--archive")
        .arg(&archive)
        .arg("--provider")
        .arg(component(provider)?)
        .run()?
        .assert_success();
    std::fs::remove_dir_all(&archive)?;
    let result: Value = outcome.document()?;
    result["step_seconds"]["running"]
        .as_f64()
        .context("no time of the step `running`")
}
