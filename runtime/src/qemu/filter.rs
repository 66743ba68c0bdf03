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
use qapi::qmp::{blockdev_del, cont, stop};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

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

/// How the VM came through.
#[derive(Debug, Default)]
pub(super) struct Stopped {
    /// From before `stop` to after `cont`, where the VM ran.
    pub(super) time: Option<Duration>,
    /// It was stopped and could not be continued.
    pub(super) still: Option<MonitorError>,
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
    let start = Instant::now();
    if state.running {
        monitor.execute(stop {}).await?;
    }
    let inserted = insert_stopped(monitor, schema, job, plans, switch).await;
    if state.running {
        stopped.still = monitor.execute(cont {}).await.err();
        stopped.time = Some(start.elapsed());
    }
    inserted
}

async fn insert_stopped(
    monitor: &Monitor,
    schema: &Schema,
    job: JobId,
    plans: &[Plan],
    switch: Vec<Value>,
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
    if !switch.is_empty() {
        let switch = json!({ "actions": switch });
        monitor.execute_raw("transaction", switch).await?;
    }
    for (index, plan) in (0..).zip(plans) {
        for path in paths(&devices, &plan.disk.node) {
            set_drive(monitor, &path, &id(job, Role::Filter, index)).await?;
        }
    }
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
    let attached: Vec<_> = paths(&devices, name).collect();
    if !attached.is_empty() {
        let disk = present::filtered(monitor, name).await?;
        for path in attached {
            set_drive(monitor, &path, &disk).await?;
        }
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

/// Gives `node` to the device at `path`. QEMU 10.0.2 aborts, and the guest with it, where the device has that node
/// already, so it is asked right before.
async fn set_drive(monitor: &Monitor, path: &str, node: &str) -> Result<(), MonitorError> {
    let devices = present::devices(monitor).await?;
    if paths(&devices, node).any(|having| having == path) {
        return Ok(());
    }
    let arguments = json!({ "path": path, "property": "drive", "value": node });
    monitor.execute_raw("qom-set", arguments).await.map(drop)
}

fn id(job: JobId, role: Role, index: u16) -> String {
    OwnId { job, role, index }.to_string()
}
