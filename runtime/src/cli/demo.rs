//! `fleecebox demo`: runs the program `fleecebox-demo` that is built beside this one. The demonstration plays the VM,
//! its disk and hostile providers, none of which belongs into this program.

use super::{Failure, Session};
use anyhow::{Context, anyhow};
use clap::Args;
use std::ffi::OsString;
use std::process::Command;

/// Show the main job on a real storage daemon with a disk that is written all the while.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  fleecebox demo --components target/components\n\n`make demo` builds what it needs first."
)]
pub(super) struct Demo {
    /// Handed to the demonstration
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS"
    )]
    arguments: Vec<OsString>,
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
        // The demonstration cleans up by itself on a signal, which reaches it as it reaches this process.
        let status = tokio::task::spawn_blocking(move || {
            Command::new(program).args(self.arguments).status()
        })
        .await
        .map_err(|error| Failure::Failed(error.into()))?
        .map_err(|error| Failure::Failed(error.into()))?;
        match status.success() {
            true => Ok(()),
            false => Err(Failure::Failed(anyhow!(
                "the demonstration ended with {status}"
            ))),
        }
    }
}
