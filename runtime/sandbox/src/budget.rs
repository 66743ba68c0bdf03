//! What all sandbox processes of a job may use together: each run's own limits would let a job with many disks have
//! many times as much.

use super::cgroup::Group;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Memory and processor time of a job. Clones are the same budget.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    memory: u64,
    cpu: Duration,
    used: Mutex<Used>,
    /// Made for the first process; none where the system does not let us.
    group: OnceLock<Option<Arc<Group>>>,
}

#[derive(Debug, Default)]
struct Used {
    /// Processor time of processes that have ended.
    ended: Duration,
    running: BTreeMap<u64, Running>,
    next: u64,
}

#[derive(Debug, Default)]
struct Running {
    memory: u64,
    cpu: Duration,
}

/// One process's part of a [`Budget`]. Its memory comes back when it is dropped, its time does not.
#[derive(Debug)]
pub(super) struct Share {
    budget: Budget,
    number: u64,
}

impl Budget {
    /// `memory` in bytes, of linear memories that exist at the same time; `cpu` of all processes, one after another or
    /// side by side.
    pub fn new(memory: u64, cpu: Duration) -> Self {
        Self(Arc::new(Shared {
            memory,
            cpu,
            used: Mutex::default(),
            group: OnceLock::new(),
        }))
    }

    /// For one more process.
    pub(super) fn share(&self) -> Share {
        let mut used = self.used();
        let number = used.next;
        used.next += 1;
        used.running.insert(number, Running::default());
        Share {
            budget: self.clone(),
            number,
        }
    }

    /// The control group of all its processes.
    pub(super) fn group(&self) -> Option<Arc<Group>> {
        let make = || Group::make(self.0.memory).ok().map(Arc::new);
        self.0.group.get_or_init(make).clone()
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        // Nothing in it is ever half changed.
        self.0.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// The limit on processor time.
    pub(super) fn cpu_limit(&self) -> Duration {
        self.budget.0.cpu
    }

    /// Charges another `bytes`, unless the job would have more than it may.
    pub(super) fn grow(&self, bytes: u64) -> bool {
        let mut used = self.budget.used();
        let held: u64 = used.running.values().map(|it| it.memory).sum();
        let fits = held
            .checked_add(bytes)
            .is_some_and(|sum| sum <= self.budget.0.memory);
        if let Some(own) = used.running.get_mut(&self.number).filter(|_| fits) {
            own.memory += bytes;
        }
        fits
    }

    /// This process has used `cpu` since its start; whether the job is still within its limit.
    pub(super) fn spend(&self, cpu: Duration) -> bool {
        let mut used = self.budget.used();
        if let Some(own) = used.running.get_mut(&self.number) {
            own.cpu = own.cpu.max(cpu);
        }
        let running: Duration = used.running.values().map(|it| it.cpu).sum();
        used.ended.saturating_add(running) <= self.budget.0.cpu
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut used = self.budget.used();
        if let Some(own) = used.running.remove(&self.number) {
            used.ended = used.ended.saturating_add(own.cpu);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_summed_over_those_that_run_and_time_over_all() {
        let second = Duration::from_secs(1);
        let budget = Budget::new(100, 3 * second);
        let (first, other) = (budget.share(), budget.share());
        assert!(first.grow(60) && other.grow(40));
        assert!(!first.grow(1) && !other.grow(u64::MAX));
        assert!(first.spend(second) && other.spend(2 * second));
        // Not what it has used since it was last asked, but altogether.
        assert!(first.spend(second));
        drop(other);
        assert!(first.grow(40) && !first.grow(1));
        assert!(first.spend(second));
        assert!(budget.share().spend(Duration::ZERO));
        assert!(!budget.share().spend(Duration::from_millis(1)));
    }
}
