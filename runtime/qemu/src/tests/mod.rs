//! Against a real `qemu-storage-daemon`, and against monitors and agents that are not what they seem.

mod agent;
pub(crate) mod daemon;
mod devices;
mod monitor;
mod point_in_time;
mod tracking;
mod watchdog;

use super::removal::RemovalError;
use super::{Monitor, PointInTime};

/// Takes all of it down; returns what is left.
async fn end(point: &PointInTime, monitor: &Monitor) -> Vec<RemovalError> {
    let mut left = point.teardown(monitor).await;
    left.extend(point.finish(monitor).await);
    left
}
