//! A real `qemu-system-x86_64` without a guest: a machine, its devices and their disks. What a guest would write, the
//! device itself writes on the test's command, so it goes the way of a guest's write.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::latency;
use crate::process::{Daemon, tool};
use crate::{Monitors, Qmp, QmpError, eventually};

const START_LIMIT: Duration = Duration::from_secs(30);
const QUIT_LIMIT: Duration = Duration::from_secs(30);

/// A running emulator, in a temporary folder that goes when this value goes.
#[derive(Debug)]
pub struct Emulator {
    // Before the folder, so that the process is gone when its files go.
    daemon: Option<Daemon>,
    monitors: Monitors,
    arguments: Vec<String>,
    /// In microseconds.
    worst_write: AtomicU64,
    folder: TempDir,
}

impl Emulator {
    /// One that is not started yet. `arguments` is given the folder, makes what the devices need there, and says which
    /// devices there are.
    ///
    /// # Errors
    /// Those of `arguments`.
    pub fn new(arguments: impl FnOnce(&Path) -> Result<Vec<String>>) -> Result<Self> {
        let folder = TempDir::with_prefix("fleecebox-emulator-")?;
        let monitors = Monitors::in_folder(folder.path());
        let mut all: Vec<String> =
            "-nodefaults -no-user-config -display none -machine q35 -accel tcg -m 64"
                .split(' ')
                .map(Into::into)
                .collect();
        for (name, socket) in monitors.sockets() {
            let path = socket.display();
            all.push("-chardev".into());
            all.push(format!("socket,id={name},path={path},server=on,wait=off"));
            all.push("-mon".into());
            all.push(format!("chardev={name},mode=control"));
        }
        all.extend(arguments(folder.path())?);
        Ok(Self {
            daemon: None,
            monitors,
            arguments: all,
            worst_write: AtomicU64::new(0),
            folder,
        })
    }

    /// [`Emulator::new`] and [`Emulator::start`].
    ///
    /// # Errors
    /// As both.
    pub fn running(arguments: impl FnOnce(&Path) -> Result<Vec<String>>) -> Result<Self> {
        let mut emulator = Self::new(arguments)?;
        emulator.start(&[])?;
        Ok(emulator)
    }

    /// The command that starts it, as the test or the product may run it.
    pub fn command(&self, more: &[&str]) -> Vec<String> {
        let mut command = vec!["qemu-system-x86_64".to_string()];
        command.extend(self.arguments.iter().cloned());
        command.extend(more.iter().map(ToString::to_string));
        command
    }

    /// Starts it, again where it ended.
    ///
    /// # Errors
    /// When it does not come up, with its own words.
    pub fn start(&mut self, more: &[&str]) -> Result<()> {
        let mut command = tool("qemu-system-x86_64");
        command.args(&self.command(more)[1..]);
        self.launch(command)
    }

    fn launch(&mut self, mut command: Command) -> Result<()> {
        self.daemon = None;
        for (_, socket) in self.monitors.sockets() {
            // A killed one leaves its sockets.
            let _ = std::fs::remove_file(socket);
        }
        let log = self.folder.path().join("emulator.log");
        let daemon = Daemon::start(&mut command, "qemu-system-x86", &log)?;
        let daemon = self.daemon.insert(daemon);
        let control = &self.monitors.control;
        eventually("the emulator's monitor", START_LIMIT, || {
            daemon.check_alive()?;
            Ok(Qmp::connect(control).ok())
        })?;
        Ok(())
    }

    /// Starts it as another user, who owns its folder and can enter nothing private of the test's. The test must be run
    /// by root.
    ///
    /// # Errors
    /// As [`Emulator::start`].
    pub fn start_as(&mut self, user: u32) -> Result<()> {
        use std::os::unix::fs::chown;
        for entry in std::fs::read_dir(self.folder.path())? {
            chown(entry?.path(), Some(user), Some(user))?;
        }
        chown(self.folder.path(), Some(user), Some(user))?;
        let mut command = tool("setpriv");
        command
            .arg(format!("--reuid={user}"))
            .arg(format!("--regid={user}"))
            .arg("--clear-groups")
            .args(self.command(&[]));
        self.launch(command)
    }

    /// The sockets to talk to it.
    pub fn monitors(&self) -> &Monitors {
        &self.monitors
    }

    /// A connection for the test's own commands.
    ///
    /// # Errors
    /// When it is gone.
    pub fn control(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.monitors.control)
    }

    /// A folder for the test's own files, which goes when the emulator goes.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// QEMU's word for the machine's state.
    ///
    /// # Errors
    /// When it is gone.
    pub fn status(&self) -> Result<String> {
        let status = self.control()?.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().context("no status")?.into())
    }

    /// Lets a device write, as its guest would: `length` bytes of `byte` at `offset`. The device is named by its id, or
    /// by its path in QEMU's tree. Returns how long it took.
    ///
    /// # Errors
    /// When the write fails.
    pub fn write(&self, device: &str, byte: u8, offset: u64, length: u64) -> Result<Duration> {
        let is_meant = |qdev: &str| qdev == device || qdev.split('/').any(|part| part == device);
        let devices = self.devices()?;
        let found = devices.iter().find(|(qdev, _)| is_meant(qdev));
        let (path, _) = found.with_context(|| format!("no device {device} in {devices:?}"))?;
        let line = format!("qemu-io -d {path} \"write -P {byte} {offset} {length}\"");
        let mut qmp = self.control()?;
        let started = Instant::now();
        let said = qmp.execute("human-monitor-command", json!({"command-line": line}))?;
        // This command of QEMU's prints its result to QEMU's own output, and here only what is wrong.
        ensure!(said.as_str() == Some(""), "{line}: {said}");
        let took = started.elapsed();
        self.worst_write
            .fetch_max(took.as_micros() as u64, Ordering::Relaxed);
        Ok(took)
    }

    /// Which devices have a disk: their paths or ids, with the nodes.
    ///
    /// # Errors
    /// When it is gone.
    pub fn devices(&self) -> Result<Vec<(String, String)>> {
        let devices = self.control()?.execute("query-block", json!({}))?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let devices = devices.as_array().context("no list")?.iter();
        Ok(devices
            .map(|device| {
                (
                    text(&device["qdev"]),
                    text(&device["inserted"]["node-name"]),
                )
            })
            .collect())
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.daemon
            .as_mut()
            .context("it was never started")?
            .wait(QUIT_LIMIT)
    }

    /// Ends it in good order.
    ///
    /// # Errors
    /// When it does not end.
    pub fn quit(&mut self) -> Result<()> {
        self.control()?.execute("quit", json!({}))?;
        let status = self.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        match *self.worst_write.get_mut() {
            0 => {}
            micros => latency::record("emulator", Duration::from_micros(micros)),
        }
    }
}
