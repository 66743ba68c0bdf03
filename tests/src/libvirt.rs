//! A libvirt of the tests' own, in namespaces of its own: see `tests/libvirt/run.sh`.

use std::fmt::Display;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::guest::{cache, image};
use crate::process::{Daemon, run, tool};
use crate::{Disk, MIB, Monitors, Qmp, eventually, not_shown};

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/libvirt");
/// Debian's `libvirt-qemu`, which libvirt runs QEMU as.
const USER: u32 = 64055;
/// It looks at each QEMU of the machine first.
const START_LIMIT: Duration = Duration::from_secs(120);
/// As of every guest of the tests.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Of one command; a block job of these disks takes less than a second.
const COMMAND_SECONDS: &str = "120";

/// A running libvirtd.
#[derive(Debug)]
pub struct Libvirt {
    unpacked: PathBuf,
    daemon: Daemon,
    folder: TempDir,
}

/// A domain with two disks, and the tests' own monitors. Of [`Libvirt::domain`], it has no operating system, and the
/// disks are `sda` (virtio-scsi) and `vdb` (virtio-blk).
#[derive(Debug)]
pub struct Domain<'a> {
    libvirt: &'a Libvirt,
    /// libvirt's name of it.
    pub name: String,
    folder: PathBuf,
    monitors: Monitors,
}

