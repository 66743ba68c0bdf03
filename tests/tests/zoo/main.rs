//! The zoo: every way that is known for a provider to be hostile, one after the other, on one VM that must not notice.
//!
//! Each attack has a good base to build on, in the same namespace, so that its failure could spoil the tracking; it runs
//! beside a neighbour's honest job and while the guest writes. After each: the operator was told what happened and what
//! to do; the sandbox stayed within its limits; QEMU, the archive and the fleecing folder are as before; the neighbour's
//! job was not held up; and the next honest backup carries every change, held against what QEMU itself copied.
//!
//! `cargo test --test zoo` runs all, `cargo test --test zoo NAME…` those whose names contain one of the words. A table is
//! printed at the end. `tests/hostile` holds the providers.

mod blind;
mod cases;
mod files;
mod peak;
mod proof;
mod raw;
mod scene;
mod special;
mod stall;

use anyhow::{Result, ensure};
use cases::{Case, Source, cases};
use fleecebox_tests::{MIB, component};
use scene::{Attack, Scene};
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// What a provider of the zoo may have of memory for both disks, in bytes, unless its case says otherwise.
const MEMORY: u64 = 128 * MIB;

/// What a sandbox process takes beside: the program itself, its stacks, machine code, and one message in each direction.
const SANDBOX: u64 = 48 * MIB;

/// What compiling may take; `sandbox::confine` says why.
const COMPILING: u64 = 2 << 30;

/// What the job process may take, whatever the provider does.
const JOB: u64 = 160 * MIB;

