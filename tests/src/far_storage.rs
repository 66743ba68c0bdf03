//! Storage that hangs when a test wants it: an NBD server of its own, which is stopped.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::tool;
use crate::{Random, eventually};

const LIMIT: Duration = Duration::from_secs(60);

/// Serves one image to QEMU, or does not. Dropping it ends it.
#[derive(Debug)]
pub struct FarStorage {
    child: Child,
    socket: PathBuf,
    folder: TempDir,
}

impl FarStorage {
    /// Serves an image of `mib` random MiB.
    ///
    /// # Errors
    /// When the server does not come up.
    pub fn start(mib: u64) -> Result<Self> {
        let folder = TempDir::with_prefix("fleecebox-far-")?;
        let (image, socket) = (
            folder.path().join("far.raw"),
            folder.path().join("far.sock"),
        );
        Random::new(1).fill_file(&image, mib)?;
        let child = tool("qemu-nbd")
            .args(["-f", "raw", "-x", "far", "-t", "-e", "8", "-k"])
            .arg(&socket)
            .arg(&image)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run qemu-nbd (Debian's package qemu-utils)")?;
        eventually("the NBD server", LIMIT, || {
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self {
            child,
            socket,
            folder,
        })
    }

    /// What `blockdev-add` and `-blockdev` take for it.
    pub fn node(&self, name: &str) -> Value {
        json!({"driver": "nbd", "node-name": name, "export": "far",
            "server": {"type": "unix", "path": self.socket}})
    }

    /// A path in its folder, for other sockets of a test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// From now on it answers nothing.
    ///
    /// # Errors
    /// When it has ended.
    pub fn hang(&self) -> Result<()> {
        self.send(Signal::STOP)
    }

    /// It answers again, first what was asked meanwhile.
    ///
    /// # Errors
    /// When it has ended.
    pub fn go_on(&self) -> Result<()> {
        self.send(Signal::CONT)
    }

    fn send(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed()).context("no process")?;
        Ok(kill_process(pid, signal)?)
    }
}

impl Drop for FarStorage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
