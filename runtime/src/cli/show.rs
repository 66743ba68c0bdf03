//! `fleecebox show`.

use super::{Failure, Session, target};
use clap::Args;

/// Show one backup's manifest, as JSON.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  fleecebox show 20261123T020000Z-0123456789abcdef --archive /srv/backups"
)]
pub(super) struct Show {
    /// The backup's id
    backup: String,
    /// The archive, by name or folder
    #[arg(long, value_name = "NAME|FOLDER")]
    archive: Option<String>,
}

impl Show {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let archive = target::archive(session, self.archive.as_deref(), false)?;
        let (_, manifest) = target::backup(&archive, &self.backup)?;
        show!(
            "{}",
            serde_json::to_string_pretty(&*manifest).map_err(target::failed)?
        );
        Ok(())
    }
}
