//! The job's side of the boundary: one process per instance of a provider, which holds wasmtime and nothing worth having.
//!
//! The job process starts it, hands it a socket and a memory file, and gives it exactly one [`Order`]. From
//! then on the sandbox asks and the job answers ([`fleecebox_channel`]). Whatever the provider does, and whatever a
//! hole in wasmtime lets it do, it can only make the calls that the order granted.
//!
//! - [`Process`] starts a sandbox and speaks with it
//! - [`compile()`] makes machine code of a component, in such a process, once ([`Cache`])
//! - [`fit()`] sees beforehand whether it can be run
//! - [`Budget`] bounds what all such processes of a job use together; `cgroup` lets the kernel hold them to it
//! - [`Witness`] follows what is asked and answered
//!
//! The other side is the crate `fleecebox-worker`. Neither can be named from the other: they have the channel in common,
//! and only there does anything touch wasmtime.
//!
//! [`Order`]: fleecebox_channel::Order

#![deny(missing_docs)]

mod budget;
mod cache;
mod cgroup;
mod compile;
mod fit;
#[cfg(test)]
#[path = "../../../tests/src/report.rs"]
#[expect(unreachable_pub, reason = "the tests' harness exports it")]
mod report;
mod spawn;
mod usage;
mod witness;

pub use budget::Budget;
pub use cache::{Cache, CacheError};
pub use cgroup::remove_dead_groups;
pub use compile::{CompileError, Compiled, compile};
pub use fit::{FitError, fit};
pub use spawn::{Error, Process, Program};
pub use usage::Usage;
pub use witness::{Bytes, Listener, Witness};
