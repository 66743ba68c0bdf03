//! The confined side of the boundary: the process that runs one instance of a provider, and the only one with wasmtime.
//!
//! It speaks with the job over the channel, knows the contract, and nothing else of Fleecebox's.
//!
//! - [`serve`], from entry to exit
//! - [`confine`], what the process gives up before it has an order, and before the provider's code runs
//! - `engine`, `compiled`, `bindings`: from bytes to an instance
//! - `stubs`, the contract's functions as calls over the socket; `wasi`, the few others, with the time and the chance of
//!   their `surroundings`
//! - `limits`, memory and CPU time
//! - `exports`, the types of what a component exports
//! - `orders`, what each order does

#![deny(missing_docs)]

#[allow(missing_docs, unreachable_pub, clippy::all)] // generated
mod bindings;
mod compiled;
pub mod confine;
mod engine;
mod exports;
mod limits;
mod orders;
mod process;
#[cfg(test)]
#[path = "../../../tests/src/report.rs"]
#[expect(unreachable_pub, reason = "the tests' harness exports it")]
mod report;
mod stubs;
mod surroundings;
mod wasi;

pub use process::serve;

/// What a sandbox process does with the bytes of a component, in this very process: compiles them, and loads the result
/// again. For fuzzing only; nothing is confined.
#[cfg(fuzzing)]
pub fn compile_here(
    component: &[u8],
) -> Result<fleecebox_contract::Interface, fleecebox_channel::Failure> {
    use std::io::Write;
    let (interface, code) = orders::machine_code(component)?;
    let unkept = |_| fleecebox_channel::Failure::Stale;
    let mut file = tempfile::tempfile().map_err(unkept)?;
    file.write_all(&code).map_err(unkept)?;
    let engine = engine::engine().map_err(|_| fleecebox_channel::Failure::Stale)?;
    compiled::load(&engine, file.into())?;
    Ok(interface)
}
