//! `fleecebox show`.

use super::stored::Stored;
use super::{Failure, Session, places};
use clap::Args;

/// Show one backup's manifest, as JSON.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  fleecebox show 20261123T020000Z-0123456789abcdef --archive /srv/backups"
)]
pub(super) struct Show {
    #[command(flatten)]
    stored: Stored,
}

impl Show {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let manifest = self.stored.find(session)?.manifest;
        show!(
            "{}",
            serde_json::to_string_pretty(&*manifest).map_err(places::failed)?
        );
        Ok(())
    }
}