impl Libvirt {
    /// Starts one; none, which is told, where this machine does not let us or has none to unpack.
    ///
    /// # Errors
    /// When it does not come up, with its own words.
    pub fn start() -> Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            not_shown("all that needs a libvirt (only root can run one of its own)");
            return Ok(None);
        }
        let build = Path::new(SCRIPTS).join("build.sh");
        let unpacked = match run("dash", Command::new(build).arg(cache())) {
            Ok(output) => PathBuf::from(String::from_utf8(output.stdout)?.trim_end()),
            Err(error) => {
                not_shown(&format!("all that needs a libvirt: {error:#}"));
                return Ok(None);
            }
        };
        let folder = TempDir::with_prefix("fleecebox-libvirt-")?;
        let mut unshare = tool("unshare");
        unshare
            .args([
                "--mount",
                "--pid",
                "--net",
                "--ipc",
                "--fork",
                "--kill-child",
            ])
            .arg(Path::new(SCRIPTS).join("run.sh"))
            .args([&*unpacked, folder.path()]);
        let log = folder.path().join("libvirtd.log");
        let mut started = Self {
            unpacked,
            daemon: Daemon::start(&mut unshare, "util-linux", &log)?,
            folder,
        };
        let answers = eventually("libvirtd", START_LIMIT, || {
            started.daemon.check_alive()?;
            Ok(started.virsh(&["version"]).ok())
        });
        answers.with_context(|| started.daemon.log())?;
        Ok(Some(started))
    }

    /// Gives a command to it by `virsh`, and what that printed.
    ///
    /// # Errors
    /// With virsh's words.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let socket = self.folder.path().join("run/libvirt-sock");
        let mut virsh = tool("timeout");
        virsh
            .arg(COMMAND_SECONDS)
            .arg(self.unpacked.join("usr/bin/virsh"))
            .arg("-c")
            .arg(format!("qemu+unix:///system?socket={}", socket.display()))
            .args(arguments)
            .env(
                "LD_LIBRARY_PATH",
                self.unpacked.join("usr/lib/x86_64-linux-gnu"),
            );
        let output = run("libvirt-clients", &mut virsh)?;
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The URI that reaches it.
    pub fn uri(&self) -> String {
        let socket = self.folder.path().join("run/libvirt-sock");
        format!("qemu+unix:///system?socket={}", socket.display())
    }

    /// Ends the daemon, which is then started again; does `meanwhile`, and waits until it answers. Its domains go on.
    ///
    /// # Errors
    /// When it does not come up, or `meanwhile` fails.
    pub fn restart(&self, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        let daemon = self.process()?;
        kill_process(daemon, Signal::TERM)?;
        eventually("the end of libvirtd", START_LIMIT, || {
            let same = self.process().is_ok_and(|it| it == daemon);
            Ok((!same).then_some(()))
        })?;
        meanwhile()?;
        eventually("another libvirtd", START_LIMIT, || {
            let other = self.process().is_ok_and(|other| other != daemon);
            Ok((other && self.virsh(&["version"]).is_ok()).then_some(()))
        })
    }

    /// Of the daemon, as seen from here.
    fn process(&self) -> Result<Pid> {
        let ours = self.daemon.id();
        for entry in std::fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // unshare, the shell, libvirtd
            if comm.trim_end() == "libvirtd" && parent(pid).and_then(parent) == Some(ours) {
                return Pid::from_raw(pid.cast_signed()).context("no process");
            }
        }
        bail!("no libvirtd runs")
    }

    /// What libvirt has told of its dealings with guest agents.
    pub fn agent_log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("agent.log")).unwrap_or_default()
    }

    /// The `virsh` that reaches it, as the words of a shell.
    pub fn shell(&self) -> String {
        let socket = self.folder.path().join("run/libvirt-sock");
        format!(
            "LD_LIBRARY_PATH={} {} -q -c 'qemu+unix:///system?socket={}'",
            self.unpacked.join("usr/lib/x86_64-linux-gnu").display(),
            self.unpacked.join("usr/bin/virsh").display(),
            socket.display()
        )
    }

    /// Defines a domain with empty qcow2 disks of so many bytes each, and starts it paused.
    ///
    /// # Errors
    /// With libvirt's or QEMU's words.
    pub fn domain(&self, name: &str, size: u64) -> Result<Domain<'_>> {
        let folder = self.folder.path().join(name);
        std::fs::create_dir(&folder)?;
        for disk in ["sda", "vdb"] {
            let mut create = tool("qemu-img");
            create.args(["create", "-q", "-f", "qcow2"]);
            let image = folder.join(disk).with_extension("qcow2");
            run("qemu-utils", create.arg(image).arg(size.to_string()))?;
        }
        for entry in std::fs::read_dir(&folder)? {
            chown(entry?.path(), Some(USER), Some(USER))?;
        }
        chown(&folder, Some(USER), Some(USER))?;
        let monitors = Monitors::in_folder(&folder);
        let xml = folder.join("domain.xml");
        let text = definition(name, folder.display(), ["sda", "vdb"], &monitors);
        std::fs::write(&xml, text)?;
        let xml = xml.to_str().context("a path in UTF-8")?;
        let domain = Domain {
            libvirt: self,
            name: name.into(),
            folder,
            monitors,
        };
        self.virsh(&["define", xml])?;
        domain.virsh(&["start", "--paused"])?;
        Ok(domain)
    }

    /// Boots the guest of [`crate::Guest`], with ext4 on `vda` (virtio-blk) and `sda` (virtio-scsi), its agent and its
    /// writers, and waits until the agent answers.
    ///
    /// # Errors
    /// As [`Libvirt::domain`], and when the guest does not come up.
    pub fn guest(&self, name: &str) -> Result<Domain<'_>> {
        let folder = self.folder.path().join(name);
        std::fs::create_dir(&folder)?;
        for disk in ["vda", "sda"] {
            let disk = Disk::qcow2(disk, 64 * MIB).formatted();
            disk.create(&folder)?;
        }
        let image = image()?;
        for file in ["vmlinuz", "initramfs.gz"] {
            std::fs::copy(image.join(file), folder.join(file))?;
        }
        for entry in std::fs::read_dir(&folder)? {
            chown(entry?.path(), Some(USER), Some(USER))?;
        }
        chown(&folder, Some(USER), Some(USER))?;
        let monitors = Monitors::in_folder(&folder);
        let xml = folder.join("domain.xml");
        std::fs::write(&xml, guest_definition(name, &folder, &monitors))?;
        let xml = xml.to_str().context("a path in UTF-8")?;
        let domain = Domain {
            libvirt: self,
            name: name.into(),
            folder,
            monitors,
        };
        self.virsh(&["define", xml])?;
        domain.virsh(&["start"])?;
        eventually("the guest agent", BOOT_LIMIT, || {
            Ok(domain.agent("guest-fsfreeze-status").ok())
        })?;
        Ok(domain)
    }
}

