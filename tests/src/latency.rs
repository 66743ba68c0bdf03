//! The slowest write that each test's guests saw, for the table at the end of `make test`.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::fleecebox::target_folder;

/// Enters what `who` saw during the test that runs in this thread: one line of `worst-writes.tsv` in the target folder,
/// with the test's program, its name, `who`, and microseconds.
pub(crate) fn record(who: &str, worst: Duration) {
    // The table is a report and no test: where it cannot be kept, nothing is wrong with the guest.
    let _ = enter(who, worst);
}

fn enter(who: &str, worst: Duration) -> Result<()> {
    let program = std::env::current_exe()?;
    let program = program.file_stem().context("a program has a name")?;
    // Cargo puts a digest behind the name.
    let program = program.to_string_lossy();
    let program = program.rsplit_once('-').map_or(&*program, |(name, _)| name);
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a thread of its own");
    let line = format!("{program}\t{test}\t{who}\t{}\n", worst.as_micros());
    let path = target_folder()?.join("worst-writes.tsv");
    // Tests run side by side, and one short write at the end is never torn (write(2) with O_APPEND).
    let mut file = File::options().create(true).append(true).open(path)?;
    Ok(file.write_all(line.as_bytes())?)
}
