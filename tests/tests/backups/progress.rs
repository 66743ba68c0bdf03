//! `--progress json`: each line is an event, what it counts is what the result says, and no reader holds up a job.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Bitmap, Disk, Fleecebox, MIB, Order, QemuState, Random, Site, StorageDaemon, compare,
    eventually,
};
use rustix::fs::OFlags;
use serde_json::{Value, json};

const SIZE: u64 = 4 * MIB;
const LIMIT: Duration = Duration::from_secs(60);
/// A job with it lasts for some seconds.
const SLOW: &str = "--bandwidth=2MiB";

/// A pipe with a name, whose reader is the test.
struct Pipe {
    path: PathBuf,
    /// Never blocks. It writes too, so that opening waits for nobody.
    end: File,
}

impl Pipe {
    fn new(path: PathBuf) -> Result<Self> {
        ensure!(
            Command::new("mkfifo").arg(&path).status()?.success(),
            "mkfifo"
        );
        let mut options = File::options();
        options.read(true).write(true);
        let end = options
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(&path)?;
        Ok(Self { path, end })
    }

    /// Until nothing more fits in. Returns how much that was.
    fn fill(&mut self) -> Result<usize> {
        let page = [b'.'; 4096];
        let mut filled = 0;
        loop {
            match self.end.write(&page) {
                Ok(written) => filled += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(filled),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What is in it.
    fn read(&mut self) -> Result<Vec<u8>> {
        let mut held = Vec::new();
        match self.end.read_to_end(&mut held) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error.into()),
            _ => Ok(held),
        }
    }

    /// Standard error of `command` goes into it.
    fn hears(&self, command: Fleecebox) -> Fleecebox {
        let shell = r#"pipe=$1; shift; exec "$@" 2>"$pipe""#;
        let path = self.path.display().to_string();
        command.started_by(["sh", "-c", shell, "sh", &path])
    }
}

fn events(lines: &str) -> Result<Vec<Value>> {
    ensure!(lines.ends_with('\n'), "half a line: {lines}");
    let parse = |line: &str| serde_json::from_str(line).with_context(|| line.to_owned());
    lines.lines().map(parse).collect()
}

/// The events of a whole command, begun and ended as they should be.
fn told(lines: &str, command: &str, status: i32) -> Result<Vec<Value>> {
    let events = events(lines)?;
    let (first, last) = (events.first(), events.last().context("nothing was told")?);
    let begin = json!({"event": "begin", "version": 1, "command": command});
    ensure!(first == Some(&begin), "{lines}");
    ensure!(
        last["event"] == "end" && last["exit_status"] == status,
        "{last}"
    );
    Ok(events)
}

/// What was told last of each volume: the bytes that are done, and all. They only grow.
fn how_far(events: &[Value]) -> Result<BTreeMap<String, (u64, u64)>> {
    let mut volumes = BTreeMap::new();
    for event in events.iter().filter(|event| event["event"] == "progress") {
        let bytes = |name: &str| event[name].as_u64().with_context(|| event.to_string());
        let now = (bytes("done_bytes")?, bytes("total_bytes")?);
        let volume = event["volume"].as_str().context("no volume")?.to_owned();
        let before = volumes.insert(volume, now).unwrap_or_default();
        ensure!(before.0 <= now.0 && now.0 <= now.1, "{event}");
    }
    Ok(volumes)
}

fn scene(provider: &str) -> Result<(Site, StorageDaemon, Order)> {
    let site = Site::new()?;
    let content = site.path("content");
    Random::new(7).fill_file(&content, SIZE / MIB)?;
    let disks = [
        Disk::raw("da", SIZE).holding(&content),
        Disk::qcow2("db", SIZE),
    ];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let mut bytes = vec![0; 128 << 10];
    Random::new(8).fill(&mut bytes);
    daemon.writer_access("db")?.write(MIB, &bytes)?;
    let order = site.order(&daemon, provider)?;
    Ok((site, daemon, order))
}

fn holds_the_content(site: &Site, backup: &Backup) -> Result<()> {
    let restored = site.restore(&site.archive(), &backup.id)?;
    compare::same_bytes(&site.path("content"), &restored.join("da.raw"))
}

#[test]
fn the_bytes_of_each_volume_are_those_of_the_result() -> Result<()> {
    for provider in ["chunked", "image"] {
        let (site, _daemon, order) = scene(provider)?;
        let command = site.backup_command(&order).arg("--progress=json");
        let outcome = command.run()?.assert_success();
        let all = told(&outcome.stderr, "backup", 0)?;
        ensure!(all.last().unwrap()["dropped_lines"] == 0, "{all:?}");
        for step in ["snapshot", "running", "releasing", "committed"] {
            let step = json!({"event": "step", "step": step});
            ensure!(all.contains(&step), "{step}: {all:?}");
        }
        let backup = Backup::told_by(&outcome)?;
        for volume in &backup.volumes {
            let bytes = |name: &str| volume[name].as_u64().context("no bytes");
            // Gone through once to be backed up, and what is claimed once more to be proven.
            let all_bytes = bytes("dirty_bytes")? - bytes("zero_bytes")? + bytes("claimed_bytes")?;
            let name = volume["name"].as_str().context("no name")?;
            let found = how_far(&all)?[name];
            assert_eq!(found, (all_bytes, all_bytes), "{provider}, {name}");
        }

        std::fs::create_dir(site.path("files"))?;
        let files = site.path("files").display().to_string();
        for (command, more) in [("verify", &[][..]), ("restore", &["--to", &files])] {
            let read = site
                .command(&[command, &backup.id, "--json", "--progress", "json"])
                .arg("--archive")
                .arg(site.archive());
            let read = more.iter().fold(read, |read, word| read.arg(*word));
            let outcome = read.run()?.assert_success();
            let whole = (SIZE, SIZE);
            let found = how_far(&told(&outcome.stderr, command, 0)?)?;
            let expected = [("da".into(), whole), ("db".into(), whole)];
            assert_eq!(found, BTreeMap::from(expected), "{provider}, {command}");
        }
    }
    Ok(())
}

#[test]
fn an_export_tells_what_happens_too() -> Result<()> {
    let (site, _daemon, order) = scene("chunked")?;
    let command = site.command(&["export", "web", "--progress", "json", "--json"]);
    let command = command.arg("--qmp").arg(&order.qmp).arg("--nbd");
    let command = command.arg(order.nbd.context("no server")?);
    let command = command.arg("--disk").arg("da").arg("--disk").arg("db");
    let running = command
        .arg("--fleecing")
        .arg(site.path("fleecing"))
        .start()?;
    running.wait_for_event(LIMIT, |line| line["volumes"].is_array())?;
    let end = site.command(&["export", "end", "web", "--failure"]);
    end.run()?.assert_success();
    let outcome = running.finish()?.assert_success();
    let all = told(&outcome.stderr, "export", 0)?;
    ensure!(
        all.contains(&json!({"event": "step", "step": "snapshot"})),
        "{all:?}"
    );
    Ok(())
}

#[test]
fn errors_warnings_and_what_others_write_are_events_too() -> Result<()> {
    let (site, daemon, order) = scene("chunked")?;
    site.backup(&order)?;
    let refused = |command: Fleecebox, status: i32| -> Result<Vec<Value>> {
        let outcome = command.arg("--progress=json").run()?;
        let all = told(&outcome.stderr, "backup", status)?;
        let errors = all.iter().filter(|event| event["event"] == "error");
        let errors: Vec<_> = errors.collect();
        let document = outcome.document()?;
        ensure!(
            errors.len() == 1 && errors[0]["text"] == document["error"],
            "{errors:?}, {document}"
        );
        Ok(all)
    };
    let command = site.backup_command(&order).arg("--disk=none-such");
    refused(command.arg("--quiet"), 2)?;

    let said = ["sh", "-c", "echo one two >&2; printf three >&2; exit 1"];
    site.configure(&format!("[vm.web]\nstart = {said:?}\n"))?;
    drop(daemon);
    let all = refused(site.backup_command(&order), 2)?;
    for text in ["one two", "three"] {
        let line = json!({"event": "stderr", "text": text});
        ensure!(all.contains(&line), "{text}: {all:?}");
    }
    Ok(())
}

#[test]
fn a_reader_that_never_reads_holds_up_no_job() -> Result<()> {
    let (site, daemon, order) = scene("chunked")?;
    let before = QemuState::read(daemon.monitors())?;
    let mut pipe = Pipe::new(site.path("pipe"))?;
    let filled = pipe.fill()?;
    let command = site.backup_command(&order).arg("--progress=json").arg(SLOW);
    let outcome = pipe.hears(command).run()?.assert_success();
    ensure!(outcome.took < LIMIT, "{:?}", outcome.took);
    holds_the_content(&site, &Backup::told_by(&outcome)?)?;
    let is_ours = |bitmap: &Bitmap| bitmap.name.starts_with("fleecebox:");
    QemuState::read(daemon.monitors())?.assert_restored(&before, is_ours);
    // Whole lines or nothing: here it is nothing.
    assert_eq!(pipe.read()?.len(), filled);
    Ok(())
}

#[test]
fn a_reader_that_comes_late_gets_all_but_the_progress_it_missed() -> Result<()> {
    let (site, _daemon, order) = scene("chunked")?;
    let mut pipe = Pipe::new(site.path("pipe"))?;
    let filled = pipe.fill()?;
    let command = site.backup_command(&order).arg("--progress=json").arg(SLOW);
    let running = pipe.hears(command.arg("--full")).start()?;
    // Its point in time is over, and most of its progress told to nobody.
    let manifests = site.path("archive/namespaces");
    eventually("the backup", LIMIT, || {
        Ok(is_committed(&manifests)?.then_some(()))
    })?;
    let mut heard = Vec::new();
    let all = eventually("the last line", LIMIT, || {
        heard.extend(pipe.read()?);
        let lines = String::from_utf8_lossy(&heard[filled.min(heard.len())..]);
        Ok(lines
            .contains(r#""event":"end""#)
            .then(|| lines.into_owned()))
    })?;
    let outcome = running.finish()?.assert_success();
    let all = told(&all, "backup", 0)?;
    let dropped = all.last().unwrap()["dropped_lines"].as_u64();
    ensure!(dropped.is_some_and(|dropped| dropped > 0), "{all:?}");
    ensure!(
        all.contains(&json!({"event": "step", "step": "releasing"})),
        "{all:?}"
    );
    assert_eq!(how_far(&all)?["da"], (SIZE, SIZE));
    holds_the_content(&site, &Backup::told_by(&outcome)?)
}

fn is_committed(namespaces: &Path) -> Result<bool> {
    if !namespaces.exists() {
        return Ok(false);
    }
    let files = fleecebox_tests::files_below(namespaces)?;
    Ok(files.iter().any(|file| file.ends_with("manifest.json")))
}

#[test]
fn a_reader_that_goes_away_is_no_error_of_the_job() -> Result<()> {
    let (site, _daemon, order) = scene("chunked")?;
    let mut pipe = Pipe::new(site.path("pipe"))?;
    let command = site.backup_command(&order).arg("--progress=json").arg(SLOW);
    let running = pipe.hears(command).start()?;
    eventually("the first line", LIMIT, || {
        Ok((!pipe.read()?.is_empty()).then_some(()))
    })?;
    drop(pipe);
    let outcome = running.finish()?.assert_success();
    holds_the_content(&site, &Backup::told_by(&outcome)?)
}
