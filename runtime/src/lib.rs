//! Fleecebox backs up running QEMU virtual machines through WebAssembly providers that nobody has to trust.
//!
//! # The way of a byte
//!
//! 1. [`qemu::snapshot::take`] freezes all disks at one moment. From then on QEMU keeps the old data of every block that
//!    the guest overwrites in a fleecing image, and an NBD export of each disk reads as of that moment.
//! 2. [`volume::open`] asks the export what is dirty and what is zero, and grows both to whole blocks: the
//!    [`Plan`](volume::plan::Plan). What is clean is given back to the fleecing image at once.
//! 3. [`job::volume_run`] starts the provider in a [`sandbox`] process of its own; [`grants::run`] answers its calls over
//!    the [`channel`].
//! 4. (a) `put` and `splice` name a range: [`nbd`] reads it, [`digest`] names its blocks, the [`archive`] encodes and
//!    stores it, and its place goes into the block table. (b) `read` hands the bytes to the provider through the shared
//!    memory; `write` takes bytes of its own making back; `claim` says which blocks these hold.
//!    [`Coverage`](volume::coverage::Coverage) keeps the books of both.
//! 5. After the last read a canary block and QEMU's jobs show that the snapshot was intact, and it is taken down.
//! 6. [`job::prove`] reads every claimed block back through a fresh instance. The manifest appears, which is the commit.
//!    Then the old bitmaps go.
//! 7. [`job::read_back`] is the way back, for restore and verify alike; [`mod@job::serve`] is the one to any place, by
//!    [`access`].
//!
//! [`conformance`] goes the same way from 2 on, from the disks of a [`simulator`] instead of QEMU's.
//!
//! # What always holds
//!
//! - A backup without a manifest does not exist; a manifest appears only after all that it refers to is durable.
//! - Every dirty block of a committed backup is zero, placed by the host, or proven to be given back by the provider.
//! - A bitmap is the base of an incremental only if the archive holds the very backup that its name says.
//! - What a sandbox process sends is checked, then charged, then done. No length, range or name in it is believed.
//! - Before a job ends, QEMU holds nothing of it but bitmaps; what a killed job leaves is found by its ids.
//!
//! # Absences
//!
//! Crates cannot name what they do not depend on: [`qemu`], [`nbd`] and [`archive`] know neither each other nor providers
//! nor sandboxes, [`sandbox`] and the confined side, which alone has wasmtime, share only the [`channel`], and the
//! [`contract`] stands below all. Between the rooms of this crate, a test with a table of allowed arrows holds it
//! (`tests/walls.rs`): none points upwards, and [`volume`], [`grants`], [`policy`] and [`recording`] open nothing by a path, but
//! for the NBD server's socket.

#![deny(missing_docs)]

pub use fleecebox_archive as archive;
pub use fleecebox_channel as channel;
pub use fleecebox_contract as contract;
pub(crate) use fleecebox_contract::{buffer, terminal};
pub use fleecebox_contract::{digest, extent};
pub use fleecebox_nbd as nbd;
pub use fleecebox_qemu as qemu;
pub use fleecebox_sandbox as sandbox;

pub mod access;
pub mod cli;
pub mod config;
pub mod conformance;
pub mod event;
pub mod grants;
pub mod job;
pub mod policy;
#[cfg(test)]
mod poor_file_system;
pub mod recording;
pub mod registry;
#[cfg(test)]
#[path = "../../tests/src/report.rs"]
#[expect(unreachable_pub, reason = "the tests' harness exports it")]
mod report;
pub mod simulator;
pub mod templates;
pub mod volume;
