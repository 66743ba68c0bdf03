//! A real Linux guest, emulated without KVM: a Debian kernel, ext4 on a virtio and on a SCSI
//! disk, the guest agent, and processes that write all the while.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tempfile::TempDir;

use crate::latency;
use crate::process::{Daemon, run, tool};
use crate::{Agent, Disk, DiskFile, FreezeStatus, MIB, Monitors, Qmp, QmpError, eventually};

/// Emulation is slow, and slower beside other tests; a quiet machine needs a few seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const AGENT_LIMIT: Duration = Duration::from_secs(10);
const QUIT_LIMIT: Duration = Duration::from_secs(30);
/// Where the guest's image is built when `FLEECEBOX_CACHE` does not say: beside the workspace's
/// `Cargo.toml`, ignored by git.
const DEFAULT_CACHE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache");
const BUILD_SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/build.sh");

/// A running guest with its two disks, in a temporary folder that goes when this value goes.
#[derive(Debug)]
pub struct Guest {
    // Before the folder, so that the process is gone when its files go.
    daemon: Daemon,
    disks: [DiskFile; 2],
    monitors: Monitors,
    image: PathBuf,
    /// What the guest reported from here on is not in the table of the slowest writes yet.
    reported: LogPosition,
    folder: TempDir,
}

/// A place in what the guest has reported so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPosition(usize);

impl Guest {
    /// Two formatted disks of 64 MiB: `disk-a`, raw, and `disk-b`, qcow2.
    pub fn usual_disks() -> [Disk; 2] {
        [
            Disk::raw("disk-a", 64 * MIB).formatted(),
            Disk::qcow2("disk-b", 64 * MIB).formatted(),
        ]
    }

    /// Boots with the first disk on virtio-blk (`id=device-a`) and the second on virtio-scsi
    /// (`id=device-b`), each on an iothread of its own, both with ext4 and at least 32 MiB, and waits until the agent answers and
    /// both disks are written to. The first call on a machine builds the guest's image.
    ///
    /// # Errors
    /// When a program or a Debian package is missing, or the guest does not come up.
    pub fn boot(disks: &[Disk; 2]) -> Result<Self> {
        let image = image()?;
        let folder = TempDir::with_prefix("fleecebox-vm-")?;
        let [first, second] = disks;
        let disks = [first.create(folder.path())?, second.create(folder.path())?];
        let monitors = Monitors::in_folder(folder.path());
        let daemon = start(folder.path(), &image, &monitors, &disks, "")?;
        let mut guest = Self {
            daemon,
            disks,
            monitors,
            image,
            reported: LogPosition(0),
            folder,
        };
        guest.wait_until_up()?;
        Ok(guest)
    }

    /// Boots with disks as [`Guest::boot`], which need no file system, and nothing but a writer in it, without an agent:
    /// it writes 1, 2, 3 … as eight bytes, little-endian, to the start of the first disk and, when the disk says that it is
    /// done, of the second, and only then the next. Waits until it does.
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn boot_counting(disks: &[Disk; 2]) -> Result<Self> {
        let image = image()?;
        let folder = TempDir::with_prefix("fleecebox-vm-")?;
        let [first, second] = disks;
        let disks = [first.create(folder.path())?, second.create(folder.path())?];
        let monitors = Monitors::in_folder(folder.path());
        let daemon = start(folder.path(), &image, &monitors, &disks, "counting")?;
        let mut guest = Self {
            daemon,
            disks,
            monitors,
            image,
            reported: LogPosition(0),
            folder,
        };
        let serial = guest.folder.path().join("serial.log");
        eventually("the guest to count", BOOT_LIMIT, || {
            guest.daemon.check_alive()?;
            Ok(read(&serial).contains("guest-counter").then_some(()))
        })
        .with_context(|| read(&serial))?;
        Ok(guest)
    }

    /// The sockets to talk to QEMU.
    pub fn monitors(&self) -> &Monitors {
        &self.monitors
    }

