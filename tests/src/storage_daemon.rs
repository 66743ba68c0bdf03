//! A real `qemu-storage-daemon`: QEMU's block layer, monitor and NBD server without a machine.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tempfile::TempDir;

use crate::process::{Daemon, tool};
use crate::{Disk, DiskFile, Monitors, NbdClient, Qmp, QmpError, eventually};

const START_LIMIT: Duration = Duration::from_secs(10);
const QUIT_LIMIT: Duration = Duration::from_secs(30);

/// A running daemon with its disks, in a temporary folder that goes when this value goes.
#[derive(Debug)]
pub struct StorageDaemon {
    // Before the folder, so that the process is gone when its files go.
    daemon: Daemon,
    disks: Vec<DiskFile>,
    writer_exports: bool,
    /// Where another QEMU than the machine's own is unpacked.
    qemu: Option<PathBuf>,
    monitors: Monitors,
    folder: TempDir,
}

impl StorageDaemon {
    /// Starts the daemon with `disks` and no NBD server: the product has to start its own.
    ///
    /// # Errors
    /// When a program is missing or the daemon does not answer.
    pub fn start(disks: &[Disk]) -> Result<Self> {
        Self::launch(None, disks, false)
    }

    /// Starts the daemon with an NBD server on [`StorageDaemon::nbd_socket`] that already exports
    /// every disk for writing. QEMU has one NBD server per process, so the product has to share
    /// this one.
    ///
    /// # Errors
    /// As [`StorageDaemon::start`].
    pub fn start_with_writer_exports(disks: &[Disk]) -> Result<Self> {
        Self::launch(None, disks, true)
    }

    /// [`StorageDaemon::start_with_writer_exports`], of the QEMU whose packages are unpacked in that folder.
    ///
    /// # Errors
    /// As [`StorageDaemon::start`].
    pub fn start_of(qemu: &Path, disks: &[Disk]) -> Result<Self> {
        Self::launch(Some(qemu), disks, true)
    }

    fn launch(qemu: Option<&Path>, disks: &[Disk], writer_exports: bool) -> Result<Self> {
        let folder = TempDir::with_prefix("fleecebox-qsd-")?;
        let disks: Vec<_> = disks
            .iter()
            .map(|disk| disk.create(folder.path()))
            .collect::<Result<_>>()?;
        let monitors = Monitors::in_folder(folder.path());
        let daemon = run(qemu, folder.path(), &monitors, &disks, writer_exports)?;
        Ok(Self {
            daemon,
            disks,
            writer_exports,
            qemu: qemu.map(Into::into),
            monitors,
            folder,
        })
    }

    /// The sockets to talk to it.
    pub fn monitors(&self) -> &Monitors {
        &self.monitors
    }

    /// A connection for the test's own commands.
    ///
    /// # Errors
    /// When the daemon is gone.
    pub fn control(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.monitors.control)
    }

    /// Where the NBD server of [`StorageDaemon::start_with_writer_exports`] listens.
    pub fn nbd_socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    /// Whether it runs an NBD server of its own.
    pub fn has_writer_exports(&self) -> bool {
        self.writer_exports
    }

    /// A connection to write to the live disk `node`, through the daemon as a guest would.
    ///
    /// # Errors
    /// When there is no such disk or there are no writer exports.
    pub fn writer_access(&self, node: &str) -> Result<NbdClient> {
        if !self.writer_exports {
            bail!("the storage daemon was started without writer exports");
        }
        NbdClient::connect(&self.nbd_socket(), node)
            .with_context(|| format!("no writer export of {node}"))
    }

    /// The disks, in the order given; a stopped daemon's may be swapped or changed.
    pub fn disks_mut(&mut self) -> &mut Vec<DiskFile> {
        &mut self.disks
    }

    /// The disks, in the order given.
    pub fn disks(&self) -> &[DiskFile] {
        &self.disks
    }

    /// A folder for the test's own files, which goes when the daemon goes.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Adds a disk while the daemon runs. It gets no writer export.
    ///
    /// # Errors
    /// When the file cannot be made or the daemon refuses it.
    pub fn add_disk(&mut self, disk: &Disk) -> Result<()> {
        let file = disk.create(self.folder.path())?;
        self.control()?.execute("blockdev-add", file.blockdev())?;
        self.disks.push(file);
        Ok(())
    }

    /// Removes a disk while the daemon runs, which must not be exported; its file stays.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn remove_disk(&mut self, node: &str) -> Result<()> {
        self.control()?
            .execute("blockdev-del", json!({"node-name": node}))?;
        self.disks.retain(|disk| disk.node != node);
        Ok(())
    }

    /// Ends it in good order: bitmaps that are persistent are stored.
    ///
    /// # Errors
    /// When it does not end.
    pub fn quit(&mut self) -> Result<()> {
        self.control()?.execute("quit", json!({}))?;
        let status = self.daemon.wait(QUIT_LIMIT)?;
        if !status.success() {
            bail!(
                "the storage daemon ended with {status}: {}",
                self.daemon.log()
            );
        }
        Ok(())
    }

    /// Ends it by SIGKILL.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// Starts it again with the disks that [`StorageDaemon::disks`] lists now.
    ///
    /// # Errors
    /// As [`StorageDaemon::start`], or when it still runs.
    pub fn start_again(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.daemon = run(
            self.qemu.as_deref(),
            self.folder.path(),
            &self.monitors,
            &self.disks,
            self.writer_exports,
        )?;
        Ok(())
    }

    /// Fails, with the daemon's own words, if it has ended.
    ///
    /// # Errors
    /// When it has.
    pub fn check_alive(&mut self) -> Result<()> {
        self.daemon.check_alive()
    }
}

fn run(
    qemu: Option<&Path>,
    folder: &Path,
    monitors: &Monitors,
    disks: &[DiskFile],
    writer_exports: bool,
) -> Result<Daemon> {
    let mut command = match qemu {
        None => tool("qemu-storage-daemon"),
        Some(qemu) => {
            let mut command = Command::new(qemu.join("usr/bin/qemu-storage-daemon"));
            command.env("LD_LIBRARY_PATH", qemu.join("usr/lib/x86_64-linux-gnu"));
            command
        }
    };
    for disk in disks {
        command.arg("--blockdev").arg(disk.blockdev().to_string());
    }
    for (name, socket) in monitors.sockets() {
        // A killed daemon leaves its sockets.
        let _ = std::fs::remove_file(socket);
        let path = socket.display();
        command
            .arg("--chardev")
            .arg(format!("socket,id={name},path={path},server=on,wait=off"));
        command.arg("--monitor").arg(format!("chardev={name}"));
    }
    if writer_exports {
        let socket = folder.join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        let path = socket.display();
        command
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={path}"));
        for DiskFile { node, .. } in disks {
            let export = format!("nbd,id=writer-{node},node-name={node},name={node},writable=on");
            command.arg("--export").arg(export);
        }
    }
    let mut daemon = Daemon::start(&mut command, "qemu-utils", &folder.join("daemon.log"))?;
    eventually("the storage daemon's monitor", START_LIMIT, || {
        daemon.check_alive()?;
        Ok(Qmp::connect(&monitors.control).ok())
    })?;
    Ok(daemon)
}
