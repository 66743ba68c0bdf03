//! Against a real `qemu-storage-daemon`, and against monitors and agents that are not what they seem.

mod agent;
pub(crate) mod daemon;
mod devices;
mod monitor;
mod point_in_time;
mod tracking;
mod watchdog;
