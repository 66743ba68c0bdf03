//! QEMU: its monitor, its guest agent, and the point in time of a VM's disks.
//!
//! The order of a backup, as far as QEMU sees it:
//!
//! 1. [`Monitor::reach`], [`Schema::probe`]: what this QEMU can do.
//! 2. [`leftovers::find`]: what a dead job left behind, by the ids of [`ids`].
//! 3. [`machine::disks`]: what there is to back up, and its bitmaps.
//! 4. [`Watchdog::spawn`], then [`snapshot::take`]: freeze, one transaction over all disks, thaw, exports.
//! 5. Reading happens elsewhere, over NBD; [`PointInTime::check_alive`] says whether the snapshot still holds.
//! 6. [`PointInTime::teardown`], then per disk [`bitmap::accept`] or [`bitmap::back_out`]; [`PointInTime::finish`].
//!
//! Absences: this module knows no provider and no archive, reads no byte of a disk, and opens no path
//! but the sockets that it is given; images' files are looked at, by [`open_files()`], and not opened.
//!
//! Three things abort or crash QEMU 10.0.2 and are never done here: an `iothread` on an export
//! (`blockdev-backup` on such a node aborts the storage daemon), `block-dirty-bitmap-merge` with an
//! empty list (SIGSEGV), and `qom-set drive` to the node that is attached already. The guards are [`snapshot`]'s way to
//! add exports, an array of one in [`bitmap`], and a look before each `qom-set` in [`filter`].

#![deny(missing_docs)]

mod address;
pub mod agent;
mod backup_access;
mod beside;
pub mod bitmap;
pub mod claim;
mod descriptor;
mod disks;
pub mod extra;
pub mod filter;
mod identity;
pub mod ids;
pub mod image;
pub mod leftovers;
pub mod libvirt;
mod line;
pub mod machine;
mod mark;
pub mod monitor;
mod names;
pub mod needs;
mod open_files;
mod opened;
mod present;
mod process;
pub mod removal;
pub mod schema;
pub mod snapshot;
mod socket;
mod standstill;
pub mod watchdog;

#[cfg(test)]
mod tests;
// Its daemon serves the tests of jobs too, which know this crate by that name.
#[cfg(test)]
use crate as qemu;

pub use address::Address;
pub use agent::{Agent, AgentError};
pub use bitmap::{BitmapName, BitmapPlan};
pub use identity::Identity;
pub use ids::JobId;
pub use image::{DataFile, Image, Layer};
pub use machine::{Choice, Disk, MachineError};
pub use monitor::{Monitor, MonitorError};
pub use open_files::open_files;
pub use schema::Schema;
pub use snapshot::{Form, Plan, PointInTime, SnapshotError};
pub use watchdog::{Watchdog, WatchdogError};