/// A line of the table.
struct Row {
    name: String,
    status: String,
    says: String,
    sandbox: u64,
    job: u64,
    neighbour: Duration,
    took: Duration,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("the zoo: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let words: Vec<_> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let wanted =
        |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let started = Instant::now();
    let mut scene = Scene::new()?;
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    let mut done = |name: &str, took: Duration, result: Result<Vec<Row>>| match result {
        Ok(new) => {
            eprintln!("{name}: {:.1} s", took.as_secs_f64());
            rows.extend(new);
        }
        Err(error) => {
            eprintln!("{name}: FAILED: {error:?}");
            failed.push(name.to_string());
        }
    };
    let all = cases();
    // Without a base it reads everything: what comes to nothing then leaves nothing to build on either.
    let first = ["skips-a-block", "traps-at-claim", "stores-garbage"];
    for case in all
        .iter()
        .filter(|case| first.contains(&case.name) && wanted(case.name))
    {
        let began = Instant::now();
        let row = caught(|| {
            let mut row = attack(&mut scene, case)?;
            row.name += " (no base)";
            Ok(vec![row])
        });
        done(case.name, began.elapsed(), row);
    }
    scene.configure("unused", &component("chunked")?, "")?;
    scene.back_up_honestly()?;
    for case in all.iter().filter(|case| wanted(case.name)) {
        let began = Instant::now();
        let row = caught(|| {
            let row = attack(&mut scene, case)?;
            scene.back_up_honestly()?;
            Ok(vec![row])
        });
        done(case.name, began.elapsed(), row);
    }
    for (name, test) in special::all() {
        if wanted(name) {
            let began = Instant::now();
            let row = caught(|| Ok(test(&mut scene)?.into_iter().collect()));
            done(name, began.elapsed(), row);
        }
    }
    let neighbours = scene.check_neighbour().unwrap_or_else(|error| {
        eprintln!("the neighbour: FAILED: {error:?}");
        failed.push("the neighbour".into());
        0
    });
    print(&rows, &scene, neighbours, started.elapsed());
    // One that lives for less than it takes to look is missed now and then.
    let runs = rows.iter().filter(|row| row.status == "1");
    let unseen = runs.filter(|row| row.sandbox == 0).count();
    if unseen * 10 > rows.len() {
        eprintln!("{unseen} sandboxes were not seen");
        failed.push("looking at the sandboxes".into());
    }
    if !failed.is_empty() {
        eprintln!("failed: {}", failed.join(", "));
    }
    Ok(failed.is_empty())
}

/// An assertion that fails, fails one case and not all.
fn caught<T>(case: impl FnOnce() -> Result<T>) -> Result<T> {
    let case = std::panic::AssertUnwindSafe(case);
    std::panic::catch_unwind(case)
        .unwrap_or_else(|_| Err(anyhow::anyhow!("an assertion failed, as told above")))
}

/// Lets one case happen, and holds what was told and measured against what it should be.
fn attack(scene: &mut Scene, case: &Case) -> Result<Row> {
    let file = match case.component {
        Source::Example(name) => component(name)?,
        Source::Made(make) => make(&scene.site.path(&format!("{}.wasm", case.name)))?,
    };
    scene.configure("hostile", &file, &policy(case))?;
    let mut command = scene.site.backup_command(&scene.order("hostile"));
    if let Some(seconds) = case.processor {
        command = command.limited_to(seconds);
    }
    let began = Instant::now();
    let attack = scene.attack(&command)?;
    let row = row(case.name, &attack, began.elapsed());
    check_told(&attack, case.status, case.says)?;
    let runs = case.status == 1;
    let volume = row.says.contains("volume da: ") || row.says.contains("volume db: ");
    ensure!(volume == runs, "whether it concerns a volume: {}", row.says);
    // The components of this table are compiled here for the first time, which has a limit of its own.
    let most = if case.processor.is_some() {
        COMPILING
    } else {
        MEMORY + SANDBOX
    };
    ensure!(
        row.sandbox <= most,
        "the sandbox took {} MiB",
        row.sandbox >> 20
    );
    ensure!(row.job <= JOB, "the job process took {} MiB", row.job >> 20);
    Ok(row)
}

fn policy(case: &Case) -> String {
    let how = case
        .how
        .map(|how| format!("[provider.settings]\nhow = '{how}'\n"));
    let mut usual = format!("memory = {MEMORY}\n");
    if !case.policy.contains("cpu-seconds") {
        // For both disks together.
        usual += "cpu-seconds = 2\n";
    }
    let limits = "[provider.limits]\n";
    let policy = match case.policy.contains(limits) {
        true => case.policy.replace(limits, &format!("{limits}{usual}")),
        false => format!("{limits}{usual}{}", case.policy),
    };
    policy + &how.unwrap_or_default()
}

/// One line that names what happened, in words that steer no terminal.
fn check_told(attack: &Attack, status: i32, says: &str) -> Result<()> {
    let outcome = &attack.outcome;
    let told = &outcome.stderr;
    ensure!(
        outcome.code() == Some(status),
        "exit status {:?}: {told}",
        outcome.code()
    );
    let last = told.lines().last().unwrap_or_default();
    // Once: not again as its own cause.
    ensure!(
        last.matches(says).count() == 1,
        "{says:?} is not told once: {last}"
    );
    ensure!(
        outcome.document()?["exit_status"] == status,
        "{}",
        outcome.stdout
    );
    let harmless = |c: char| c == '\n' || !c.is_control();
    for text in [told, &outcome.stdout] {
        ensure!(text.chars().all(harmless), "it steers a terminal: {text:?}");
        ensure!(text.len() < 64 << 10, "{} bytes were printed", text.len());
    }
    Ok(())
}

fn row(name: &str, attack: &Attack, took: Duration) -> Row {
    let told = attack.outcome.stderr.lines().last().unwrap_or_default();
    Row {
        name: name.into(),
        status: attack
            .outcome
            .code()
            .map_or("signal".into(), |code| code.to_string()),
        says: told.strip_prefix("fleecebox: ").unwrap_or(told).into(),
        sandbox: attack.peak.sandbox,
        job: attack.peak.job,
        neighbour: attack.neighbour,
        took,
    }
}

/// To standard output, whose closing is no failure.
fn print(rows: &[Row], scene: &Scene, neighbours: usize, took: Duration) {
    let mut out = std::io::stdout().lock();
    let widest = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let _ = writeln!(
        out,
        "\n{:widest$}  exit  took s  sandbox MiB  job MiB  neighbour s  message",
        "case"
    );
    for row in rows {
        let _ = writeln!(
            out,
            "{:widest$}  {:>4}  {:>6.1}  {:>11}  {:>7}  {:>11.2}  {}",
            row.name,
            row.status,
            row.took.as_secs_f64(),
            row.sandbox >> 20,
            row.job >> 20,
            row.neighbour.as_secs_f64(),
            row.says,
        );
    }
    let _ = writeln!(
        out,
        "\n{} attacks in {:.0} s; {neighbours} backups of the neighbour are whole; its job takes {:.2} s alone",
        rows.len(),
        took.as_secs_f64(),
        scene.quiet().as_secs_f64(),
    );
}
