//! Fleecebox beside a real libvirt: what its commands do to the disks of a domain between two backups must not make
//! either of them wrong.
//!
//! One libvirtd, which touches nothing of the machine's (`tests/libvirt/run.sh`), has a domain for each case, with a
//! virtio-scsi and a virtio-blk disk. No guest runs in it, so that nobody writes but the case, and after each backup the
//! disks can be held against what is restored of it. Most cases reach the domain by its name, through libvirt, and some by
//! a monitor of its own.
//!
//! `cargo test --test libvirt` runs all, `cargo test --test libvirt NAME…` those whose names contain one of the words.

mod by_name;
mod cases;
mod guest;
mod scene;

use anyhow::Result;
use fleecebox_tests::Libvirt;
use scene::{Scene, Way};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    match run() {
        Ok(failed) if failed.is_empty() => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("failed: {}", failed.join(", "));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("libvirt: {error:?}");
            ExitCode::FAILURE
        }
    }
}

/// The names of the cases that failed.
fn run() -> Result<Vec<&'static str>> {
    let words: Vec<_> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let Some(libvirt) = Libvirt::start()? else {
        return Ok(Vec::new());
    };
    let mut cases = Vec::new();
    for &(name, way, case) in cases::ALL.iter().chain(by_name::ALL) {
        cases.push((name, Run::OnScene(way, case)));
    }
    for &(name, case) in guest::ALL {
        cases.push((name, Run::Alone(case)));
    }
    let mut failed = Vec::new();
    for (name, case) in cases {
        if !words.is_empty() && !words.iter().any(|word| name.contains(&**word)) {
            continue;
        }
        let began = Instant::now();
        // An assertion that fails, fails one case and not all.
        let outcome = catch_unwind(AssertUnwindSafe(|| case.run(&libvirt, name)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("an assertion failed, as told above")));
        let took = began.elapsed().as_secs_f64();
        match outcome {
            Ok(told) => eprintln!("{name}: {took:.1} s ({told})"),
            Err(error) => {
                eprintln!("{name}: {took:.1} s: FAILED: {error:#}");
                failed.push(name);
            }
        }
    }
    Ok(failed)
}

enum Run {
    /// With a domain that has been backed up.
    OnScene(Way, fn(&mut Scene) -> Result<()>),
    /// With one of its own.
    Alone(fn(&Libvirt) -> Result<()>),
}

impl Run {
    /// Says how its backups went.
    fn run(self, libvirt: &Libvirt, name: &str) -> Result<String> {
        match self {
            Self::OnScene(way, case) => {
                let mut scene = Scene::new(libvirt, name, way)?;
                case(&mut scene)?;
                Ok(scene.told())
            }
            Self::Alone(case) => case(libvirt).map(|()| "done".into()),
        }
    }
}
