//! End-to-end tests against real QEMU: this library is what they stand on, `tests/` holds them.
//!
//! Nothing here uses the product's own code. The QMP client, the NBD client and the comparison of
//! images are separate and simple, so that a mistake in the product cannot hide in its test.
//!
//! A usual test goes like this:
//! 1. [`StorageDaemon`] (the block layer alone, up in a fraction of a second) or [`Guest`] (a
//!    booted Linux) serves the disks. [`Disk`] says what they are.
//! 2. [`QemuState::read`] remembers what QEMU shows.
//! 3. A [`Writer`] changes the disks all the while; in a [`Guest`] its own processes do.
//! 4. [`Site`] holds the archive and runs the product, by [`Fleecebox`], against a [`Proxy`], which makes QEMU take an independent
//!    full copy of each disk at the product's own point in time, and can cut, delay or hold the
//!    product's commands one by one.
//! 5. [`compare`] holds what the product restored against [`Proxy::references`], and
//!    [`QemuState::assert_restored`] sees that nothing was left behind.
//!
//! Programs that a test needs and does not find are failures that name the package, never skips. What this machine does
//! not allow (to mount, to be root) is told by [`not_shown`], and `make test` lists it at its end.

mod agent;
pub mod compare;
mod disk;
mod emulator;
mod eventually;
mod ext4_disk;
mod far_storage;
mod fleecebox;
mod guest;
mod latency;
mod libvirt;
mod nbd;
pub mod nbd_map;
mod process;
mod proxy;
mod qemu_state;
mod qmp;
mod random;
mod report;
mod site;
mod storage_daemon;
mod writer;

pub use agent::{Agent, AgentError, FreezeStatus};
pub use disk::{Disk, DiskFile, Format};
pub use emulator::Emulator;
pub use eventually::eventually;
pub use ext4_disk::Ext4Disk;
pub use far_storage::FarStorage;
pub use fleecebox::{Fleecebox, Outcome, Process, Running, component};
pub use guest::{Guest, LogPosition};
pub use libvirt::{Domain, Libvirt};
pub use nbd::{NbdClient, NbdError};
pub use proxy::{At, Fault, Held, Proxy, ReferenceImage, Stage, What};
pub use qemu_state::{Bitmap, QemuState};
pub use qmp::{Monitors, Qmp, QmpError};
pub use random::Random;
pub use report::not_shown;
pub use site::{Backup, Order, Site, bytes_below, files_below};
pub use storage_daemon::StorageDaemon;
pub use writer::{Load, Writer, WriterReport};

/// 1024 × 1024 bytes, for the sizes of test disks.
pub const MIB: u64 = 1 << 20;
