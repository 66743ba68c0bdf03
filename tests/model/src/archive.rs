//! An archive: the backups in one namespace, and how far each commit got.

use crate::qemu::{BLOCKS, Content};
use std::fmt;

/// How far a manifest got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Commit {
    /// Its rename was sent and not answered: it happens later, or never.
    InFlight,
    /// It can be seen; a loss of power may take it away.
    Visible,
    /// Its directory is synced.
    Durable,
}

/// One backup.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Backup {
    /// Its id. Ids are drawn at random in the product; here they count, and nothing is decided by their order.
    pub id: u8,
    /// The backup that its block table builds on.
    pub base: Option<u8>,
    /// The images that the disk was made of.
    pub images: Vec<u8>,
    /// What it says itself: what was read. The rest is in the base's table.
    pub blocks: [Option<u8>; BLOCKS],
    /// What it has to restore to: the disk at its point in time. Nobody in the model looks at it.
    pub point_in_time: Content,
    /// Whether some job had died before it was begun. Only for the question whether the model does anything.
    pub after_crash: bool,
    /// Whether it happened.
    pub commit: Commit,
}

/// One archive.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Archive {
    /// Also those that may yet commit.
    pub backups: Vec<Backup>,
    /// Whether the next backup has to be an incremental: one succeeded, and nothing came in between that excuses
    /// another full one. Nobody in the model looks at it.
    pub tracked: bool,
    /// Backups that were there, and were removed or lost. Nobody in the model looks at it.
    pub gone: Vec<u8>,
}

impl Archive {
    /// Those that can be seen.
    pub(crate) fn committed(&self) -> impl Iterator<Item = &Backup> {
        self.backups
            .iter()
            .filter(|backup| backup.commit != Commit::InFlight)
    }

    /// One that can be seen.
    pub(crate) fn manifest(&self, id: u8) -> Option<&Backup> {
        self.committed().find(|backup| backup.id == id)
    }

    /// What the block table of `backup` says, or nothing where a page of it is missing.
    pub(crate) fn restore(&self, backup: &Backup) -> Option<Content> {
        let mut content = match backup.base {
            Some(base) => self.restore(self.manifest(base)?)?,
            None => [u8::MAX; BLOCKS],
        };
        for (block, read) in content.iter_mut().zip(backup.blocks) {
            *block = read.unwrap_or(*block);
        }
        Some(content)
    }

    /// Takes away those that are `lost`.
    pub(crate) fn lose(&mut self, lost: impl Fn(&Backup) -> bool) {
        let gone = self.backups.iter().filter(|&backup| lost(backup));
        self.gone.extend(gone.map(|backup| backup.id));
        self.backups.retain(|backup| !lost(backup));
    }

    /// Makes every manifest that was looked at durable, as `Namespace::committed` does.
    pub(crate) fn make_durable(&mut self, id: u8) {
        for backup in &mut self.backups {
            if backup.id == id && backup.commit == Commit::Visible {
                backup.commit = Commit::Durable;
            }
        }
    }

    /// Whether another backup, or one that may yet commit, builds on it.
    pub(crate) fn is_base(&self, id: u8) -> bool {
        self.backups.iter().any(|backup| backup.base == Some(id))
    }
}

impl fmt::Display for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)?;
        if let Some(base) = self.base {
            write!(f, " on {base}")?;
        }
        write!(f, " {:?}", self.commit)
    }
}
