//! A libvirt of the tests' own, in namespaces of its own: see `tests/libvirt/run.sh`.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::guest::cache;
use crate::process::{Daemon, run, tool};
use crate::{Monitors, Qmp, eventually, not_shown};

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/libvirt");
/// Debian's `libvirt-qemu`, which libvirt runs QEMU as.
const USER: u32 = 64055;
/// It looks at each QEMU of the machine first.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Of one command; a block job of these disks takes less than a second.
const COMMAND_SECONDS: &str = "120";

/// A running libvirtd.
#[derive(Debug)]
pub struct Libvirt {
    unpacked: PathBuf,
    daemon: Daemon,
    folder: TempDir,
}

/// A domain with two disks, `sda` (virtio-scsi) and `vdb` (virtio-blk), and no operating system.
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
        std::fs::write(&xml, definition(name, &folder, &monitors))?;
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
}

fn definition(name: &str, folder: &Path, monitors: &Monitors) -> String {
    let disk = |file: &str, target: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{}/{file}.qcow2'/><target {target}/></disk>",
            folder.display()
        )
    };
    let monitor = |socket: &Path| {
        format!(
            "<qemu:arg value='-qmp'/><qemu:arg value='unix:{},server=on,wait=off'/>",
            socket.display()
        )
    };
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
         <name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{}{}\
         <controller type='scsi' model='virtio-scsi'/></devices>\
         <qemu:commandline>{}{}</qemu:commandline></domain>",
        disk("sda", "dev='sda' bus='scsi'"),
        disk("vdb", "dev='vdb' bus='virtio'"),
        monitor(&monitors.product),
        monitor(&monitors.control),
    )
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
