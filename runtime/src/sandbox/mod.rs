//! One process per instance of a provider, holding wasmtime and nothing worth having.
//!
//! The job process starts it, hands it a socket and a memory file, and gives it exactly one [`Order`]. From
//! then on the sandbox asks and the job answers ([`crate::channel`]). Whatever the provider does, and whatever a
//! hole in wasmtime lets it do, it can only make the calls that the order granted.
//!
//! In the job process:
//! - [`Process`] starts a sandbox and speaks with it
//! - [`compile`] makes machine code of a component, in such a process, once ([`Cache`])
//! - [`fit`] sees beforehand whether it can be run
//! - [`Budget`] bounds what all such processes of a job use together; `cgroup` lets the kernel hold them to it
//! - [`Witness`] follows what is asked and answered
//!
//! In the sandbox process, and only there does anything touch wasmtime:
//! - [`serve`], from entry to exit
//! - `confine`, what the process gives up before it has an order, and before the provider's code runs
//! - `engine`, `compiled`, `bindings`: from bytes to an instance
//! - `stubs`, the contract's functions as calls over the socket; `wasi`, the few others, with the time and the chance of
//!   their `surroundings`
//! - `limits`, memory and CPU time
//! - `exports`, the types of what a component exports
//! - `orders`, what each order does
//!
//! [`Order`]: crate::channel::Order

mod budget;
mod cache;
mod cgroup;
mod compile;
mod fit;
mod process;
mod spawn;
mod usage;
mod witness;

#[allow(missing_docs, unreachable_pub, clippy::all)] // generated
mod bindings;
mod compiled;
mod confine;
mod engine;
mod exports;
mod limits;
mod orders;
mod stubs;
mod surroundings;
mod wasi;

pub use budget::Budget;
pub use cache::{Cache, CacheError};
pub use cgroup::remove_dead_groups;
pub use compile::{CompileError, Compiled, MAX_COMPONENT, compile};
pub use fit::{FitError, fit};
pub use process::{ARGUMENT, serve};
pub use spawn::{Error, Process, Program};
pub use usage::Usage;
pub use witness::{Bytes, Listener, Witness};

/// What a sandbox process does with the bytes of a component, in this very process: compiles them, and loads the result
/// again. For fuzzing only; nothing is confined.
#[cfg(fuzzing)]
pub fn compile_here(
    component: &[u8],
) -> Result<crate::contract::Interface, crate::channel::Failure> {
    use std::io::Write;
    let (interface, code) = orders::machine_code(component)?;
    let unkept = |_| crate::channel::Failure::Stale;
    let mut file = tempfile::tempfile().map_err(unkept)?;
    file.write_all(&code).map_err(unkept)?;
    let engine = engine::engine().map_err(|_| crate::channel::Failure::Stale)?;
    compiled::load(&engine, file.into())?;
    Ok(interface)
}
