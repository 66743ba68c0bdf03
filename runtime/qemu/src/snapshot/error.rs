//! Why there is no point in time, and what could not be taken back.

use crate::agent::AgentError;
use crate::backup_access::AccessError;
use crate::filter::FilterError;
use crate::machine::Unusable;
use crate::monitor::MonitorError;
use crate::removal::RemovalError;
use fleecebox_contract::with_causes;
use std::fmt;
use std::path::PathBuf;

/// Why there is no point in time. What had been made was taken back, but for what `left` names; where all was, it says no
/// more than its cause does.
#[derive(Debug)]
pub struct SnapshotError {
    /// What went wrong.
    pub cause: Cause,
    /// The guest could not be thawed either: the watchdog must go on trying.
    pub frozen: Option<AgentError>,
    /// The VM could not be continued either: the watchdog must go on trying.
    pub stopped: Option<MonitorError>,
    /// What could not be taken back.
    pub left: Vec<UndoError>,
}

impl SnapshotError {
    /// Whether the VM still stands, frozen or stopped.
    pub fn is_stuck(&self) -> bool {
        self.frozen.is_some() || self.stopped.is_some()
    }

    /// Whether all is as it was before.
    pub fn is_undone(&self) -> bool {
        !self.is_stuck() && self.left.is_empty()
    }
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_undone() {
            return self.cause.fmt(f);
        }
        let frozen = self
            .frozen
            .iter()
            .map(|error| format!("the guest may still be frozen: {}", with_causes(error)));
        let stopped = self
            .stopped
            .iter()
            .map(|error| format!("the VM may still be stopped: {}", with_causes(error)));
        let left = self.left.iter().map(|error| with_causes(error));
        let kept: Vec<_> = frozen.chain(stopped).chain(left).collect();
        write!(
            f,
            "there is no point in time, and not all could be taken back ({})",
            kept.join("; ")
        )
    }
}

impl std::error::Error for SnapshotError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self.is_undone() {
            true => self.cause.source(),
            false => Some(&self.cause),
        }
    }
}

/// What went wrong on the way to a point in time.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The old bitmap of a disk is not one to rely on.
    #[error("disk {disk} has no usable bitmap {bitmap}")]
    Bitmap {
        /// The disk.
        disk: String,
        /// The bitmap.
        bitmap: String,
        /// Why.
        #[source]
        reason: Unusable,
    },
    /// The monitor failed before anything was changed but fleecing nodes.
    #[error(transparent)]
    Monitor(MonitorError),
    /// QEMU cannot open the fleecing image.
    #[error(
        "QEMU cannot open the fleecing image {path}, and must be able to open it for writing (one that runs as another user, or confined as libvirt does, needs a fleecing folder that it may use)"
    )]
    Fleecing {
        /// The file.
        path: PathBuf,
        /// What QEMU said.
        source: MonitorError,
    },
    /// The guest's file systems could not be frozen.
    #[error("cannot freeze the guest's file systems")]
    Freeze(#[source] AgentError),
    /// The transaction failed, for all disks.
    #[error("the point in time could not be taken")]
    Transaction(#[source] MonitorError),
    /// QEMU would abort.
    #[error(
        "disk {disk} is exported ({export}) by a QEMU that has iothreads; where the export uses one, a backup job would abort QEMU, and it does not say whether; remove the export or the iothreads"
    )]
    ExportOnIothread {
        /// The disk.
        disk: String,
        /// The export.
        export: String,
    },
    /// No filter can be put over the disks.
    #[error("the point in time could not be taken by filters")]
    Filter(#[from] FilterError),
    /// Proxmox's QEMU does not take it.
    #[error("the point in time could not be taken by backup access")]
    BackupAccess(#[from] AccessError),
    /// The VM stays stopped; see [`SnapshotError::stopped`].
    #[error("the VM was not continued after the point in time")]
    Cont,
    /// The guest stays frozen; see [`SnapshotError::frozen`].
    #[error("the guest's file systems did not thaw after the point in time")]
    Thaw,
    /// The node that reads as of the point in time cannot be made.
    #[error("disk {disk} cannot be read as of the point in time")]
    Access {
        /// The disk.
        disk: String,
        /// What QEMU said.
        source: MonitorError,
    },
    /// An NBD server is running already, and QEMU cannot say where.
    #[error(
        "this QEMU runs an NBD server already and cannot say where; name its socket with the key `nbd` of this VM in the configuration"
    )]
    ServerRunning,
    /// The NBD server cannot be started.
    #[error("QEMU cannot start an NBD server on {path}")]
    Server {
        /// Its socket.
        path: PathBuf,
        /// What QEMU said.
        source: MonitorError,
    },
    /// An export cannot be added.
    #[error("disk {disk} cannot be exported")]
    Export {
        /// The disk.
        disk: String,
        /// What QEMU said.
        source: MonitorError,
    },
}

/// A step of taking back that failed.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// A thing inside QEMU may still be there.
    #[error(transparent)]
    Removal(#[from] RemovalError),
    /// A disk's bitmaps are not as they were before.
    #[error("the bitmaps of disk {disk} could not be put back")]
    Bitmap {
        /// The disk.
        disk: String,
        /// Why.
        source: MonitorError,
    },
}

impl UndoError {
    pub(super) fn is_lost(&self) -> bool {
        matches!(self, Self::Removal(error) if error.is_lost())
    }
}
