//! `fleecebox demo`: becomes the program `fleecebox-demo` that is built beside this one. The demonstration plays the VM,
//! its disk and hostile providers, none of which belongs into this program.

use super::{Failure, Session};
use anyhow::{Context, anyhow};
use clap::Args;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Show the main job on a real QEMU with disks that are written all the while.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  fleecebox demo --components target/components\n\n`make demo` builds what it needs first."
)]
pub(super) struct Demo {
    /// Folder of the built providers
    #[arg(long, value_name = "FOLDER")]
    components: PathBuf,
    /// On a Linux guest that boots under QEMU, instead of on QEMU's storage daemon
    #[arg(long)]
    vm: bool,
}

impl Demo {
    pub(super) async fn run(self, _: &Session) -> Result<(), Failure> {
        let program = std::env::current_exe()
            .context("this program's own path cannot be found")
            .map_err(Failure::Failed)?
            .with_file_name("fleecebox-demo");
        if !program.exists() {
            return Err(Failure::Mistake(anyhow!(
                "{} is not there; `make demo` builds and runs it",
                program.display()
            )));
        }
        let mut demo = Command::new(&program);
        demo.arg("--components").arg(&self.components);
        if self.vm {
            demo.arg("--vm");
        }
        // In place of this process, so that signals reach it and its exit status is ours.
        let error = demo.exec();
        Err(Failure::Failed(
            anyhow!(error).context(format!("{} cannot be run", program.display())),
        ))
    }
}
