//! How wasmtime is set up. The same everywhere: what is compiled in one process is loaded in another.

use wasmtime::{Config, Engine, Inlining, OptLevel};

/// Stack of the guest's own code, in bytes.
const WASM_STACK: usize = 512 << 10;

/// Stack of a call of the guest's, its own code and the stubs, in bytes: several times [`WASM_STACK`], because host code
/// that overflows the rest ends the process. wasmtime maps it as the call begins, and keeps it for the next one.
const CALL_STACK: usize = 2 << 20;

/// Stack of the thread that does what is ordered, in bytes. Compiling runs on it.
pub(super) const THREAD_STACK: usize = 16 << 20;

/// An engine with the features that the contract's baseline needs and no others. Threads, garbage collection and
/// asynchronous components are not even compiled in (see wasmtime's features in the workspace's Cargo.toml).
pub(super) fn engine() -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(WASM_STACK)
        .async_stack_size(CALL_STACK)
        .concurrency_support(false)
        .wasm_memory64(false)
        // The same component on the same bytes does the same on every machine.
        .relaxed_simd_deterministic(true)
        .cranelift_nan_canonicalization(true)
        .cranelift_opt_level(OptLevel::Speed)
        .compiler_inlining(Inlining::No)
        // Images for copy-on-write would keep memory files open; a process with one instance gains little by them.
        .memory_init_cow(false)
        .wasm_backtrace_max_frames(None)
        .generate_address_map(false);
    #[cfg(target_arch = "x86_64")]
    config.with_custom_code_memory(Some(std::sync::Arc::new(super::compiled::Publisher)));
    Engine::new(&config)
}
