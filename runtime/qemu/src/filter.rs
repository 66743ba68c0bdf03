//! The explicit copy-before-write filter: put between a device and its disk while the VM is stopped, and taken out again.
//!
//! It "protects the guest": a full or stuck fleecing image breaks the snapshot, and the guest's write succeeds. QEMU's
//! `blockdev-backup` offers that only in versions after 10.0. It sees what the device writes and nothing else, so a disk
//! that somebody else can write to is refused.

use super::ids::{JobId, OwnId, Role};
use super::machine::{self, Disk};
use super::monitor::{Monitor, MonitorError};
use super::present::{self, Device};
use super::schema::Schema;
use super::snapshot::{CBW_TIMEOUT_SECONDS, Plan};
use super::standstill::{self, Stopped};
use qapi::qmp::blockdev_del;
use serde_json::{Value, json};

/// Driver of the filter.
const DRIVER: &str = "copy-before-write";

/// Why no filter was put in.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// There is no machine to stop, as in `qemu-storage-daemon`.
    #[error("this QEMU has no machine that could be stopped for it; use the form `job`")]
    NoMachine,
    /// QEMU does not have the driver.
    #[error("this QEMU has no copy-before-write driver; use the form `job`")]
    NoDriver,
    /// No device has the disk, so that nothing can be put in between.
    #[error("no device has the disk {disk}, so no filter can be put between; use the form `job`")]
    NoDevice {
        /// The disk.
        disk: String,
    },
    /// An export writes to the disk, and the filter would not see it.
    #[error(
        "the disk {disk} can also be written to through the export {export}, which the filter would not see; use the form `job`"
    )]
    Exported {
        /// The disk.
        disk: String,
        /// The export.
        export: String,
    },
    /// QEMU refused a step.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

impl FilterError {
    /// Whether another form of the point in time would do.
    pub fn is_mistake(&self) -> bool {
        !matches!(self, Self::Monitor(_))
    }
}

/// Puts a filter over each disk and switches the bitmaps, while the VM is stopped. A VM that ran is continued whatever
/// fails; what was put in by then stays.
pub(super) async fn insert(
    monitor: &Monitor,
    schema: &Schema,
    job: JobId,
    plans: &[Plan],
    switch: Vec<Value>,
    stopped: &mut Stopped,
) -> Result<(), FilterError> {
    if !schema.variant_has_option("blockdev-add", DRIVER, "target") {
        return Err(FilterError::NoDriver);
    }
    let exports = present::exports(monitor).await?;
    for plan in plans {
        let exported = exports.iter().find(|export| export.node == plan.disk.node);
        if let Some(export) = exported {
            return Err(FilterError::Exported {
                disk: plan.disk.name.clone(),
                export: export.id.clone(),
            });
        }
    }
    let state = machine::run_state(monitor).await?;
    let state = state.ok_or(FilterError::NoMachine)?;
    add_filters(monitor, schema, job, plans).await?;
    let inserted = insert_stopped(monitor, job, plans, switch);
    standstill::during(monitor, state.running, stopped, inserted).await
}

/// Adds the filters beside the disks, where they see nothing yet. The VM still runs.
async fn add_filters(
    monitor: &Monitor,
    schema: &Schema,
    job: JobId,
    plans: &[Plan],
) -> Result<(), FilterError> {
    let devices = present::devices(monitor).await?;
    for (index, plan) in (0..).zip(plans) {
        // A file that we attached ourselves is written to by nobody in QEMU.
        let free = plan.disk.read_only;
        if !free && paths(&devices, &plan.disk.node).next().is_none() {
            return Err(FilterError::NoDevice {
                disk: plan.disk.name.clone(),
            });
        }
        let mut arguments = json!({
            "driver": DRIVER,
            "node-name": id(job, Role::Filter, index),
            "file": plan.disk.node,
            "target": id(job, Role::Fleecing, index),
            // Else the guest's discards would end at the filter.
            "discard": "unmap",
        });
        for (option, value) in [
            ("on-cbw-error", json!("break-snapshot")),
            ("cbw-timeout", json!(CBW_TIMEOUT_SECONDS)),
            ("min-cluster-size", json!(MIN_CLUSTER)),
        ] {
            if schema.variant_has_option("blockdev-add", DRIVER, option) {
                arguments[option] = value;
            }
        }
        monitor.execute_raw("blockdev-add", arguments).await?;
    }
    Ok(())
}

/// The part for which the VM stands still: the commands for all disks are sent at once.
async fn insert_stopped(
    monitor: &Monitor,
    job: JobId,
    plans: &[Plan],
    switch: Vec<Value>,
) -> Result<(), FilterError> {
    if !switch.is_empty() {
        let switch = json!({ "actions": switch });
        monitor.execute_raw("transaction", switch).await?;
    }
    let devices = present::devices(monitor).await?;
    let mut filters = Vec::new();
    for (index, plan) in (0..).zip(plans) {
        filters.push((&*plan.disk.node, id(job, Role::Filter, index)));
    }
    let given = filters
        .iter()
        .map(|(disk, filter)| give(monitor, &devices, disk, filter));
    futures_util::future::try_join_all(given).await?;
    Ok(())
}

/// The filter copies in units of QEMU's own cluster, also where the fleecing image has larger ones: they are the blocks
/// that are given back one by one.
const MIN_CLUSTER: u64 = 64 << 10;

/// Takes the filter `name` out, where it is there.
pub(super) async fn withdraw(monitor: &Monitor, name: &str) -> Result<(), MonitorError> {
    let nodes = present::nodes(monitor).await?;
    if !nodes.iter().any(|node| node.name == name) {
        return Ok(());
    }
    let devices = present::devices(monitor).await?;
    if paths(&devices, name).next().is_some() {
        let disk = present::filtered(monitor, name).await?;
        give(monitor, &devices, name, &disk).await?;
    }
    let command = blockdev_del {
        node_name: name.into(),
    };
    monitor.execute(command).await.map(drop)
}

/// Whether a device has the filter, or none has the disk any more, so that nothing is written past it.
pub(super) async fn holds(
    monitor: &Monitor,
    filter: &str,
    disk: &Disk,
) -> Result<bool, MonitorError> {
    let nodes = present::nodes(monitor).await?;
    let devices = present::devices(monitor).await?;
    let there = nodes.iter().any(|node| node.name == filter);
    Ok(there && (disk.read_only || paths(&devices, &disk.node).next().is_none()))
}

/// Where in QEMU's tree the devices are that have `node`.
fn paths<'a>(devices: &'a [Device], node: &'a str) -> impl Iterator<Item = String> + 'a {
    let having = devices.iter().filter(move |device| {
        let inserted = device.inserted.as_ref();
        inserted.is_some_and(|inserted| inserted.name == node)
    });
    having.filter_map(|device| device.qdev.as_deref().map(machine::qdev_path))
}

/// Gives `node` to each device that has `instead`, as `devices` says, which was asked right before. A device that has
/// `node` already is not told so: QEMU 10.0.2 aborts then, and the guest with it.
async fn give(
    monitor: &Monitor,
    devices: &[Device],
    instead: &str,
    node: &str,
) -> Result<(), MonitorError> {
    if instead == node {
        return Ok(());
    }
    for path in paths(devices, instead) {
        let arguments = json!({ "path": path, "property": "drive", "value": node });
        monitor.execute_raw("qom-set", arguments).await?;
    }
    Ok(())
}

fn id(job: JobId, role: Role, index: u16) -> String {
    OwnId { job, role, index }.to_string()
}
