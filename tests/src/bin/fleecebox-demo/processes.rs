//! The processes below this one, to see that none is left and to end them when the reader interrupts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process};

/// A process below this one that lives.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    /// Its id.
    pub(crate) pid: i32,
    /// Its arguments, with spaces between them.
    pub command_line: String,
}

/// Lets children whose parent dies become ours, so that none can escape [`below`].
pub(crate) fn adopt_orphans() {
    // The kernel only refuses a wrong number of arguments.
    let _ = rustix::process::set_child_subreaper(Some(getpid()));
}

/// All descendants of `root` that live.
pub(crate) fn below(root: i32) -> Vec<Process> {
    let mut parents = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let Some(pid): Option<i32> = pid else {
            continue;
        };
        // `pid (name) state parent …`, where the name may hold anything.
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let mut fields = stat
            .rsplit_once(')')
            .map_or("", |(_, fields)| fields)
            .split_whitespace();
        let (state, parent) = (fields.next(), fields.next().and_then(|id| id.parse().ok()));
        if let (Some("R" | "S" | "D" | "T" | "t" | "I"), Some(parent)) = (state, parent) {
            parents.insert(pid, parent);
        }
    }
    let descends = |mut pid: i32| {
        // A chain of parents cannot be longer than there are processes.
        for _ in 0..parents.len() {
            match parents.get(&pid) {
                Some(&parent) if parent == root => return true,
                Some(&parent) => pid = parent,
                None => return false,
            }
        }
        false
    };
    parents
        .keys()
        .filter(|&&pid| descends(pid))
        .map(|&pid| Process {
            pid,
            command_line: command_line(pid),
        })
        .collect()
}

/// All descendants of this process that live once `limit` has passed, or none.
pub(crate) fn left_after(limit: Duration) -> Vec<Process> {
    let deadline = Instant::now() + limit;
    loop {
        let left = below(own());
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether that process ends within `limit`.
pub(crate) fn ends(pid: i32, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let lives = below(own()).iter().any(|process| process.pid == pid);
        if !lives || Instant::now() >= deadline {
            return !lives;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends every process below this one.
pub(crate) fn kill_all() {
    for process in below(own()) {
        signal(process.pid, Signal::KILL);
    }
}

/// Sends a signal; to a process that is gone it means nothing.
pub(crate) fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

fn own() -> i32 {
    getpid().as_raw_nonzero().get()
}

fn command_line(pid: i32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .replace('\0', " ")
        .trim_end()
        .to_string()
}
