//! Child processes that never outlive the test.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::eventually;

/// A program that runs for as long as this value lives; its output goes into a file.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// `package` is named when the program is not installed.
    pub(crate) fn start(command: &mut Command, package: &str, log: &Path) -> Result<Self> {
        let output = File::create(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| missing(command.get_program(), package))?;
        Ok(Self {
            child,
            log: log.into(),
        })
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the program printed so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Fails with the program's own words if it is gone.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("QEMU ended early with {status}: {}", self.log());
        }
        Ok(())
    }

    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        eventually("QEMU to end", limit, || Ok(self.child.try_wait()?))
    }

    /// SIGKILL, as a crash of the host's process would look.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already gone is fine; there is nobody to tell anything else.
        let _ = self.kill();
    }
}

/// Runs a tool to its end and gives what it printed; not 0 is an error with its words.
pub(crate) fn run(package: &str, command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| missing(command.get_program(), package))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// A command by name; Debian keeps mkfs and its like where users' PATH does not look.
pub(crate) fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn missing(program: &OsStr, package: &str) -> String {
    format!(
        "cannot run {} (Debian's package {package})",
        program.display()
    )
}
