//! A control group around sandbox processes: the kernel's own limit on what they take of memory together (cgroups(7)).
//!
//! Each process has limits of its own (`confine`), and a whole one asks for its share of the job's budget before it
//! takes it. One that is broken does not ask, and page tables and the kernel's buffers count for no limit of a process.
//! The group counts everything, for all of a job's processes.
//!
//! A group is made only where the system lets us: with version 1 below the group of this process. With version 2 a group
//! that holds processes hands no controller on to groups below it, so that it takes
//! - the root of all groups, or
//! - a group that was delegated to us with this process alone in it, which then moves into one below, or
//! - one right below a delegated group (systemd's `Delegate=` with `DelegateSubgroup=`).
//!
//! As root one could write elsewhere too, but what systemd has not delegated it may change at any time, and the limit
//! would be gone without a word (systemd, "Control Group APIs and Delegation").

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the removal of a group waits for processes in it that were killed just now.
const LAST_EXIT: Duration = Duration::from_secs(1);

/// What the names of our groups begin with; this process's id and the time of its start follow, so that the groups of
/// one that was killed are known.
const PREFIX: &str = "fleecebox";

/// What follows in the name of the group that this process itself moved into.
const OWN: &str = "job";

/// Of the groups that this process has made.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// A group, which is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Group {
    version: Version,
    folder: PathBuf,
    /// Of the guests, in bytes.
    memory: u64,
    room: Mutex<Room>,
}

/// What the processes need beside their guests' memory, in bytes.
#[derive(Debug, Default)]
struct Room {
    now: u64,
    most: u64,
}

/// A process's place in a group.
#[derive(Debug)]
pub(super) struct Member {
    group: std::sync::Arc<Group>,
    room: u64,
}

