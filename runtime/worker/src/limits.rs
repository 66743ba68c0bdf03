//! What the guest may use of memory and processor.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;
use wasmtime::ResourceLimiter;

/// Elements in all tables together. Function tables of whole language runtimes have some 20 000.
const MAX_TABLE_ELEMENTS: usize = 1 << 20;

/// Core instances, tables and memories of one component, each. Components of whole language runtimes have some 20.
const MAX_PARTS: usize = 256;

/// How often the guest's CPU time is charged.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// Processor time of the calling thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // A thread's time is never negative, and its nanoseconds are below a second.
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// The guest's limits, and whether it ran into the one on memory.
#[derive(Debug)]
pub(super) struct Limits {
    memory_left: usize,
    table_elements_left: usize,
    memory_refused: bool,
    cpu: Duration,
    charged_from: Duration,
}

/// The guest used more CPU time in one call than it may.
#[derive(Debug, thiserror::Error)]
#[error("the limit on CPU time is reached")]
pub(super) struct OutOfTime;

impl Limits {
    /// `memory` in bytes, over all linear memories together; `cpu` for each call of an export.
    pub(super) fn new(memory: u64, cpu: Duration) -> Self {
        Self {
            memory_left: usize::try_from(memory).unwrap_or(usize::MAX),
            table_elements_left: MAX_TABLE_ELEMENTS,
            memory_refused: false,
            cpu,
            charged_from: cpu_time(),
        }
    }

    /// Begins to charge CPU time anew. Called on the guest's thread before each call of an export.
    pub(super) fn begin_call(&mut self) {
        self.charged_from = cpu_time();
    }

    /// Called on the guest's thread at each tick.
    ///
    /// What counts is the time that the thread had a processor, not what a busy machine made it wait.
    pub(super) fn charge(&self) -> Result<(), OutOfTime> {
        if cpu_time().saturating_sub(self.charged_from) > self.cpu {
            Err(OutOfTime)
        } else {
            Ok(())
        }
    }

    /// The job has no more memory for it.
    pub(super) fn refuse_memory(&mut self) {
        self.memory_refused = true;
    }

    /// Whether the guest was denied memory. It sees only a failed growth, and then traps in ways of its own.
    pub(super) fn memory_refused(&self) -> bool {
        self.memory_refused
    }
}

impl ResourceLimiter for Limits {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // A growth that the kernel then refuses stays charged: nothing good follows from it anyway.
        let granted = take(&mut self.memory_left, current, desired);
        self.memory_refused |= !granted;
        Ok(granted)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(take(&mut self.table_elements_left, current, desired))
    }

    fn instances(&self) -> usize {
        MAX_PARTS
    }

    fn tables(&self) -> usize {
        MAX_PARTS
    }

    fn memories(&self) -> usize {
        MAX_PARTS
    }
}

fn take(left: &mut usize, current: usize, desired: usize) -> bool {
    match left.checked_sub(desired.saturating_sub(current)) {
        Some(rest) => {
            *left = rest;
            true
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_summed_over_all_memories() {
        let mut limits = Limits::new(100, Duration::ZERO);
        assert!(limits.memory_growing(0, 60, None).unwrap());
        assert!(limits.memory_growing(0, 30, None).unwrap());
        assert!(!limits.memory_refused());
        assert!(!limits.memory_growing(60, 71, None).unwrap());
        assert!(limits.memory_refused());
        assert!(limits.memory_growing(60, 70, None).unwrap());
    }

    #[test]
    fn a_thread_that_sleeps_is_not_charged_and_one_that_works_is() {
        let mut limits = Limits::new(0, Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(60));
        assert!(limits.charge().is_ok());
        while limits.charge().is_ok() {
            std::hint::spin_loop();
        }
        limits.begin_call();
        assert!(limits.charge().is_ok());
    }
}
