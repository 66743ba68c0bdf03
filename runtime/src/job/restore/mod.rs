//! A restore: volumes of a stored backup, each to a file or a block device.
//!
//! `place` finds where a volume goes by its path, and from there on all is done by descriptors; `in_use` asks the system who
//! has it open.

mod destination;
mod error;
mod in_use;
mod place;
mod qemu_img;
mod temporary;

pub use destination::Insistence;
pub use error::{ConvertError, DestinationError, PlaceError, RestoreError};

use super::means::Means;
use super::read_back::{self, ReadBack, ReadBackError};
use super::reading::Reading;
use crate::archive::VolumeRecord;
use crate::config::Config;
use crate::event::Event;
use crate::sandbox::Cache;
use destination::{Destination, Users, unwritten};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The volume's bytes.
    Raw,
    /// An image of QEMU's.
    Qcow2,
}

impl Format {
    /// As the command line and files' names have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Which volumes go where.
pub struct Restore<'a> {
    /// Volumes of the backup, each with the path of its file or block device.
    pub volumes: &'a [(&'a VolumeRecord, PathBuf)],
    /// Of the files.
    pub format: Format,
    /// What may be done to what is there.
    pub insistence: Insistence,
    /// Its VMs may have that open.
    pub config: &'a Config,
}

/// Writes the volumes one after the other, and stops at the first that does not come back as it was backed up. Those
/// before it are there.
///
/// # Errors
/// A [`RestoreError`]; of a file nothing is left then, and a block device may hold a part.
pub async fn restore(
    reading: &Reading<'_>,
    restore: Restore<'_>,
    cache: &Cache,
    means: Means,
) -> Result<(), RestoreError> {
    for (volume, path) in restore.volumes {
        means.events.send(Event::Total {
            volume: volume.name.clone(),
            bytes: volume.root.size(),
        });
        restore.one(reading, volume, path, cache, &means).await?;
    }
    Ok(())
}

impl Restore<'_> {
    async fn one(
        &self,
        reading: &Reading<'_>,
        volume: &VolumeRecord,
        path: &Path,
        cache: &Cache,
        means: &Means,
    ) -> Result<(), RestoreError> {
        let Means { events, cancel, .. } = means;
        let users = Users {
            config: self.config,
            events,
        };
        let size = volume.root.size();
        let output = Destination::open(path, size, self.format, self.insistence, users).await?;
        let wanted = ReadBack {
            reading,
            volume,
            output: Some(Arc::clone(&output.file)),
            cache,
            means,
            all_findings: false,
        };
        let findings = read_back::read_back(wanted)
            .await
            .map_err(|error| match error {
                ReadBackError::Output(error) => unwritten(path, error).into(),
                error => RestoreError::ReadBack(error),
            })?;
        if let Some(finding) = findings.into_iter().next() {
            let volume = volume.name.clone();
            return Err(RestoreError::Found { volume, finding });
        }
        Ok(output.complete(self.format, events, cancel).await?)
    }
}
