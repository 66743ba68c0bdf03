//! The stored backup that a command is for, from its id.

use super::{Failure, Session, places, text};
use crate::archive::{BackupId, VolumeRecord};
use crate::job::stored::{self, StoredBackup};
use anyhow::anyhow;
use clap::Args;

/// Arguments of every command that reads one backup.
#[derive(Debug, Args)]
pub(super) struct Stored {
    /// The backup's id
    backup: String,
    /// The archive, by name or folder
    #[arg(long, value_name = "NAME|FOLDER")]
    archive: Option<String>,
    /// The part of the archive to look in, where several hold a backup of that id [default: all]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
}

impl Stored {
    /// The committed backup and the part of the archive that holds it.
    pub(super) fn find(&self, session: &Session) -> Result<StoredBackup, Failure> {
        let archive = places::archive(session, self.archive.as_deref(), false)?;
        let id: BackupId = self.backup.parse().map_err(|_| {
            Failure::Mistake(anyhow!(
                "'{}' is no backup id; `fleecebox list` shows them",
                self.backup.escape_debug()
            ))
        })?;
        let found = stored::find(&archive, id, self.namespace.as_deref());
        let found = found.map_err(Failure::of)?;
        for unseen in &found.unseen {
            warn!("{}", text::one_line(unseen));
        }
        Ok(found)
    }
}

/// The volumes of a backup that are `wanted`; all where none is named.
pub(super) fn volumes<'a>(
    wanted: &[String],
    all: &'a [VolumeRecord],
) -> Result<Vec<&'a VolumeRecord>, Failure> {
    let names = || all.iter().map(|volume| volume.name.as_str());
    for name in wanted {
        if !names().any(|known| known == name) {
            return Err(Failure::Mistake(anyhow!(
                "the backup holds no volume '{}' (there is {})",
                name.escape_debug(),
                names().collect::<Vec<_>>().join(", ")
            )));
        }
    }
    let is_wanted = |volume: &&VolumeRecord| wanted.is_empty() || wanted.contains(&volume.name);
    Ok(all.iter().filter(is_wanted).collect())
}
