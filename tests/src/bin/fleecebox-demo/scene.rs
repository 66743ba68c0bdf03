//! The VM that is backed up: a real QEMU with real file systems that are written all the while.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use fleecebox_tests::{
    Disk, Ext4Disk, Guest, Load, LogPosition, MIB, Proxy, QemuState, StorageDaemon, Writer,
};

use crate::held::Held;

/// Large enough that an incremental is seen to read less, small enough that nobody waits.
const DISK_SIZE: u64 = 256 * MIB;
/// Writes per second: their mean length is 130 KiB, so about 15 MiB change per second.
const WRITE_RATE: u32 = 120;
/// Writes between two backups.
const CHANGES: u64 = 80;

/// Which QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `qemu-storage-daemon`: the block layer, the monitor and the NBD server, without a machine.
    Daemon,
    /// A booted Linux guest.
    Guest,
}

/// A disk of the VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VmDisk {
    /// As the product calls it.
    pub(crate) volume: &'static str,
    /// Its block node in QEMU.
    pub(crate) node: &'static str,
}

/// The running VM.
#[derive(Debug)]
pub(crate) struct Scene {
    // Before QEMU, so that it is gone when QEMU goes.
    proxy: Proxy,
    machine: Machine,
}

#[derive(Debug)]
enum Machine {
    Daemon {
        writer: Writer,
        daemon: StorageDaemon,
    },
    Guest(Guest),
}

impl Scene {
    /// Starts it; `qmp.sock` appears in `folder`, and `nbd.sock` or `agent.sock`.
    pub(crate) fn start(kind: Kind, folder: &Path) -> Result<Self> {
        let machine = match kind {
            Kind::Daemon => Machine::daemon(folder)?,
            Kind::Guest => Machine::Guest(Guest::boot(&Guest::usual_disks())?),
        };
        let proxy = Proxy::start(machine.monitors())?;
        symlink(proxy.socket(), folder.join("qmp.sock"))?;
        match &machine {
            Machine::Daemon { daemon, .. } => {
                symlink(daemon.nbd_socket(), folder.join("nbd.sock"))?
            }
            Machine::Guest(guest) => symlink(guest.agent_socket(), folder.join("agent.sock"))?,
        }
        Ok(Self { proxy, machine })
    }

    /// The disks.
    pub(crate) fn disks(&self) -> &'static [VmDisk] {
        match self.machine {
            Machine::Daemon { .. } => &[VmDisk {
                volume: "disk",
                node: "disk",
            }],
            Machine::Guest(_) => &[
                VmDisk {
                    volume: "device-a",
                    node: "disk-a",
                },
                VmDisk {
                    volume: "device-b",
                    node: "disk-b",
                },
            ],
        }
    }

    /// The relay to QEMU's monitor, which makes the references.
    pub(crate) fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// The guest, if there is one.
    pub(crate) fn guest(&mut self) -> Option<&mut Guest> {
        match &mut self.machine {
            Machine::Daemon { .. } => None,
            Machine::Guest(guest) => Some(guest),
        }
    }

    /// All that QEMU shows.
    pub(crate) fn state(&self) -> Result<QemuState> {
        QemuState::read(self.machine.monitors())
    }

    /// What QEMU holds.
    pub(crate) fn held(&self) -> Result<Held> {
        let mut control = match &self.machine {
            Machine::Daemon { daemon, .. } => daemon.control()?,
            Machine::Guest(guest) => guest.control()?,
        };
        Held::now(&mut control)
    }

    /// Writes to the disks so far, as far as they have been told.
    pub(crate) fn writes(&self) -> u64 {
        match &self.machine {
            Machine::Daemon { writer, .. } => writer.writes(),
            Machine::Guest(guest) => guest_writes(&guest.serial()),
        }
    }

    /// Waits until the disks have changed.
    ///
    /// # Errors
    /// When they do not, as it is with a frozen guest or a stalled QEMU.
    pub(crate) fn wait_for_changes(&mut self) -> Result<()> {
        match &mut self.machine {
            Machine::Daemon { writer, .. } => writer.wait_for(CHANGES),
            Machine::Guest(guest) => guest.wait_for_writes(),
        }
    }

    /// Where the guest's own report ends now.
    pub(crate) fn position(&self) -> Option<LogPosition> {
        match &self.machine {
            Machine::Daemon { .. } => None,
            Machine::Guest(guest) => Some(guest.position()),
        }
    }

    /// The slowest write since `position` that a guest has reported, by its own clock.
    pub(crate) fn worst_write(&self, position: Option<LogPosition>) -> Option<Duration> {
        match &self.machine {
            Machine::Daemon { .. } => None,
            Machine::Guest(guest) => guest.worst_write_latency(position?),
        }
    }

    /// Moves the reference copies of the last backup to `folder/NODE.raw`.
    ///
    /// # Errors
    /// When one could not be made.
    pub(crate) fn references(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(folder)?;
        let references = self.proxy.references()?;
        self.disks()
            .iter()
            .map(|disk| {
                let reference = references
                    .iter()
                    .find(|reference| reference.device == disk.node)
                    .with_context(|| format!("no reference of {}", disk.node))?;
                let path = folder.join(format!("{}.raw", disk.volume));
                std::fs::rename(&reference.path, &path)?;
                Ok(path)
            })
            .collect()
    }

    /// Removes the reference copies that a failed backup asked for.
    ///
    /// # Errors
    /// When QEMU cannot be asked.
    pub(crate) fn drop_references(&self) -> Result<()> {
        for reference in self.proxy.references()? {
            std::fs::remove_file(reference.path)?;
        }
        Ok(())
    }
}

impl Machine {
    fn daemon(folder: &Path) -> Result<Self> {
        let image = folder.join("ext4.raw");
        let ext4 = Ext4Disk::create(&image, DISK_SIZE)?;
        let disk = Disk::raw("disk", DISK_SIZE).holding(&image);
        let daemon = StorageDaemon::start_with_writer_exports(&[disk])?;
        std::fs::remove_file(&image)?;
        let load = Load {
            seed: 1,
            rate: WRITE_RATE,
            regions: Some(ext4.data_extents),
        };
        let writer = Writer::start(daemon.writer_access("disk")?, load)?;
        Ok(Self::Daemon { writer, daemon })
    }

    fn monitors(&self) -> &fleecebox_tests::Monitors {
        match self {
            Self::Daemon { daemon, .. } => daemon.monitors(),
            Self::Guest(guest) => guest.monitors(),
        }
    }
}

/// The sum over the folders of the last `writes=N` that the guest's writer reported.
fn guest_writes(serial: &str) -> u64 {
    ["/disk/a", "/disk/b"]
        .iter()
        .filter_map(|folder| {
            let start = format!("guest-writer folder={folder} writes=");
            let report = serial
                .lines()
                .rev()
                .find_map(|line| line.strip_prefix(&start))?;
            report.split(' ').next()?.parse::<u64>().ok()
        })
        .sum()
}