    /// A connection for the test's own commands to QEMU.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn control(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.monitors.control)
    }

    /// The guest agent's socket. It serves one client at a time.
    pub fn agent_socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// A connection to the guest agent, for as long as nobody else needs it.
    ///
    /// # Errors
    /// When it does not answer within ten seconds.
    pub fn agent(&self) -> Result<Agent> {
        Agent::connect(&self.agent_socket(), AGENT_LIMIT).context("the guest agent")
    }

    /// The two disks.
    pub fn disks(&self) -> &[DiskFile; 2] {
        &self.disks
    }

    /// The two disks; a stopped guest's may be swapped or changed.
    pub fn disks_mut(&mut self) -> &mut [DiskFile; 2] {
        &mut self.disks
    }

    /// A folder for the test's own files, which goes when the guest goes.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the guest's file systems are frozen, as its agent says.
    ///
    /// # Errors
    /// When the agent cannot be asked.
    pub fn is_frozen(&self) -> Result<bool> {
        Ok(self.agent()?.freeze_status()? == FreezeStatus::Frozen)
    }

    /// Whether the guest's processor runs (`query-status`).
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn is_running(&self) -> Result<bool> {
        Ok(self.control()?.execute("query-status", json!({}))?["status"] == "running")
    }

    /// Where the guest's report ends now.
    pub fn position(&self) -> LogPosition {
        LogPosition(self.serial().len())
    }

    /// The slowest single write, with its sync, that the guest saw on either disk after
    /// `position`, by its own clock. `None` if it has reported none: each disk reports every 50
    /// writes.
    pub fn worst_write_latency(&self, position: LogPosition) -> Option<Duration> {
        let serial = self.serial();
        let worst = reports(&serial[position.0..])
            .map(|report| report.worst)
            .max();
        worst.map(Duration::from_micros)
    }

    /// Waits until both disks have reported once more: 50 further writes have begun on each.
    ///
    /// # Errors
    /// When that takes longer than two minutes, as it does in a frozen or stopped guest, or when
    /// the guest says that a write failed.
    pub fn wait_for_writes(&mut self) -> Result<()> {
        self.wait_for_writes_within(BOOT_LIMIT)
    }

    /// As [`Guest::wait_for_writes`], with a limit for tests that expect none.
    ///
    /// # Errors
    /// When that takes longer than `limit`, or the guest says that a write failed.
    pub fn wait_for_writes_within(&mut self, limit: Duration) -> Result<()> {
        let position = self.position();
        let serial = self.folder.path().join("serial.log");
        eventually("the guest's writes", limit, || {
            self.daemon.check_alive()?;
            let text = read(&serial);
            let new = &text[position.0.min(text.len())..];
            // Printed only when something that must not end has ended.
            if let Some(trouble) = new.lines().find(|line| line.starts_with("guest: writing")) {
                bail!("{trouble}");
            }
            let wrote = |folder| reports(new).any(|report| report.folder == folder);
            Ok((wrote("/disk/a") && wrote("/disk/b")).then_some(()))
        })
    }

    /// All that the guest has printed.
    pub fn serial(&self) -> String {
        read(&self.folder.path().join("serial.log"))
    }

    /// Ends QEMU in good order, as if the power were cut from the guest; persistent bitmaps are
    /// stored.
    ///
    /// # Errors
    /// When it does not end.
    pub fn quit(&mut self) -> Result<()> {
        self.report();
        self.control()?.execute("quit", json!({}))?;
        self.daemon.wait(QUIT_LIMIT).map(drop)
    }

    /// Ends QEMU by SIGKILL.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.report();
        self.daemon.kill()
    }

    /// Boots again with the disks that [`Guest::disks`] lists now.
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn boot_again(&mut self) -> Result<()> {
        self.report();
        self.daemon.kill()?;
        self.daemon = start(
            self.folder.path(),
            &self.image,
            &self.monitors,
            &self.disks,
            "",
        )?;
        self.wait_until_up()
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let up = self.wait_for_writes().and_then(|()| {
            let agent = self.agent_socket();
            eventually("the guest agent", BOOT_LIMIT, || {
                self.daemon.check_alive()?;
                // An agent that is not up yet leaves the question unanswered.
                Ok(Agent::connect(&agent, Duration::from_secs(1)).ok())
            })
        });
        match up {
            Ok(_) => {
                // A booting guest has no disks to wait for.
                self.reported = self.position();
                Ok(())
            }
            Err(error) => Err(error.context(format!("the guest said:\n{}", self.serial()))),
        }
    }
}

impl Guest {
    /// Enters the slowest write since the last call into the table.
    fn report(&mut self) {
        if let Some(worst) = self.worst_write_latency(self.reported) {
            latency::record("booted guest", worst);
        }
        self.reported = self.position();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.report();
    }
}

