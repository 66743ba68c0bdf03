//! The exit statuses, one table for all commands, and which error means which.

use crate::archive;
use crate::conformance::KitError;
use crate::grants::run::RunError;
use crate::grants::target::HostFailure;
use crate::job::backup::BackupError;
use crate::job::base::ChoiceError;
use crate::job::export::ExportError;
use crate::job::journal::JournalError;
use crate::job::point_in_time::PointError;
use crate::job::power::PowerError;
use crate::job::prove::ProofError;
use crate::job::read_back::{Finding, ProviderError, ReadBackError};
use crate::job::recover::RecoverError;
use crate::job::restore::{DestinationError, RestoreError};
use crate::job::slots::SlotError;
use crate::job::stored::FindError;
use crate::job::tracking::TrackingError;
use crate::job::verify::Found;
use crate::job::volume_run::VolumeError;
use crate::policy::Denied;
use crate::qemu::MonitorError;
use crate::qemu::claim::ClaimError;
use crate::qemu::machine::MachineError;
use crate::qemu::monitor::NotQmp;
use std::error::Error;

/// For `--help`.
pub(super) const TABLE: &str = "\
Exit status:
    0  done
    1  failed
    2  the user's mistake
    3  done but incomplete: what is missing is named
   10  archive or backup unusable: not there, none, damaged, or not to be read or written
   11  busy: another job, or another client of the monitor, is at work
   12  denied by the policy
  130  cancelled by a signal";

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// It did not work, and none of the others says why.
    Failed = 1,
    /// The user can mend it.
    Mistake = 2,
    /// There is a result, and something is missing from it or left over.
    Incomplete = 3,
    /// What should be an archive cannot be used as one, or a backup in it cannot.
    Unusable = 10,
    /// Somebody else is at work; later it may work.
    Busy = 11,
    /// No rule grants it.
    Denied = 12,
    /// A signal asked for the end.
    Cancelled = 130,
}

impl Status {
    /// For the process.
    pub(super) fn code(self) -> u8 {
        self as u8
    }

    /// What an error means, by the first of its causes that says so.
    pub(super) fn of(error: &anyhow::Error) -> Self {
        let mut causes = error.chain();
        causes.find_map(of_cause).unwrap_or(Self::Failed)
    }

    /// What something means that is not as it was backed up.
    pub(super) fn of_found(found: &Found) -> Self {
        match found {
            Found::Volume { finding, .. } => Self::of_finding(finding),
            Found::Object { .. } | Found::Kept { .. } => Self::Unusable,
        }
    }

    /// What a damaged or withheld part of a backup means.
    fn of_finding(finding: &Finding) -> Self {
        match finding {
            Finding::NoProvider { source, .. } => match &**source {
                ProviderError::Denied(denied) => of_denied(denied),
                _ => Self::Unusable,
            },
            _ => Self::Unusable,
        }
    }
}