fn guest_definition(name: &str, folder: &Path, monitors: &Monitors) -> String {
    let folder = folder.display();
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    let serial = format!("<serial type='file'><source path='{folder}/serial.log'/></serial>");
    let boot = format!(
        "<kernel>{folder}/vmlinuz</kernel><initrd>{folder}/initramfs.gz</initrd>\
         <cmdline>console=ttyS0 quiet panic=-1 no_timer_check</cmdline>"
    );
    definition(name, folder, ["vda", "sda"], monitors)
        .replace("<memory unit='MiB'>64<", "<memory unit='MiB'>256<")
        .replace(
            "</type></os>",
            &format!("</type>{boot}</os><cpu mode='maximum'/>"),
        )
        .replace("</devices>", &format!("{serial}{channel}</devices>"))
}

fn definition(name: &str, folder: impl Display, disks: [&str; 2], monitors: &Monitors) -> String {
    let disk = |target: &str| {
        let bus = match target.strip_prefix("sd") {
            Some(_) => "scsi",
            None => "virtio",
        };
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{folder}/{target}.qcow2'/><target dev='{target}' bus='{bus}'/></disk>"
        )
    };
    let [first, second] = disks.map(disk);
    let monitor = |socket: &Path| {
        format!(
            "<qemu:arg value='-qmp'/><qemu:arg value='unix:{},server=on,wait=off'/>",
            socket.display()
        )
    };
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
         <name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{first}{second}\
         <controller type='scsi' model='virtio-scsi'/></devices>\
         <qemu:commandline>{}{}</qemu:commandline></domain>",
        monitor(&monitors.product),
        monitor(&monitors.control),
    )
}

/// From `/proc/PID/stat`: `pid (name) state parent …`, where the name may hold anything.
fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

impl Domain<'_> {
    /// `virsh COMMAND DOMAIN …`.
    ///
    /// # Errors
    /// With virsh's words.
    pub fn virsh(&self, command: &[&str]) -> Result<String> {
        let (command, arguments) = command.split_first().context("no command")?;
        let mut all = vec![*command, &self.name];
        all.extend(arguments);
        self.libvirt.virsh(&all)
    }

    /// The libvirt that has it.
    pub fn libvirt(&self) -> &Libvirt {
        self.libvirt
    }

    /// Asks the guest's agent, through libvirt.
    ///
    /// # Errors
    /// When it does not answer, or refuses.
    pub fn agent(&self, command: &str) -> Result<Value> {
        let command = json!({ "execute": command }).to_string();
        let answer = self.virsh(&["qemu-agent-command", &command])?;
        let answer: Value = serde_json::from_str(&answer)?;
        Ok(answer["return"].clone())
    }

    /// As [`Libvirt::shell`].
    pub fn shell(&self) -> String {
        self.libvirt.shell()
    }

    /// The monitors beside libvirt's own.
    pub fn monitors(&self) -> &Monitors {
        &self.monitors
    }

    /// A file beside its disks.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The file that a disk's writes go to now, by libvirt's word.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn source(&self, disk: &str) -> Result<PathBuf> {
        let told = self.virsh(&["domblklist"])?;
        let mut rows = told.lines().map(|line| line.split_whitespace());
        let row = rows.find_map(|mut row| row.next().filter(|name| *name == disk).and(row.next()));
        Ok(row.with_context(|| told.clone())?.into())
    }

    /// Writes a range of a disk, as the guest would, and sees that QEMU has put it into the file.
    ///
    /// # Errors
    /// When there is no such device, or it refuses.
    pub fn write(&self, device: &str, byte: u8, offset: u64, length: u64) -> Result<()> {
        let mut qmp = Qmp::connect(&self.monitors.control)?;
        let devices = qmp.execute("query-block", json!({}))?;
        let mut paths = devices.as_array().context("no list")?.iter();
        let path = paths
            .find_map(|entry| {
                let path = entry["qdev"].as_str()?;
                path.split('/').any(|part| part == device).then_some(path)
            })
            .with_context(|| format!("no device {device} in {devices}"))?;
        for what in [format!("write -P {byte} {offset} {length}"), "flush".into()] {
            let line = format!("qemu-io -d {path} \"{what}\"");
            let said = qmp.execute("human-monitor-command", json!({"command-line": line}))?;
            ensure!(said == "", "{line}: {said}");
        }
        Ok(())
    }
}

impl Drop for Domain<'_> {
    fn drop(&mut self) {
        // It goes with libvirt at the latest.
        let _ = self.virsh(&["destroy"]);
    }
}