struct Report<'a> {
    folder: &'a str,
    worst: u64,
}

/// The writer's lines: `guest-writer folder=PATH writes=N worst-us=N`. The last line may not be
/// complete yet, and other messages may run into one.
fn reports(serial: &str) -> impl Iterator<Item = Report<'_>> {
    let complete = serial.rfind('\n').map_or("", |end| &serial[..end]);
    complete.lines().filter_map(|line| {
        let mut fields = line
            .trim_end()
            .strip_prefix("guest-writer folder=")?
            .split(' ');
        let folder = fields.next()?;
        let worst = fields.nth(1)?.strip_prefix("worst-us=")?.parse().ok()?;
        Some(Report { folder, worst })
    })
}

fn read(serial: &Path) -> String {
    let bytes = std::fs::read(serial).unwrap_or_default();
    // One character per byte, whatever the firmware prints, so that positions keep their meaning.
    bytes
        .iter()
        .map(|&byte| {
            if byte.is_ascii() {
                char::from(byte)
            } else {
                '?'
            }
        })
        .collect()
}

/// Where things go that are slow to make.
pub(crate) fn cache() -> OsString {
    std::env::var_os("FLEECEBOX_CACHE").unwrap_or_else(|| DEFAULT_CACHE.into())
}

/// The folder with the guest's kernel and initramfs.
pub(crate) fn image() -> Result<PathBuf> {
    let built = run("dash", tool("sh").arg(BUILD_SCRIPT).arg(cache()))
        .context("building the guest's image from Debian packages")?;
    Ok(String::from_utf8(built.stdout)?.trim_end().into())
}

fn start(
    folder: &Path,
    image: &Path,
    monitors: &Monitors,
    disks: &[DiskFile; 2],
    word: &str,
) -> Result<Daemon> {
    // No KVM: it is not everywhere, and the guest needs little.
    let serial = folder.join("serial.log");
    // Positions in it are from this boot.
    let _ = std::fs::remove_file(&serial);
    let mut command = tool("qemu-system-x86_64");
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
        ])
        .args(["-smp", "1", "-m", "256"])
        .arg("-kernel")
        .arg(image.join("vmlinuz"))
        .arg("-initrd")
        .arg(image.join("initramfs.gz"))
        .arg("-append")
        // On a busy machine the kernel would not find its emulated timer ticking in time, and give up.
        .arg(format!(
            "console=ttyS0 quiet panic=-1 no_timer_check {word}"
        ))
        .arg("-serial")
        .arg(format!("file:{}", serial.display()));
    for disk in disks {
        command.arg("-blockdev").arg(disk.blockdev().to_string());
    }
    // As operators run disks that have to be fast: each on a thread of its own.
    command.args([
        "-object",
        "iothread,id=thread-a",
        "-object",
        "iothread,id=thread-b",
    ]);
    let [first, second] = disks;
    command.arg("-device").arg(format!(
        "virtio-blk-pci,id=device-a,drive={},iothread=thread-a",
        first.node
    ));
    command
        .arg("-device")
        .arg("virtio-scsi-pci,id=scsi,iothread=thread-b");
    command
        .arg("-device")
        .arg(format!("scsi-hd,id=device-b,drive={}", second.node));
    let agent = folder.join("agent.sock");
    let chardev = |name: &str, socket: &Path| {
        format!(
            "socket,id={name},path={},server=on,wait=off",
            socket.display()
        )
    };
    command.arg("-chardev").arg(chardev("agent", &agent));
    command.args(["-device", "virtio-serial-pci"]);
    command.args([
        "-device",
        "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
    ]);
    for (name, socket) in monitors.sockets() {
        command.arg("-chardev").arg(chardev(name, socket));
        command
            .arg("-mon")
            .arg(format!("chardev={name},mode=control"));
    }
    Daemon::start(&mut command, "qemu-system-x86", &folder.join("qemu.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_lines_of_the_writer_are_reports() {
        let serial = "guest: up\r\nguest-writer folder=/disk/a writes=50 worst-us=12\r\n\
             guest-writer folder=/disk/b writes=50 worst-us=3";
        let read: Vec<_> = reports(serial)
            .map(|report| (report.folder, report.worst))
            .collect();
        assert_eq!(read, [("/disk/a", 12)]);
    }
}
