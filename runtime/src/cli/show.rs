//! `fleecebox show`.

use super::stored::Stored;
use super::{Failure, Session, places};
use anyhow::anyhow;
use clap::Args;
use std::io::{self, IsTerminal, Write};

/// Show one backup's manifest, as JSON.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox show 20261123T020000Z-0123456789abcdef --archive /srv/backups
  fleecebox show 20261123T020000Z-0123456789abcdef --archive /srv/backups --attachment domain.xml > web.xml")]
pub(super) struct Show {
    #[command(flatten)]
    stored: Stored,
    /// Print what was kept with the backup under this name, such as domain.xml, the VM's definition in libvirt
    #[arg(long, value_name = "NAME")]
    attachment: Option<String>,
}

impl Show {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let found = self.stored.find(session)?;
        let Some(name) = self.attachment else {
            show!(
                "{}",
                serde_json::to_string_pretty(&*found.manifest).map_err(places::failed)?
            );
            return Ok(());
        };
        let manifest = &found.manifest;
        let mut all = manifest.record.kept.iter();
        let Some(kept) = all.find(|kept| kept.name.to_string() == name) else {
            let names = manifest
                .record
                .kept
                .iter()
                .map(|kept| kept.name.to_string());
            let names: Vec<_> = names.collect();
            return Err(Failure::Mistake(anyhow!(
                "nothing of the name '{}' is kept with backup {}{}",
                name.escape_debug(),
                manifest.backup,
                match names.is_empty() {
                    true => String::new(),
                    false => format!("; there is {}", names.join(", ")),
                }
            )));
        };
        let bytes = found.namespace.kept(manifest.backup, kept);
        let bytes = bytes.map_err(Failure::of)?;
        match io::stdout().is_terminal() {
            true => show!("{}", String::from_utf8_lossy(&bytes)),
            // Whoever wants it as a file needs each of its bytes.
            false => drop(io::stdout().write_all(&bytes)),
        }
        Ok(())
    }
}
