//! How much memory the processes of a job took at most, as the kernel counts it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A sandbox lives for some tens of milliseconds at least; what it took last is looked at once more before it ends.
const INTERVAL: Duration = Duration::from_millis(2);

/// The most resident memory (`VmHWM`, proc_pid_status(5)) that was seen, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Peak {
    /// Of the job process.
    pub(super) job: u64,
    /// Of any one of its sandbox processes.
    pub(super) sandbox: u64,
}

/// Looks at a job's processes until it is told to stop.
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Peak>,
}

impl Watch {
    pub(super) fn start(job: i32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut peak = Peak::default();
            while !stopped.load(Ordering::Relaxed) {
                peak.job = peak.job.max(high_water_mark(job).unwrap_or(0));
                for child in children(job) {
                    // A child that has not become the sandbox yet still has its parent's memory.
                    if is_sandbox(child) {
                        peak.sandbox = peak.sandbox.max(high_water_mark(child).unwrap_or(0));
                    }
                }
                std::thread::sleep(INTERVAL);
            }
            peak
        });
        Self { stop, thread }
    }

    pub(super) fn stop(self) -> Peak {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            let pids = list.split_whitespace();
            pids.filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

fn is_sandbox(pid: i32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line == b"fleecebox\0sandbox-process\0")
}

fn high_water_mark(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let fields: BTreeMap<_, _> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .collect();
    let kilobytes = fields.get("VmHWM")?.trim().strip_suffix(" kB")?;
    Some(kilobytes.parse::<u64>().ok()? << 10)
}
