//! `jobs-at-once`: how many jobs of a tenant run at the same time, over all processes of this host.
//!
//! A job holds the lock on one of as many files as there may be jobs. The kernel lets go of it when the process ends,
//! however it ends, so that nothing is ever to be cleaned up.

use crate::policy::Tenancy;
use cap_std::fs::{Dir, File, OpenOptions, OpenOptionsExt};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::io;
use std::num::NonZeroU32;

/// One of a tenant's places, until it is dropped.
#[derive(Debug)]
pub struct Slot(#[allow(dead_code, reason = "held for its lock")] File);

/// Why a job has no place.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All are taken.
    #[error(
        "tenant {tenant} has {most} jobs running, as many as it may (jobs-at-once); wait for one to end"
    )]
    Taken {
        /// The tenant.
        tenant: String,
        /// The limit.
        most: NonZeroU32,
    },
    /// The file system failed.
    #[error("cannot lock a place for a job of tenant {tenant}")]
    Io {
        /// The tenant.
        tenant: String,
        /// Why.
        source: io::Error,
    },
}

/// Takes a place in `folder`, which is the tenant's own; none is needed where there is no limit.
///
/// Where the limit was lowered while jobs ran, those beyond it are not counted until they end.
pub fn take(folder: &Dir, tenant: &Tenancy) -> Result<Option<Slot>, SlotError> {
    let Some(most) = tenant.jobs_at_once else {
        return Ok(None);
    };
    let failed = |source: io::Error| SlotError::Io {
        tenant: tenant.name.clone(),
        source,
    };
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600);
    for number in 0..most.get() {
        let file = folder
            .open_with(format!("job-{number}"), &options)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(Slot(file))),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    Err(SlotError::Taken {
        tenant: tenant.name.clone(),
        most,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_places_as_the_limit_says_and_each_comes_back() {
        let path = tempfile::tempdir().unwrap();
        let folder = Dir::open_ambient_dir(path.path(), cap_std::ambient_authority()).unwrap();
        let tenant = Tenancy {
            name: "acme".into(),
            jobs_at_once: NonZeroU32::new(2),
        };
        let first = take(&folder, &tenant).unwrap();
        let second = take(&folder, &tenant).unwrap();
        let third = take(&folder, &tenant).unwrap_err().to_string();
        assert!(third.contains("acme has 2 jobs"), "{third}");
        drop(first);
        let again = take(&folder, &tenant).unwrap();
        assert!(again.is_some() && second.is_some());
        let unlimited = Tenancy {
            jobs_at_once: None,
            ..tenant
        };
        assert!(take(&folder, &unlimited).unwrap().is_none());
    }
}
