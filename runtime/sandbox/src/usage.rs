//! What a sandbox process has used, as the kernel tells it: nothing that the process says of itself is believed.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Parts of a second in which `/proc/PID/stat` counts processor time (`USER_HZ`, fixed at 100 for programs on all
/// processors that Fleecebox runs on; proc_pid_stat(5)).
const TICKS: u64 = 100;

/// Memory and processor time of one process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Most memory that it had resident, in bytes.
    pub peak_memory: u64,
    /// Processor time of all its threads, in user mode and in the kernel.
    pub cpu: Duration,
}

impl Usage {
    /// Processor time of the calling thread.
    pub fn of_this_thread() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        // A thread's time is never negative, and its nanoseconds are below a second.
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
    }

    /// Of a process that still runs; none where it has ended or `/proc` does not show it.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let read = |file| std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        Self::parse(&read("status")?, &read("stat")?)
    }

    fn parse(status: &str, stat: &str) -> Option<Self> {
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        let peak: u64 = peak.trim().strip_suffix(" kB")?.parse().ok()?;
        // The program's name before the last parenthesis can hold anything. After it, from field 3: utime is 14.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut times = fields.split_ascii_whitespace().skip(14 - 3);
        let user: u64 = times.next()?.parse().ok()?;
        let system: u64 = times.next()?.parse().ok()?;
        Some(Self {
            peak_memory: peak.saturating_mul(1024),
            cpu: Duration::from_millis(user.saturating_add(system).saturating_mul(1000 / TICKS)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_parenthesis_does_not_shift_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 2 0 100 1000 10";
        let used = Usage::parse("Name:\ta\nVmHWM:\t    2048 kB\n", stat).unwrap();
        assert_eq!(used.peak_memory, 2 << 20);
        assert_eq!(used.cpu, Duration::from_secs(3));
        // A process that has ended has no memory any more.
        assert_eq!(Usage::parse("Name:\ta\n", stat), None);
    }

    #[test]
    fn this_process_has_used_something() {
        let used = Usage::of(std::process::id()).unwrap();
        assert!(used.peak_memory > 1 << 20, "{used:?}");
    }
}
