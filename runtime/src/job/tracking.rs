//! The dirty bitmaps of a VM, for an operator: whose each is, and how to be rid of them.
//!
//! Any bitmap that records keeps QEMU from reverting to an internal snapshot, and costs memory and a mark for each write;
//! those of an archive that is gone are of no use any more. One that is dropped costs the next backup a full read.

use super::journal::{Journal, JournalError};
use crate::qemu::bitmap::{self, Own};
use crate::qemu::{Monitor, MonitorError};

/// Why a bitmap was not dropped.
#[derive(Debug, thiserror::Error)]
pub enum TrackingError {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Another job has the VM.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// What a job left comes first: its bitmaps may hold the changes since the last backup.
    #[error(
        "a job ({job}) on this VM died and was not cleaned up after; `fleecebox recover` does that, and settles its bitmaps"
    )]
    Dead {
        /// The job.
        job: String,
    },
    /// Something in QEMU uses it.
    #[error("the bitmap {name} of {node} is in use by an export or a block job in QEMU")]
    Busy {
        /// The bitmap.
        name: String,
        /// Its node.
        node: String,
    },
}

/// All of ours in this QEMU, by node.
///
/// # Errors
/// Those of [`Monitor::query`].
pub async fn list(monitor: &Monitor) -> Result<Vec<Own>, MonitorError> {
    let mut found = bitmap::find(monitor).await?;
    found.sort_by(|one, other| (&one.node, &one.name).cmp(&(&other.node, &other.name)));
    Ok(found)
}

/// Removes those that are `wanted`, and returns them. Whoever has the VM's journal knows that no job runs.
///
/// # Errors
/// A [`TrackingError`]; none is removed where one of them is in use.
pub async fn drop_bitmaps(
    monitor: &Monitor,
    journal: &Journal,
    wanted: impl Fn(&Own) -> bool,
) -> Result<Vec<Own>, TrackingError> {
    if let Some(dead) = journal.record() {
        return Err(TrackingError::Dead {
            job: dead.job.clone(),
        });
    }
    let mut chosen = list(monitor).await?;
    chosen.retain(wanted);
    if let Some(busy) = chosen.iter().find(|own| own.state.busy) {
        return Err(TrackingError::Busy {
            name: busy.state.name.clone(),
            node: busy.node.clone(),
        });
    }
    for own in &chosen {
        bitmap::remove(monitor, &own.node, &own.name).await?;
    }
    Ok(chosen)
}
