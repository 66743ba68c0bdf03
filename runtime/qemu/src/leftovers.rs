//! What a job that died left inside QEMU. When a QMP client goes away, all that it made stays.
//!
//! Only call this under the VM's lock: what is found may otherwise belong to a job that is alive.

use super::backup_access;
use super::ids::{JobId, OwnId, Role};
use super::monitor::{Monitor, MonitorError};
use super::present;
use super::removal::{self, Remains, RemovalError, ServerFate};
use super::snapshot::Probe;
use std::collections::BTreeMap;

/// Everything of one dead job but its bitmaps, which only the archive can judge
/// (see [`super::bitmap::find`]).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftover {
    /// Ids to remove.
    pub remains: Remains,
    /// The disks' own exports, by which their storage can be asked; the disks are named as QEMU names their nodes.
    pub probes: Vec<Probe>,
    /// Files behind the fleecing nodes, as QEMU names them: delete them after [`remove`], if they lie
    /// in a folder for fleecing images.
    pub fleecing_files: Vec<String>,
}

/// Looks for things of ours by their ids, grouped by the job that made them.
///
/// # Errors
/// Those of [`Monitor::query`].
pub async fn find(monitor: &Monitor) -> Result<BTreeMap<JobId, Leftover>, MonitorError> {
    let mut found: BTreeMap<JobId, Leftover> = BTreeMap::new();
    for export in present::exports(monitor).await? {
        if let Some(OwnId {
            job,
            role: Role::Probe,
            ..
        }) = OwnId::parse(&export.id)
        {
            let leftover = found.entry(job).or_default();
            leftover.remains.probes.push(export.id.clone());
            leftover.probes.push(Probe {
                disk: export.node,
                export: export.id,
            });
        } else if let Some(OwnId {
            job,
            role: Role::Export | Role::File | Role::Mark,
            ..
        }) = OwnId::parse(&export.id)
        {
            found
                .entry(job)
                .or_default()
                .remains
                .exports
                .push(export.id);
        }
    }
    for job in present::jobs(monitor).await? {
        if let Some(OwnId {
            job: owner,
            role: Role::Job | Role::Create,
            ..
        }) = OwnId::parse(&job.id)
        {
            found.entry(owner).or_default().remains.jobs.push(job.id);
        }
    }
    let with_job = |found: &BTreeMap<JobId, Leftover>, owner, index| {
        let id = OwnId {
            job: owner,
            role: Role::Job,
            index,
        }
        .to_string();
        let leftover: Option<&Leftover> = found.get(&owner);
        leftover.is_some_and(|leftover| leftover.remains.jobs.contains(&id))
    };
    for node in present::nodes(monitor).await? {
        match OwnId::parse(&node.name) {
            Some(OwnId {
                job,
                role: Role::Access,
                ..
            }) => {
                found.entry(job).or_default().remains.access.push(node.name);
            }
            Some(OwnId {
                job,
                role: Role::Fleecing,
                ..
            }) => {
                let leftover = found.entry(job).or_default();
                leftover.remains.fleecing.push(node.name);
                leftover.fleecing_files.push(node.filename);
            }
            Some(OwnId {
                job,
                role: Role::Extra | Role::Mark,
                ..
            }) => {
                found.entry(job).or_default().remains.extra.push(node.name);
            }
            Some(OwnId {
                job,
                role: Role::Image,
                ..
            }) => {
                found.entry(job).or_default().remains.images.push(node.name);
            }
            // One that belongs to a job goes with it.
            Some(OwnId {
                job,
                role: Role::Filter,
                index,
            }) if !with_job(&found, job, index) => {
                found
                    .entry(job)
                    .or_default()
                    .remains
                    .filters
                    .push(node.name);
            }
            // Named as Proxmox's QEMU wants it: whose it is stands in the path of its file alone.
            None if node.name.ends_with(backup_access::FLEECING) => {
                let job = node.filename.split('/').find_map(JobId::of_folder);
                if let Some(job) = job {
                    let leftover = found.entry(job).or_default();
                    let held = leftover
                        .remains
                        .backup_access
                        .get_or_insert_with(|| backup_access::Held::of_dead(job));
                    held.add(node.name.clone());
                    leftover.remains.fleecing.push(node.name);
                    leftover.fleecing_files.push(node.filename);
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Removes it in the order of a teardown; returns what could not be removed.
///
/// `server` is for the caller to know, from the dead job's journal: QEMU cannot say who started it.
pub async fn remove(
    monitor: &Monitor,
    leftover: &Leftover,
    server: ServerFate,
) -> Vec<RemovalError> {
    removal::remove(monitor, &leftover.remains, server).await
}
