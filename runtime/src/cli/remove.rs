//! `fleecebox provider remove`.

use super::{Failure, Session, installed, places};
use anyhow::{Context, anyhow};
use clap::Args;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Remove an installed provider. Its backups stay: each archive keeps the components that made what it holds.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox provider remove chunked")]
pub(super) struct Remove {
    /// As `fleecebox provider list` calls it
    name: String,
}

impl Remove {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let names = installed::names(session)?;
        if !names.contains(&self.name) {
            let known = match &names[..] {
                [] => "none is".to_owned(),
                names => format!("installed: {}", names.join(", ")),
            };
            return Err(Failure::Mistake(anyhow!(
                "no provider named '{}' is installed ({known})",
                self.name.escape_debug()
            )));
        }
        let (folder, _) = installed::folder(session)?;
        let file = installed::file(&self.name);
        let bytes = folder.read(&file).unwrap_or_default();
        folder
            .remove_file(&file)
            .with_context(|| format!("{file} cannot be removed from the state folder"))
            .map_err(Failure::Failed)?;
        places::cache(session)?
            .forget(Sha256::digest(&bytes).into())
            .map_err(places::failed)?;
        if session.json {
            show!("{:#}", json!({ "removed": self.name }));
        } else {
            show!(
                "{} is removed; what it backed up can be restored all the same",
                self.name
            );
        }
        Ok(())
    }
}
