//! Who has a file or a block device open: a VM's disk that is overwritten while it runs is lost.
//!
//! No single place knows. Processes of this host are seen in /proc, the kernel's own uses in /sys, VMs in other containers
//! by QEMU's locks on the image, and those that neither shows by their monitors.

use crate::config::Config;
use crate::contract::with_causes;
use crate::event::Events;
use crate::qemu::{Monitor, open_files};
use rustix::fs::{AtFlags, CWD, FileType, Stat, StatxFlags, major, makedev, minor, statx};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// How often, and how long apart, a process is looked at that has it open: what only looks at a new device, as udev
/// does, has closed it by then.
const LOOKS: usize = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// How long a monitor has to answer. One that another client holds says nothing.
const MONITOR_LIMIT: Duration = Duration::from_secs(2);

/// What is the same thing by whatever path it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    File { device: u64, inode: u64 },
    Device(u64),
}

impl Thing {
    fn of(found: &Stat) -> Self {
        match FileType::from_raw_mode(found.st_mode) {
            FileType::BlockDevice => Self::Device(found.st_rdev),
            _ => Self::File {
                device: found.st_dev,
                inode: found.st_ino,
            },
        }
    }

    /// Of an open file or a path, without waiting for a server that does not answer.
    fn at(path: &Path) -> Option<Self> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO;
        let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, wanted).ok()?;
        let kind = FileType::from_raw_mode(found.stx_mode.into());
        Some(match kind {
            FileType::BlockDevice => {
                Self::Device(makedev(found.stx_rdev_major, found.stx_rdev_minor))
            }
            _ => Self::File {
                device: makedev(found.stx_dev_major, found.stx_dev_minor),
                inode: found.stx_ino,
            },
        })
    }
}

/// Those who have `found` open or mounted, each in words; nobody's, if it is empty.
pub(super) async fn users(found: &Stat, config: &Config, events: &Events) -> Vec<String> {
    let thing = Thing::of(found);
    let (things, mut users) = match thing {
        Thing::File { .. } => (BTreeSet::from([thing]), loops_over(thing)),
        Thing::Device(device) => of_device(device),
    };
    users.extend(swapped_to(&things));
    users.extend(processes_that_stay(&things).await);
    if users.is_empty() {
        users.extend(machines(&things, config, events).await);
    }
    users
}

/// Loop devices are the kernel's own openers, which /proc does not show.
fn loops_over(thing: Thing) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let over = devices.filter(|device| {
        let backing = fs::read_to_string(device.path().join("loop/backing_file"));
        backing.is_ok_and(|path| Thing::at(Path::new(path.trim_end_matches('\n'))) == Some(thing))
    });
    over.map(|device| format!("the loop device /dev/{}", device.file_name().display()))
        .collect()
}

/// What is the same disk by other names: the whole of a partition, the partitions of a whole, a loop device's file. And
/// what the kernel has put upon it, with all that is upon that.
fn of_device(device: u64) -> (BTreeSet<Thing>, Vec<String>) {
    let mut things = BTreeSet::from([Thing::Device(device)]);
    let mut users = mounts(device);
    let folder = folder_of(device);
    let numbers = |folder: &Path| {
        fs::read_to_string(folder.join("dev"))
            .ok()
            .and_then(|text| parse(&text))
    };
    if folder.join("partition").exists() {
        let whole = fs::canonicalize(&folder).ok();
        let whole = whole.as_deref().and_then(Path::parent).and_then(numbers);
        things.extend(whole.map(Thing::Device));
    }
    let children = fs::read_dir(&folder).into_iter().flatten().flatten();
    for partition in children.filter(|child| child.path().join("partition").exists()) {
        if let Some(number) = numbers(&partition.path()) {
            things.insert(Thing::Device(number));
            users.extend(mounts(number));
        }
    }
    if let Ok(backing) = fs::read_to_string(folder.join("loop/backing_file")) {
        things.extend(Thing::at(Path::new(backing.trim_end_matches('\n'))));
    }
    let mut waiting = vec![folder];
    while let Some(folder) = waiting.pop() {
        let holders = fs::read_dir(folder.join("holders")).into_iter().flatten();
        for holder in holders.flatten() {
            users.push(format!("the device {}", holder.file_name().display()));
            if let Some(number) = numbers(&holder.path())
                && things.insert(Thing::Device(number))
            {
                users.extend(mounts(number));
                waiting.push(folder_of(number));
            }
        }
    }
    (things, users)
}

fn folder_of(device: u64) -> PathBuf {
    format!("/sys/dev/block/{}:{}", major(device), minor(device)).into()
}

/// As in /sys and in mountinfo: `8:1`.
fn parse(numbers: &str) -> Option<u64> {
    let (major, minor) = numbers.trim_end().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn mounts(device: u64) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let fields = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let ours = fields.filter(|fields| fields.get(2).and_then(|it| parse(it)) == Some(device));
    ours.filter_map(|fields| Some(format!("it is mounted at {}", fields.get(4)?)))
        .collect()
}

fn swapped_to(things: &BTreeSet<Thing>) -> Vec<String> {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let paths = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    let ours =
        paths.filter(|path| Thing::at(Path::new(path)).is_some_and(|it| things.contains(&it)));
    ours.map(|path| format!("the system swaps to {path}"))
        .collect()
}

async fn processes_that_stay(things: &BTreeSet<Thing>) -> Vec<String> {
    let mut found = processes(things);
    for _ in 1..LOOKS {
        if found.is_empty() {
            break;
        }
        sleep(PAUSE).await;
        found = processes(things);
    }
    found
}

/// Those of them that this user may look at.
fn processes(things: &BTreeSet<Thing>) -> Vec<String> {
    let own = std::process::id();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let others = numbers.filter(|process| *process != own);
    let ours = others.filter(|process| {
        let open = fs::read_dir(format!("/proc/{process}/fd"));
        open.into_iter()
            .flatten()
            .flatten()
            .any(|open| Thing::at(&open.path()).is_some_and(|thing| things.contains(&thing)))
    });
    ours.map(|process| {
        let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
        format!("process {process} ({})", name.trim_end())
    })
    .collect()
}

/// The VMs of the configuration, side by side.
async fn machines(things: &BTreeSet<Thing>, config: &Config, events: &Events) -> Vec<String> {
    let asked = config.vm.iter().filter_map(|(name, vm)| {
        let monitor = vm.address()?;
        Some(async move {
            let asking = async { open_files(&Monitor::reach(&monitor).await?).await };
            (name, timeout(MONITOR_LIMIT, asking).await)
        })
    });
    let mut users = Vec::new();
    for (name, answer) in futures_util::future::join_all(asked).await {
        match answer {
            Ok(Ok(paths)) => {
                let has = |path: &PathBuf| Thing::at(path).is_some_and(|it| things.contains(&it));
                if paths.iter().any(has) {
                    users.push(format!("the VM '{name}'"));
                }
            }
            Ok(Err(error)) if error.is_nobody() => {}
            Ok(Err(error)) => events.warn(format!(
                "the VM '{name}' cannot be asked for its disks: {}",
                with_causes(&error)
            )),
            Err(_) => events.warn(format!(
                "the VM '{name}' cannot be asked for its disks: its monitor did not answer within {} s",
                MONITOR_LIMIT.as_secs()
            )),
        }
    }
    users
}
