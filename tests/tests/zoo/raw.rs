//! Providers that no toolchain makes, in WebAssembly text: what they do to the contract's handles no binding lets them.

use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};

#[allow(dead_code)] // of the sandbox's own tests, which use all of it
#[path = "../../../runtime/tests/sandbox/component.rs"]
mod component;

/// An object named after the volume; its handle lies at 36.
const CREATE: &str = "(call $info (local.get $snapshot) (i32.const 96))
    (call $create (local.get $writer) (i32.load (i32.const 96)) (i32.load (i32.const 100)) (i32.const 0) (i32.const 32))
    (if (i32.load8_u (i32.const 32)) (then (return (call $error (i32.const 3)))))";

/// Attacks the time that a job may take, before `run` is even called.
pub(super) fn spins_when_instantiated(at: &Path) -> Result<PathBuf> {
    keep(
        at,
        component::blind_provider_with_more(
            "(call $ok (i32.const 0) (i32.const 0))",
            "(func $start (loop $on (br $on))) (start $start)",
        ),
    )
}

/// Attacks the stack of the process that it runs in, by functions that take nothing but that.
pub(super) fn recurses_in_the_machine(at: &Path) -> Result<PathBuf> {
    keep(
        at,
        component::blind_provider_with_more(
            "(call $descend) (call $ok (i32.const 0) (i32.const 0))",
            "(func $descend (call $descend))",
        ),
    )
}

/// Attacks the memory of the sandbox by what is not its linear memory.
pub(super) fn grows_tables(at: &Path) -> Result<PathBuf> {
    keep(
        at,
        component::blind_provider_with_more(
            "(loop $on (br_if $on (i32.ne (table.grow $table (ref.null func) (i32.const 4096)) (i32.const -1)))) unreachable",
            "(table $table 0 funcref)",
        ),
    )
}

/// Attacks what a finished object is: finishes it again, by the number that its handle had.
pub(super) fn finishes_twice(at: &Path) -> Result<PathBuf> {
    let finish = "(call $finish (i32.load (i32.const 36)) (i32.const 64))";
    keep(
        at,
        component::blind_provider(&format!(
            "{CREATE} {finish} {finish} (call $ok (i32.const 0) (i32.const 0))"
        )),
    )
}

/// Attacks the same: writes to it.
pub(super) fn writes_after_finish(at: &Path) -> Result<PathBuf> {
    keep(
        at,
        component::blind_provider(&format!(
            "{CREATE} (call $finish (i32.load (i32.const 36)) (i32.const 64))
         (call $write (i32.load (i32.const 36)) (i32.const 0) (i32.const 8) (i32.const 48))
         (call $ok (i32.const 0) (i32.const 0))"
        )),
    )
}

/// Attacks the table of handles: names one that it was never given, the sibling volume's stream perhaps.
pub(super) fn forges_a_handle(at: &Path) -> Result<PathBuf> {
    keep(
        at,
        component::blind_provider(
            "(call $write (i32.const 77) (i32.const 0) (i32.const 8) (i32.const 48))
         (call $ok (i32.const 0) (i32.const 0))",
        ),
    )
}

/// Attacks the same: gives a stream up twice.
pub(super) fn drops_twice(at: &Path) -> Result<PathBuf> {
    let drop = "(call $drop-stream (i32.load (i32.const 36)))";
    keep(
        at,
        component::blind_provider(&format!(
            "{CREATE} {drop} {drop} (call $ok (i32.const 0) (i32.const 0))"
        )),
    )
}

/// Attacks what a provider may know: asks what time it is.
pub(super) fn tells_time(at: &Path) -> Result<PathBuf> {
    keep(
        at,
        component::provider_with_wasi(
            "(call $wall (i32.const 16)) (call $ok (i32.const 16) (i32.const 16))",
        ),
    )
}

/// Attacks the same: finds a number that nobody else knows.
pub(super) fn finds_randomness(at: &Path) -> Result<PathBuf> {
    keep(
        at,
        component::provider_with_wasi(
            "(i64.store (i32.const 16) (call $random)) (call $ok (i32.const 16) (i32.const 8))",
        ),
    )
}

/// Attacks the moment at which it is found out: its names are right, and its types are not.
pub(super) fn of_other_types(at: &Path) -> Result<PathBuf> {
    keep(at, component::of_other_types())
}

fn keep(at: &Path, bytes: Vec<u8>) -> Result<PathBuf> {
    fs::write(at, bytes)?;
    Ok(at.into())
}