/// Which version of control groups limits memory on this system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Group {
    /// An empty one, for guests that take `memory` bytes together.
    pub(super) fn make(memory: u64) -> io::Result<Self> {
        let (version, parent) = place()?;
        remove_leftovers(&parent);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(name(&number.to_string())?);
        fs::create_dir(&folder)?;
        let group = Self {
            version,
            folder,
            memory,
            room: Mutex::default(),
        };
        group.limit(memory)?;
        // What is swapped out would not count. A system without swap has no such file, and needs none.
        let _ = match version {
            Version::One => group.write("memory.swappiness", "0"),
            Version::Two => group.write("memory.swap.max", "0"),
        };
        Ok(group)
    }

    /// Takes a process in, which must not have been waited for, and gives the group `room` bytes more for its runtime
    /// while it has more members than ever before. The limit never sinks: memory of one that ended may still be charged.
    pub(super) fn admit(self: std::sync::Arc<Self>, pid: u32, room: u64) -> io::Result<Member> {
        {
            let mut held = self.room.lock().unwrap_or_else(PoisonError::into_inner);
            let now = held.now.saturating_add(room);
            if now > held.most {
                self.limit(self.memory.saturating_add(now))?;
                held.most = now;
            }
            held.now = now;
        }
        let member = Member { group: self, room };
        member.group.write("cgroup.procs", &pid.to_string())?;
        Ok(member)
    }

    fn limit(&self, bytes: u64) -> io::Result<()> {
        let file = match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        self.write(file, &bytes.to_string())
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        write(&self.folder, file, value)
    }

    /// How often the group came to its limit, and how many of its processes the kernel has killed for want of memory:
    /// its own, or the system's.
    fn events(&self) -> Option<(u64, u64)> {
        let read = |file| fs::read_to_string(self.folder.join(file)).ok();
        match self.version {
            Version::One => {
                let limited = read("memory.failcnt")?.trim().parse().ok()?;
                Some((limited, count(&read("memory.oom_control")?, "oom_kill")?))
            }
            Version::Two => {
                let events = read("memory.events")?;
                Some((count(&events, "oom")?, count(&events, "oom_kill")?))
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let began = Instant::now();
        while let Err(error) = fs::remove_dir(&self.folder) {
            if error.kind() != io::ErrorKind::ResourceBusy || began.elapsed() > LAST_EXIT {
                // The next job finds it.
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Member {
    /// The group's limit in bytes, where the kernel has killed one of its processes for going over it.
    pub(super) fn passed_limit(&self) -> Option<u64> {
        let (limited, killed) = self.group.events()?;
        let held = self
            .group
            .room
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        (limited > 0 && killed > 0).then(|| self.group.memory.saturating_add(held.most))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut held = self
            .group
            .room
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        held.now = held.now.saturating_sub(self.room);
    }
}

/// Removes the groups of jobs that were killed.
pub fn remove_dead_groups() {
    if let Ok((_, parent)) = place() {
        remove_leftovers(&parent);
    }
}

/// Where groups can be made.
fn place() -> io::Result<(Version, PathBuf)> {
    let read = fs::read_to_string;
    let (version, own) = own_group(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)
        .ok_or(io::ErrorKind::NotFound)?;
    match version {
        Version::One => Ok((version, own)),
        Version::Two => Ok((version, handing_on(own)?)),
    }
}

/// A group below which memory can be limited, with version 2.
fn handing_on(own: PathBuf) -> io::Result<PathBuf> {
    let hand_on = |folder: &Path| write(folder, "cgroup.subtree_control", "+memory");
    let refused = match hand_on(&own) {
        Ok(()) => return Ok(own),
        Err(error) => error,
    };
    if is_delegated(&own) {
        let aside = own.join(name(OWN)?);
        fs::create_dir(&aside)?;
        // 0 is whoever writes it.
        let moved = write(&aside, "cgroup.procs", "0").and_then(|()| hand_on(&own));
        if moved.is_err() {
            // Others are in it too.
            let _ = write(&own, "cgroup.procs", "0");
            let _ = fs::remove_dir(&aside);
        }
        return moved.map(|()| own);
    }
    match own.parent().filter(|parent| is_delegated(parent)) {
        Some(parent) => hand_on(parent).map(|()| parent.to_owned()),
        None => Err(refused),
    }
}

/// Whether systemd has left the group to whom it started: it says so on the folder, to root and to everybody.
fn is_delegated(folder: &Path) -> bool {
    ["trusted.delegate", "user.delegate"].iter().any(|name| {
        let mut value = [0; 8];
        rustix::fs::getxattr(folder, *name, &mut value[..])
            .is_ok_and(|length| value[..length] == *b"1")
    })
}

fn write(folder: &Path, file: &str, value: &str) -> io::Result<()> {
    // Not made where it does not exist: then this is no group.
    let mut file = fs::File::options().write(true).open(folder.join(file))?;
    io::Write::write_all(&mut file, value.as_bytes())
}

/// The value of `key` in lines of keys and values.
fn count(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == key)?.1.trim().parse().ok()
}

/// The folder of this process's own group, of the version that limits memory: from `/proc/self/cgroup` (cgroups(7)) and
/// `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn own_group(cgroup: &str, mountinfo: &str) -> Option<(Version, PathBuf)> {
    let mut lines = cgroup.lines().filter_map(|line| {
        let (number, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((number, controllers, Path::new(path)))
    });
    // A controller of version 1 is none of version 2.
    let one = lines
        .clone()
        .find(|(_, controllers, _)| controllers.split(',').any(|it| it == "memory"));
    let (version, path) = match one {
        Some((.., path)) => (Version::One, path),
        None => (Version::Two, lines.find(|(number, ..)| *number == "0")?.2),
    };
    // Outside of what the namespace shows.
    if path.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    mountinfo.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, at) = (unescaped(mount.next()?), unescaped(mount.next()?));
        let mut system = system.split(' ');
        let fits = match (version, system.next()?) {
            (Version::One, "cgroup") => system.nth(1)?.split(',').any(|option| option == "memory"),
            (Version::Two, "cgroup2") => true,
            _ => false,
        };
        let below = path.strip_prefix(root).ok().filter(|_| fits)?;
        Some((version, at.join(below)))
    })
}

/// A path of mountinfo, where a backslash and three octal digits stand for what would end a field.
fn unescaped(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, after @ ..] = rest {
        let octal = |digit: &u8| {
            (b'0'..=b'7')
                .contains(digit)
                .then(|| u32::from(digit - b'0'))
        };
        let escaped = match after {
            [a, b, c, ..] if *first == b'\\' => octal(a)
                .zip(octal(b))
                .zip(octal(c))
                .and_then(|((a, b), c)| u8::try_from(a << 6 | b << 3 | c).ok()),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = &after[if escaped.is_some() { 3 } else { 0 }..];
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

fn name(what: &str) -> io::Result<String> {
    let pid = std::process::id();
    let started = started(pid).ok_or(io::ErrorKind::NotFound)?;
    Ok(format!("{PREFIX}-{pid}-{started}-{what}"))
}

/// When a process started, in ticks since the system did (proc_pid_stat(5), field 22). With its id it is the process's
/// own: the id alone may be another's later.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name before the last parenthesis can hold anything; field 3 comes after it.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Whether a group of this name was made by a process that is no more.
fn is_dead(name: &str) -> bool {
    let mut parts = name.split('-');
    let mut next = || parts.next();
    let (Some(PREFIX), Some(pid), Some(start), Some(_), None) =
        (next(), next(), next(), next(), next())
    else {
        return false;
    };
    match (pid.parse(), start.parse()) {
        (Ok(pid), Ok(start)) => started(pid) != Some(start),
        _ => false,
    }
}

fn remove_leftovers(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(is_dead) {
            // Fails where processes are in it, which then are not ours to judge.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};
    use std::sync::Arc;

    const HYBRID: &str = "4:memory:/a/b\n1:name=systemd:/c\n0::/d\n";
    const MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
         32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
         35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 master:1 - cgroup cgroup rw,memory\n\
         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_group_is_of_the_version_that_has_the_memory() {
        let found = |cgroup: &str, mounts: &str| own_group(cgroup, mounts);
        assert_eq!(
            found(HYBRID, MOUNTS),
            Some((Version::One, "/sys/fs/cgroup/memory/a/b".into()))
        );
        assert_eq!(
            found("1:name=systemd:/c\n0::/d\n", MOUNTS),
            Some((Version::Two, "/sys/fs/cgroup/unified/d".into()))
        );
        let together = MOUNTS.replace("rw,memory", "rw,cpuacct,memory");
        let named = HYBRID.replace(":memory:", ":cpuacct,memory:");
        assert!(found(&named, &together).is_some());
        // Not mounted, not there, not below what is mounted, outside of the namespace.
        assert_eq!(
            found(HYBRID, &MOUNTS.replace("rw,memory", "rw,cpuset")),
            None
        );
        assert_eq!(found("1:name=systemd:/c\n", MOUNTS), None);
        assert_eq!(found(HYBRID, &MOUNTS.replace("0:32 / ", "0:32 /x ")), None);
        assert_eq!(found("0::/../d\n", MOUNTS), None);
        assert_eq!(
            found(HYBRID, &MOUNTS.replace("0:32 / ", "0:32 /a ")),
            Some((Version::One, "/sys/fs/cgroup/memory/b".into()))
        );
    }

    proptest! {
        #[test]
        fn any_mount_point_is_found_as_the_kernel_writes_it(at in "(/[ -~]{1,9}){1,3}", below in "(/[a-z]{1,5}){0,3}") {
            let escaped: String = at
                .chars()
                .map(|c| match c {
                    ' ' | '\\' | '#' => format!("\\{:03o}", u32::from(c)),
                    _ => c.to_string(),
                })
                .collect();
            let cgroup = format!("0::/unit{below}\n");
            let mounts = format!("41 31 0:38 /unit {escaped} rw,relatime - cgroup2 cgroup2 rw\n");
            let expected = Path::new(&at).join(below.trim_start_matches('/'));
            prop_assert_eq!(own_group(&cgroup, &mounts), Some((Version::Two, expected)));
        }

        #[test]
        fn no_line_is_too_strange(cgroup in "(\\PC{0,30}\n){0,3}", mounts in "([ -~]{0,60}( - cgroup2?)?[ -~]{0,20}\n){0,3}") {
            let _ = own_group(&cgroup, &mounts);
        }
    }

    #[test]
    fn the_group_of_a_process_that_is_gone_is_known_by_its_name() {
        let own = name("0").unwrap();
        assert!(!is_dead(&own));
        let (pid, start) = (std::process::id(), started(std::process::id()).unwrap());
        // Its number is another's now, or nobody's.
        assert!(is_dead(&format!("fleecebox-{pid}-{}-0", start + 1)));
        assert!(is_dead(&format!("fleecebox-{pid}-{}-job", start + 1)));
        assert!(is_dead(&format!("fleecebox-{}-{start}-0", u32::MAX)));
        for other in [
            "fleecebox",
            "fleecebox-1",
            "fleecebox-x-1-0",
            "system.slice",
            "fleecebox-1-0-0-0",
        ] {
            assert!(!is_dead(other), "{other}");
        }
    }

    /// Takes memory without end once it is told to.
    fn hog() -> Child {
        Command::new("sh")
            .args(["-c", "read line; exec tail /dev/zero"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// None where this system has no place for one.
    fn group(memory: u64) -> Option<Arc<Group>> {
        match Group::make(memory) {
            Ok(group) => Some(Arc::new(group)),
            Err(error) => {
                crate::report::not_shown(&format!("no control group can be made here: {error}"));
                None
            }
        }
    }

    #[test]
    fn the_kernel_ends_what_goes_over_the_limit_and_it_is_told() {
        let Some(group) = group(16 << 20) else { return };
        let folder = group.folder.clone();
        let mut hog = hog();
        let member = Arc::clone(&group).admit(hog.id(), 16 << 20).unwrap();
        assert_eq!(member.passed_limit(), None);
        hog.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert_eq!(hog.wait().unwrap().signal(), Some(9));
        assert_eq!(member.passed_limit(), Some(32 << 20));
        drop(member);
        assert!(folder.exists());
        drop(group);
        assert!(!folder.exists());
    }

    #[test]
    fn a_group_is_removed_though_its_process_was_killed_just_now() {
        let Some(group) = group(64 << 20) else { return };
        let folder = group.folder.clone();
        let mut hog = hog();
        let member = Arc::clone(&group).admit(hog.id(), 0).unwrap();
        drop(group);
        assert!(folder.exists());
        hog.kill().unwrap();
        drop(member);
        assert!(!folder.exists());
        hog.wait().unwrap();
    }

    #[test]
    fn the_limit_grows_with_the_processes_side_by_side_and_not_with_those_one_after_another() {
        let Some(group) = group(32 << 20) else { return };
        let file = match group.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        let limit = || -> u64 {
            let text = fs::read_to_string(group.folder.join(file)).unwrap();
            text.trim().parse().unwrap()
        };
        let mut children = [hog(), hog()];
        let admit = |child: &Child| Arc::clone(&group).admit(child.id(), 8 << 20).unwrap();
        drop(admit(&children[0]));
        let first = admit(&children[0]);
        assert_eq!(limit(), 40 << 20);
        let second = admit(&children[1]);
        assert_eq!(limit(), 48 << 20);
        drop((first, second));
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn what_a_killed_job_left_is_removed_by_the_next_and_a_live_ones_is_not() {
        let Some(group) = group(1 << 20) else { return };
        let parent = group.folder.parent().unwrap();
        let start = started(std::process::id()).unwrap();
        let dead = parent.join(format!("fleecebox-{}-{}-0", std::process::id(), start + 1));
        fs::create_dir(&dead).unwrap();
        remove_dead_groups();
        assert!(!dead.exists());
        assert!(group.folder.exists());
    }
}