fn of_cause(cause: &(dyn Error + 'static)) -> Option<Status> {
    fn on<E: Error + 'static>(
        cause: &(dyn Error + 'static),
        of: fn(&E) -> Status,
    ) -> Option<Status> {
        cause.downcast_ref().map(of)
    }
    on(cause, of_backup)
        .or_else(|| on(cause, of_export))
        .or_else(|| on(cause, of_point))
        .or_else(|| on(cause, of_recover))
        .or_else(|| on(cause, of_tracking))
        .or_else(|| on(cause, of_read_back))
        .or_else(|| on(cause, of_restore))
        .or_else(|| on(cause, of_find))
        .or_else(|| on(cause, of_kit))
        .or_else(|| on(cause, of_slot))
        .or_else(|| on(cause, of_archive))
        .or_else(|| on(cause, of_denied))
}

fn of_backup(error: &BackupError) -> Status {
    match error {
        BackupError::Cancelled { .. } => Status::Cancelled,
        BackupError::Point(error) => of_point(error),
        BackupError::Archive(error)
        | BackupError::Volume {
            source:
                VolumeError::Archive(error)
                | VolumeError::Run(RunError::Host(HostFailure::Archive(error))),
            ..
        }
        | BackupError::Proof {
            source: ProofError::Archive(error),
            ..
        } => of_archive(error),
        BackupError::Volume {
            source: VolumeError::Run(RunError::Cancelled),
            ..
        } => Status::Cancelled,
        error => mistake_if(error.is_mistake()),
    }
}

fn of_export(error: &ExportError) -> Status {
    match error {
        ExportError::Point(error) => of_point(error),
        error => mistake_if(error.is_mistake()),
    }
}

fn of_point(error: &PointError) -> Status {
    match error {
        PointError::Journal(error) => of_journal(error),
        PointError::Recover(error) => of_recover(error),
        PointError::Power(error) => of_power(error),
        PointError::Denied(error) => of_denied(error),
        PointError::Claim(error) => of_claim(error),
        PointError::Monitor(error) | PointError::Machine(MachineError::Monitor(error)) => {
            of_monitor(error)
        }
        PointError::Choice(ChoiceError::Archive(error)) => of_archive(error),
        error if error.is_busy() => Status::Busy,
        error => mistake_if(error.is_mistake()),
    }
}

fn of_claim(error: &ClaimError) -> Status {
    match error {
        ClaimError::Busy { .. } => Status::Busy,
        ClaimError::Monitor(error) => of_monitor(error),
    }
}

fn of_recover(error: &RecoverError) -> Status {
    match error {
        RecoverError::Journal(error) => of_journal(error),
        RecoverError::Power(error) => of_power(error),
        RecoverError::Claim(error) => of_claim(error),
        RecoverError::Archive(error) => of_archive(error),
        RecoverError::Hangs { .. } => Status::Busy,
        error => mistake_if(error.is_mistake()),
    }
}

fn of_tracking(error: &TrackingError) -> Status {
    match error {
        TrackingError::Monitor(error) => of_monitor(error),
        TrackingError::Journal(error) => of_journal(error),
        TrackingError::Dead { .. } => Status::Mistake,
        TrackingError::Busy { .. } => Status::Busy,
    }
}

fn of_power(error: &PowerError) -> Status {
    match error {
        PowerError::Cancelled => Status::Cancelled,
        PowerError::Monitor(error) if of_monitor(error) == Status::Busy => Status::Busy,
        PowerError::Journal(error) => of_journal(error),
        error => mistake_if(error.is_mistake()),
    }
}

/// QEMU serves one client at a time, and the others get no greeting, or not even a place in the queue.
fn of_monitor(error: &MonitorError) -> Status {
    match error {
        MonitorError::NotQmp {
            reason: NotQmp::Silent { .. },
            ..
        } => Status::Busy,
        MonitorError::Held { .. } => Status::Busy,
        _ => Status::Failed,
    }
}

fn of_journal(error: &JournalError) -> Status {
    match error {
        JournalError::Busy { .. } => Status::Busy,
        _ => Status::Failed,
    }
}

fn of_slot(error: &SlotError) -> Status {
    match error {
        SlotError::Taken { .. } => Status::Busy,
        SlotError::Io { .. } => Status::Failed,
    }
}

fn of_read_back(error: &ReadBackError) -> Status {
    match error {
        ReadBackError::Cancelled => Status::Cancelled,
        _ => Status::Failed,
    }
}

fn of_restore(error: &RestoreError) -> Status {
    match error {
        RestoreError::Destination(error) => of_destination(error),
        RestoreError::Found { finding, .. } => Status::of_finding(finding),
        RestoreError::ReadBack(error) => of_read_back(error),
    }
}

fn of_find(error: &FindError) -> Status {
    match error {
        FindError::NoNamespace { .. } | FindError::Several { .. } | FindError::NotHeld { .. } => {
            Status::Mistake
        }
        FindError::NotSeen { .. } => Status::Unusable,
        FindError::Unreadable { source: error, .. } | FindError::Archive(error) => {
            of_archive(error)
        }
    }
}

fn of_destination(error: &DestinationError) -> Status {
    match error {
        DestinationError::InUse { .. } => Status::Busy,
        DestinationError::Cancelled => Status::Cancelled,
        error => mistake_if(error.is_mistake()),
    }
}

fn of_kit(error: &KitError) -> Status {
    match error {
        KitError::Cancelled => Status::Cancelled,
        _ => Status::Failed,
    }
}

/// A full one can be read, and backups that store little still fit.
fn of_archive(error: &archive::Error) -> Status {
    use archive::Error;
    match error {
        Error::NotAnArchive
        | Error::NotEmpty
        | Error::Io { .. }
        | Error::NotFound { .. }
        | Error::HalfMade { .. }
        | Error::Damaged { .. } => Status::Unusable,
        _ => Status::Failed,
    }
}

fn of_denied(denied: &Denied) -> Status {
    match denied {
        Denied::Config(_) | Denied::NoArchive { .. } | Denied::Namespace { .. } => Status::Mistake,
        _ => Status::Denied,
    }
}

fn mistake_if(is_mistake: bool) -> Status {
    match is_mistake {
        true => Status::Mistake,
        false => Status::Failed,
    }
}
