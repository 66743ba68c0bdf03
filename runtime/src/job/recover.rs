//! Cleaning up after a run that died: what it left in QEMU, in the fleecing folder, in the archive, and its bitmaps.
//!
//! Runs under the VM's lock, so that nothing found here belongs to a live job.

use super::base::{self, Owner, Remedy};
use super::event::Events;
use super::journal::{Journal, JournalError};
use crate::archive::{self, BackupId, Manifest, Namespace};
use crate::qemu::bitmap::{self, Tracking};
use crate::qemu::removal::{RemovalError, ServerFate};
use crate::qemu::{Monitor, MonitorError, leftovers};
use cap_std::fs::Dir;
use std::io;
use std::sync::Arc;

/// Why the rest of a dead run could not be cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Something of the dead run is still in QEMU.
    #[error("a job that died left something in QEMU that cannot be removed: {0}")]
    Left(#[from] RemovalError),
    /// The archive cannot say what it holds.
    #[error("the archive cannot say what it holds: {0}")]
    Archive(#[from] archive::Error),
    /// A fleecing image of the dead run cannot be removed.
    #[error("a fleecing image of a job that died cannot be removed: {0}")]
    Files(io::Error),
    /// The journal cannot be kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Cleans up. `fleecing` is the folder that this VM's jobs make their fleecing folders in.
pub async fn recover(
    monitor: &Monitor,
    journal: &mut Journal,
    namespace: &Arc<Namespace>,
    owner: &Owner,
    fleecing: &Dir,
    events: &Events,
) -> Result<(), RecoverError> {
    let dead = journal.record().cloned();
    if let Some(dead) = &dead {
        events.warn(format!(
            "the last job on this VM ({}, backup {}) died at step '{}'; cleaning up after it",
            dead.job,
            dead.backup,
            dead.step.name()
        ));
    }
    for (job, leftover) in leftovers::find(monitor).await? {
        events.note(format!("removing what job {job} left in QEMU"));
        let started = dead
            .as_ref()
            .is_some_and(|dead| dead.job == job.to_string() && dead.nbd_server);
        let server = if started {
            ServerFate::StopIfUnused
        } else {
            ServerFate::Keep
        };
        if let Some(error) = leftovers::remove(monitor, &leftover, server)
            .await
            .into_iter()
            .next()
        {
            return Err(error.into());
        }
    }
    if let Some(dead) = &dead {
        match fleecing.remove_dir_all(&dead.fleecing) {
            Ok(()) => events.note("removed its fleecing images"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(RecoverError::Files(error)),
        }
    }
    settle_bitmaps(monitor, namespace, owner, events).await?;
    if let Some(dead) = dead {
        discard_backup(namespace, owner, &dead, events)?;
        journal.clear()?;
    }
    Ok(())
}

async fn settle_bitmaps(
    monitor: &Monitor,
    namespace: &Arc<Namespace>,
    owner: &Owner,
    events: &Events,
) -> Result<(), RecoverError> {
    let found = bitmap::find(monitor).await?;
    for remedy in base::remedies(owner, &found, |id| committed(namespace, id))? {
        match remedy {
            Remedy::Accept { node, plan } => {
                events.note(format!(
                    "{node}: the last backup is committed; its old bitmap is removed"
                ));
                bitmap::accept(monitor, &node, &plan).await?;
            }
            Remedy::BackOut { node, plan } => {
                events.note(format!(
                    "{node}: the last backup did not commit; its changes are merged back"
                ));
                if bitmap::back_out(monitor, &node, &plan).await? == Tracking::Lost {
                    events.warn(format!(
                        "{node}: its bitmap could not be made whole; it will be read in full"
                    ));
                }
            }
        }
    }
    Ok(())
}

fn discard_backup(
    namespace: &Arc<Namespace>,
    owner: &Owner,
    dead: &super::journal::Record,
    events: &Events,
) -> Result<(), RecoverError> {
    let here =
        dead.archive == owner.archive.to_string() && dead.namespace == namespace.name().as_str();
    let Ok(id) = dead.backup.parse() else {
        return Ok(());
    };
    if !here {
        events.note(format!(
            "backup {id} was for another archive, whose next backup clears it away"
        ));
    } else if committed(namespace, id)?.is_some() {
        events.note(format!("backup {id} is committed and stays"));
    } else {
        namespace.discard_uncommitted(id)?;
        events.note(format!(
            "removed what backup {id}, which never committed, left in the archive"
        ));
    }
    Ok(())
}

/// The manifest of `id`, or nothing where the archive can be read and does not hold it.
pub fn committed(
    namespace: &Arc<Namespace>,
    id: BackupId,
) -> Result<Option<Arc<Manifest>>, archive::Error> {
    match namespace.manifest(id) {
        Ok(manifest) => Ok(Some(Arc::new(manifest))),
        Err(archive::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
