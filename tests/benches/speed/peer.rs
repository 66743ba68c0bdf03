//! What others need for the same export: made by hand as the product makes its own, and read by `nbdcopy` and
//! `qemu-img`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use fleecebox_tests::{Qmp, StorageDaemon, eventually};
use serde_json::json;
use std::time::Duration;

const EXPORT: &str = "peer";
const NOT_LONG: Duration = Duration::from_secs(10);

/// The best of `nbdcopy` for such an export, measured over request sizes of 64 KiB to 32 MiB.
const NBDCOPY: [&str; 3] = ["--connections=4", "--requests=4", "--request-size=1048576"];

/// Another program that reads the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// `nbdcopy` to nowhere: reading alone.
    NbdcopyNull,
    /// `nbdcopy` to a file.
    NbdcopyFile,
    /// `nbdcopy` through `zstd -T2 -3` to a file.
    NbdcopyZstd,
    /// `qemu-img convert` to a raw file.
    QemuImg,
}

impl Peer {
    /// As the table shows it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NbdcopyNull => "nbdcopy null:",
            Self::NbdcopyFile => "nbdcopy to a file",
            Self::NbdcopyZstd => "nbdcopy | zstd -T2 -3",
            Self::QemuImg => "qemu-img convert",
        }
    }
}

/// A snapshot-access export of one disk. Nothing writes to the disk while it stands.
#[derive(Debug)]
pub(crate) struct Export<'a> {
    daemon: &'a StorageDaemon,
    control: Qmp,
    fleecing: PathBuf,
}

impl<'a> Export<'a> {
    /// Takes the point in time of the disk `node`.
    pub(crate) fn open(daemon: &'a StorageDaemon, node: &str) -> Result<Self> {
        let size = fs::metadata(&daemon.disks()[0].path)?.len();
        let fleecing = daemon.folder().join("peer.fleecing");
        File::create(&fleecing)?.set_len(size)?;
        let mut control = daemon.control()?;
        let file = json!({"driver": "file", "filename": fleecing, "discard": "unmap"});
        let target =
            json!({"driver": "raw", "node-name": "peer-target", "discard": "unmap", "file": file});
        control.execute("blockdev-add", target)?;
        let backup = json!({
            "job-id": "peer-job", "device": node, "target": "peer-target", "sync": "none",
            "filter-node-name": "peer-filter", "auto-dismiss": false,
        });
        control.execute("blockdev-backup", backup)?;
        let access = json!({
            "driver": "snapshot-access", "node-name": "peer-access", "file": "peer-filter",
            "discard": "unmap",
        });
        control.execute("blockdev-add", access)?;
        let export = json!({
            "type": "nbd", "id": EXPORT, "node-name": "peer-access", "name": EXPORT,
            "writable": true,
        });
        control.execute("block-export-add", export)?;
        Ok(Self {
            daemon,
            control,
            fleecing,
        })
    }

    /// Seconds that `peer` needs for all of it.
    pub(crate) fn read_by(&self, peer: Peer) -> Result<f64> {
        let uri = format!(
            "nbd+unix:///{EXPORT}?socket={}",
            self.daemon.nbd_socket().display()
        );
        let output = self.daemon.folder().join("peer.output");
        // What is left of the last time would be overwritten in place, which costs less.
        let _ = fs::remove_file(&output);
        let started = Instant::now();
        match peer {
            Peer::NbdcopyNull => run(nbdcopy().arg(uri).arg("null:"))?,
            Peer::NbdcopyFile => run(nbdcopy().arg(uri).arg(&output))?,
            Peer::QemuImg => run(Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "raw"])
                .arg(uri)
                .arg(&output))?,
            Peer::NbdcopyZstd => {
                let mut copy = nbdcopy()
                    .arg(uri)
                    .arg("-")
                    .stdout(Stdio::piped())
                    .spawn()
                    .context("cannot run nbdcopy (Debian's package libnbd-bin)")?;
                let pipe = copy.stdout.take().context("it was piped just now")?;
                run(Command::new("zstd")
                    .args(["-T2", "-3", "-q", "-f", "-o"])
                    .arg(&output)
                    .stdin(pipe))?;
                if !copy.wait()?.success() {
                    bail!("nbdcopy failed");
                }
            }
        }
        let took = started.elapsed().as_secs_f64();
        let _ = fs::remove_file(&output);
        Ok(took)
    }

    /// Takes it down.
    pub(crate) fn close(mut self) -> Result<()> {
        self.control
            .execute("block-export-del", json!({"id": EXPORT, "mode": "hard"}))?;
        self.control
            .event("BLOCK_EXPORT_DELETED", NOT_LONG, |_| true)?;
        self.control
            .execute("blockdev-del", json!({"node-name": "peer-access"}))?;
        self.control
            .execute("job-cancel", json!({"id": "peer-job"}))?;
        eventually("the peer's job to end", NOT_LONG, || {
            let jobs = self.control.execute("query-jobs", json!({}))?;
            Ok((jobs[0]["status"] == "concluded").then_some(()))
        })?;
        self.control
            .execute("job-dismiss", json!({"id": "peer-job"}))?;
        self.control
            .execute("blockdev-del", json!({"node-name": "peer-target"}))?;
        Ok(fs::remove_file(&self.fleecing)?)
    }
}

fn nbdcopy() -> Command {
    let mut command = Command::new("nbdcopy");
    command.args(NBDCOPY);
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {command:?}; `make bench` says what is missing"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// Fills a file with data of which about half can be squeezed out, no two blocks alike.
pub(crate) fn fill(path: &std::path::Path, size: u64) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    let mut random = fleecebox_tests::Random::new(size);
    let mut piece = vec![0; 1 << 20];
    for at in (0..size).step_by(piece.len()) {
        random.fill(&mut piece);
        // Every other KiB repeats one line of its own, as text or tables would.
        for kib in piece.chunks_mut(2048) {
            let (line, rest) = kib.split_at_mut(64);
            for copy in rest[..960].chunks_mut(64) {
                copy.copy_from_slice(&line[..copy.len()]);
            }
        }
        file.write_all_at(&piece, at)?;
    }
    Ok(())
}
