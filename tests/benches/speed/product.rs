//! Backups by the product: how long each step took, and the memory of its processes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use fleecebox_tests::{Fleecebox, StorageDaemon, component};
use serde_json::Value;

/// Between two looks at memory. The kernel keeps the highest value, so only the last moment can be missed.
const LOOK: Duration = Duration::from_millis(20);

/// A provider with its settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Provider {
    /// Its crate's name.
    pub(crate) name: &'static str,
    /// TOML.
    pub(crate) settings: &'static str,
}

/// What one backup cost.
#[derive(Debug)]
pub(crate) struct Backup {
    steps: BTreeMap<String, f64>,
}

/// Most resident memory of the processes of one backup, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// The job process.
    pub(crate) job: u64,
    /// The largest sandbox process.
    pub(crate) sandbox: u64,
}

/// Whether there may be a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Everything, into an archive that is made for it and removed again.
    Full,
    /// Into the archive of the last one of this mode.
    Incremental,
}

impl Provider {
    /// A timed backup of all disks.
    pub(crate) fn back_up(self, daemon: &StorageDaemon, mode: Mode) -> Result<Backup> {
        let outcome = self.command(daemon, mode)?.run()?.assert_success();
        remove_archive(daemon, mode)?;
        let result: Value = serde_json::from_str(&outcome.stdout)?;
        let steps = serde_json::from_value(result["step_seconds"].clone())
            .with_context(|| format!("no times in {result}"))?;
        Ok(Backup { steps })
    }

    /// A backup whose memory is looked at, which is too slow to be timed.
    pub(crate) fn weigh(self, daemon: &StorageDaemon, mode: Mode) -> Result<Memory> {
        let running = self.command(daemon, mode)?.start()?;
        let mut memory = Memory { job: 0, sandbox: 0 };
        // A process that ended has no memory any more, even before it is waited for.
        while let Some(job) = peak(running.process().pid) {
            memory.job = memory.job.max(job);
            for process in running.family()? {
                memory.sandbox = memory.sandbox.max(peak(process.pid).unwrap_or(0));
            }
            std::thread::sleep(LOOK);
        }
        running.finish()?.assert_success();
        remove_archive(daemon, mode)?;
        Ok(memory)
    }

    /// The command line of a backup of all disks.
    pub(crate) fn command(self, daemon: &StorageDaemon, mode: Mode) -> Result<Fleecebox> {
        let folder = daemon.folder();
        let archive = folder.join(archive_name(mode));
        fs::create_dir_all(&archive)?;
        let settings = folder.join("settings.toml");
        fs::write(&settings, self.settings)?;
        // So that a configuration of this machine plays no part.
        let configuration = folder.join("fleecebox.toml");
        fs::write(&configuration, "")?;
        Ok(Fleecebox::new(["backup", "bench", "--json", "--quiet"])
            .arg("--config")
            .arg(configuration)
            .arg("--state")
            .arg(folder.join("state"))
            .arg("--fleecing")
            .arg(crate::fleecing_folder()?)
            .arg("--disk")
            .arg(&daemon.disks()[0].node)
            .arg("--qmp")
            .arg(&daemon.monitors().product)
            .arg("--nbd")
            .arg(daemon.nbd_socket())
            .arg("--archive")
            .arg(archive)
            .arg("--settings")
            .arg(settings)
            .arg("--provider")
            .arg(component(self.name)?))
    }
}

impl Backup {
    /// From the export being up to the provider's end, in seconds: the reading alone.
    pub(crate) fn running(&self) -> f64 {
        self.step("running")
    }

    /// From the export being up to the commit, without reading back what is claimed.
    pub(crate) fn without_proof(&self) -> f64 {
        self.step("running") + self.step("releasing") + self.step("committing")
    }

    /// From the point in time to the commit.
    pub(crate) fn to_commit(&self) -> f64 {
        self.without_proof() + self.step("proving")
    }

    fn step(&self, name: &str) -> f64 {
        self.steps.get(name).copied().unwrap_or(f64::NAN)
    }
}

fn archive_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Full => "archive-full",
        Mode::Incremental => "archive-incremental",
    }
}

fn remove_archive(daemon: &StorageDaemon, mode: Mode) -> Result<()> {
    if mode == Mode::Full {
        fs::remove_dir_all(daemon.folder().join(archive_name(mode)))?;
    }
    Ok(())
}

/// `VmHWM` of `/proc/PID/status`, in bytes; nothing once the process has ended.
fn peak(pid: i32) -> Option<u64> {
    let status =
        fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}
