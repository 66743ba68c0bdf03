//! What the configuration adds to a VM's disks: EFI variables, TPM state, any further block node or file.
//!
//! A node joins as it is. A file that the VM does not have is attached read-only for the time of the backup; who else
//! writes to it goes around QEMU, so the file is looked at before and after.

use super::base::Choice;
use crate::event::Events;
use crate::qemu::removal::RemovalError;
use crate::qemu::{Disk, JobId, MachineError, Monitor, extra, machine};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

/// One thing that is backed up beside the disks.
#[derive(Debug)]
pub struct Extra {
    /// The volume's name.
    pub name: String,
    /// What it is.
    pub source: Source,
}

/// What is backed up beside the disks.
#[derive(Debug)]
pub enum Source {
    /// A device's id, a drive's id or a block node's name in the VM.
    Node(String),
    /// A file that the VM does not have.
    File {
        /// Its absolute path, as QEMU has to open it.
        path: PathBuf,
        /// The same file.
        opened: File,
    },
}

/// Why an extra volume cannot join.
#[derive(Debug, thiserror::Error)]
pub enum ExtraError {
    /// QEMU does not take it.
    #[error("the extra volume {name}")]
    Machine {
        /// Its name.
        name: String,
        /// Why.
        source: MachineError,
    },
    /// The file cannot be looked at.
    #[error("the extra volume {name}")]
    Look {
        /// Its name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

impl ExtraError {
    /// Whether the user can mend it.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Machine { source, .. } => !matches!(source, MachineError::Monitor(_)),
            Self::Look { .. } => true,
        }
    }
}

/// Adds the nodes to `found`. A disk that is there already takes the extra's name.
pub async fn add_nodes(
    monitor: &Monitor,
    extras: &[Extra],
    found: &mut machine::Disks,
) -> Result<(), ExtraError> {
    for extra in extras {
        let Source::Node(node) = &extra.source else {
            continue;
        };
        let refused = |source| ExtraError::Machine {
            name: extra.name.clone(),
            source,
        };
        let named = machine::extra(monitor, &extra.name, node).await;
        let named = named.map_err(refused)?;
        found.skipped.retain(|skipped| skipped.name != *node);
        match found.disks.iter_mut().find(|disk| disk.node == named.node) {
            Some(disk) => disk.name = named.name,
            None => found.disks.push(named),
        }
        machine::refuse_doubles(&found.disks).map_err(refused)?;
    }
    Ok(())
}

/// A file of the host that takes part in a backup.
#[derive(Debug)]
pub struct Attached<'a> {
    name: &'a str,
    file: &'a File,
    before: Metadata,
}

/// Attaches the files, and adds them to `disks`.
pub async fn attach_files<'a>(
    monitor: &Monitor,
    job: JobId,
    extras: &'a [Extra],
    disks: &mut Vec<(Disk, Choice)>,
) -> Result<Vec<Attached<'a>>, ExtraError> {
    let mut attached = Vec::new();
    for (index, extra) in (0..).zip(extras) {
        let Source::File { path, opened } = &extra.source else {
            continue;
        };
        let before = opened.metadata().map_err(|source| ExtraError::Look {
            name: extra.name.clone(),
            source,
        })?;
        let disk = extra::attach(monitor, job, index, &extra.name, path, opened.as_fd()).await;
        let disk = disk.map_err(|source| ExtraError::Machine {
            name: extra.name.clone(),
            source,
        })?;
        attached.push(Attached {
            name: &extra.name,
            file: opened,
            before,
        });
        disks.push((
            disk,
            Choice::untracked("it is a file that the VM does not have"),
        ));
        let named: Vec<_> = disks.iter().map(|(disk, _)| disk.clone()).collect();
        machine::refuse_doubles(&named).map_err(|source| ExtraError::Machine {
            name: extra.name.clone(),
            source,
        })?;
    }
    Ok(attached)
}

/// Detaches what [`attach_files`] attached, also half of it. Returns what could not be.
pub async fn detach_files(monitor: &Monitor, job: JobId, extras: &[Extra]) -> Vec<RemovalError> {
    let files = (0..).zip(extras);
    let files = files.filter(|(_, extra)| matches!(extra.source, Source::File { .. }));
    extra::detach(monitor, job, files.map(|(index, _)| index)).await
}

/// Warns of files that somebody wrote to since they were attached: such a volume may be torn. Returns whether there are
/// any.
pub fn warn_of_changes(attached: &[Attached<'_>], events: &Events) -> bool {
    let mut any = false;
    for Attached { name, file, before } in attached {
        let same = |now: &Metadata| {
            now.len() == before.len() && now.modified().ok() == before.modified().ok()
        };
        if !file.metadata().is_ok_and(|now| same(&now)) {
            any = true;
            events.warn(format!(
                "{name} was written to by another process during the backup, so it may be from two moments; back it up while the VM is stopped to be sure"
            ));
        }
    }
    any
}
