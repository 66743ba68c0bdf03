//! Reports that all tests write together and `make test` prints at its end: files in the target folder, a line for each
//! entry.
//!
//! It stands on the standard library alone: the runtime's own tests take this file in by its path.

use std::fs::File;
use std::io::{ErrorKind, Result, Write};
use std::thread;

/// Tells why the test that runs in this thread shows nothing on this machine, or not all that it could, in
/// `not-shown.tsv`: what a test that passes prints, nobody sees.
pub fn not_shown(why: &str) {
    eprintln!("NOT SHOWN: {why}");
    enter("not-shown.tsv", &[why]);
}

/// Adds a line to a report: the test's program, its name, and the `fields`, with tabs between them.
pub(crate) fn enter(report: &str, fields: &[&str]) {
    // A report is no test: where it cannot be kept, nothing is wrong.
    let _ = append(report, fields);
}

fn append(report: &str, fields: &[&str]) -> Result<()> {
    let path = std::env::current_exe()?;
    let program = path.file_stem().unwrap_or_default().to_string_lossy();
    // Cargo puts a digest behind the name.
    let program = program.rsplit_once('-').map_or(&*program, |(name, _)| name);
    let thread = thread::current();
    let test = thread.name().unwrap_or("a thread of its own");
    let mut line = format!("{program}\t{test}");
    for field in fields {
        line += &format!("\t{}", field.replace(['\n', '\t'], " "));
    }
    line.push('\n');
    // Tests lie in `release/deps` of the target folder.
    let target = path.ancestors().nth(3).ok_or(ErrorKind::NotFound)?;
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(target.join(report))?;
    // Tests run side by side, and one short write at the end is never torn (write(2) with O_APPEND).
    file.write_all(line.as_bytes())
}
