//! The demonstration says what is so, and leaves nothing behind: not at its end, and not when it is interrupted.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use fleecebox_tests::{Fleecebox, component, eventually};
use rustix::process::{Pid, Signal, kill_process};

const SOON: Duration = Duration::from_secs(60);

/// With its own folder for temporary files, so that what is left in it is the demonstration's.
fn demo(scratch: &Path) -> Result<Fleecebox> {
    let component = component("chunked")?;
    let components = component.parent().expect("a file lies in a folder");
    Ok(Fleecebox::new(["demo", "--components"])
        .arg(components)
        .env("TMPDIR", scratch))
}

fn files_in(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder)?;
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

#[test]
fn the_demonstration_shows_each_refusal_and_leaves_nothing() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    // That its processes have ended is seen to by the harness.
    let outcome = demo(scratch.path())?.run()?.assert_success();
    println!("took {:?}", outcome.took);
    // As words, wherever lines were broken.
    let words: Vec<_> = outcome
        .stdout
        .split(|c: char| c.is_whitespace() || c == '│')
        .filter(|word| !word.is_empty())
        .collect();
    let text = words.join(" ");
    for expected in [
        "the provider says it succeeded, but 65536 bytes are in no finished object",
        "it imports `wasi:sockets/",
        "but cannot give it back",
        "died at step 'running'; cleaning up after it",
        "its changes are merged back",
        "4 backups, all proven",
        "checks held",
    ] {
        assert!(text.contains(expected), "no {expected:?} in:\n{text}");
    }
    assert!(!text.contains("NOT SO"), "{text}");
    assert!(!text.contains('\x1b'), "colours in a pipe:\n{text}");
    assert_eq!(text.matches("not one differs").count(), 4, "{text}");
    assert_eq!(files_in(scratch.path())?, [""; 0]);
    Ok(())
}

#[test]
fn an_interrupted_demonstration_leaves_nothing() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let running = demo(scratch.path())?.start()?;
    running.wait_for_line(SOON, |line| line.contains("$ fleecebox backup"))?;
    let pid = Pid::from_raw(running.process().pid).expect("it was started");
    kill_process(pid, Signal::INT)?;
    let outcome = running.finish()?;
    assert_eq!(outcome.code(), Some(130), "{}", outcome.stderr);
    let gone = || Ok(files_in(scratch.path())?.is_empty().then_some(()));
    eventually("the files to be removed", Duration::from_secs(1), gone)
}
