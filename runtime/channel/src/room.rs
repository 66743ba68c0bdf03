//! What a sandbox process needs for itself: it holds itself to that, and the job process makes room for it.

/// Processor time for compiling: ten times what the largest known components need: a whole JavaScript engine takes 20 s.
pub const COMPILE_CPU_SECONDS: u64 = 200;

/// Memory for compiling, in bytes. A whole JavaScript engine needs some 500 MiB.
pub const COMPILE_MEMORY: u64 = 2 << 30;

/// In bytes: stacks, the allocator's own, and the copies of what is being transferred.
const HOST_MEMORY: u64 = 256 << 20;

/// What a process needs beside its guest's memory, with `compiled` bytes of machine code; 0 in one that compiles.
pub fn room(compiled: u64) -> u64 {
    HOST_MEMORY.saturating_add(compiled.saturating_mul(2))
}
