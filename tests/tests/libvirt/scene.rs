//! A domain and the backups of it, each of which must be what its disks held.

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Domain, Fleecebox, Libvirt, MIB, Order, QemuState, Running, Site, compare,
};
use serde_json::{Value, json};

/// Of each disk, in bytes.
const SIZE: u64 = 64 * MIB;

/// Of data on each disk from the beginning: what changes is one block of so many that the sample of clean blocks that
/// each incremental compares, 16 of them, would hardly ever find a change that tracking has missed.
const FILLED: u64 = 48 * MIB;

/// The disks of a domain: libvirt's name, and the device's.
const DISKS: [(&str, &str); 2] = [("sda", "scsi0-0-0-0"), ("vdb", "virtio-disk1")];

/// How the product reaches a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By its name, through libvirt. The domain's own monitors are the tests' then.
    Name,
    /// By a monitor of its own, which is in the domain's definition.
    Monitor,
}

/// Of a bitmap and of the product.
const BLOCK: u64 = 65536;

pub(super) struct Scene<'a> {
    pub(super) domain: Domain<'a>,
    pub(super) site: Site,
    /// What libvirt calls the domain.
    pub(super) name: String,
    way: Way,
    order: Order,
    backups: Vec<Backup>,
    written: u8,
}

impl<'a> Scene<'a> {
    /// A domain whose disks have been written to and backed up once.
    pub(super) fn new(libvirt: &'a Libvirt, name: &str, way: Way) -> Result<Self> {
        let domain = libvirt.domain(name, SIZE)?;
        let site = Site::new()?;
        let order = site.order_for(&domain.monitors().product, "chunked")?;
        let mut scene = Self {
            domain,
            site,
            name: name.into(),
            way,
            order,
            backups: Vec::new(),
            written: 0,
        };
        for (_, device) in DISKS {
            scene.domain.write(device, 0xee, 0, FILLED)?;
        }
        scene.back_up()?;
        Ok(scene)
    }

    pub(super) fn virsh(&self, command: &[&str]) -> Result<String> {
        self.domain.virsh(command)
    }

    /// From here on, the domain is reached by its name.
    pub(super) fn goes_by_name(&mut self) {
        self.way = Way::Name;
    }

    /// The command line of a backup.
    pub(super) fn command(&self) -> Fleecebox {
        self.command_in(&self.site, self.way)
    }

    /// The same by another way, with the folders of `site` but the archive.
    pub(super) fn command_in(&self, site: &Site, way: Way) -> Fleecebox {
        let order = &self.order;
        match way {
            Way::Monitor => site.backup_command(order),
            Way::Name => site
                .command(&["backup", &order.vm, "--json", "--libvirt", &self.name])
                .arg("--libvirt-uri")
                .arg(self.domain.libvirt().uri())
                .arg("--provider")
                .arg(&order.provider)
                .arg("--archive")
                .arg(&order.archive)
                .arg("--fleecing")
                .arg(site.path("fleecing")),
        }
    }

    /// What the product calls a disk.
    fn volume(&self, (disk, device): (&'static str, &'static str)) -> &'static str {
        match self.way {
            Way::Name => disk,
            Way::Monitor => device,
        }
    }

    /// Writes what was never written to either disk, in part of a block of its own, and of the block that was written
    /// last.
    pub(super) fn write(&mut self) -> Result<()> {
        self.written += 1;
        for (_, device) in DISKS {
            let at = u64::from(self.written) * 3 * BLOCK;
            self.domain.write(device, self.written, at + 1000, 20_000)?;
            let last = at - 3 * BLOCK;
            self.domain
                .write(device, 0x80 | self.written, last + 30_000, 3000)?;
        }
        Ok(())
    }

    /// Makes a backup, restores it and holds it against the disks, which nobody writes to meanwhile.
    pub(super) fn back_up(&mut self) -> Result<()> {
        let before = self.state()?;
        let running = self.command().start()?;
        self.finish(running, &before)
    }

    /// The id of the last backup.
    pub(super) fn last(&self) -> &str {
        self.backups.last().map_or("", |backup| &backup.id)
    }

    /// What QEMU shows at this time.
    pub(super) fn state(&self) -> Result<QemuState> {
        QemuState::read(self.domain.monitors())
    }

    /// Takes the backup that `running` makes, and looks at it as [`Scene::back_up`] does.
    pub(super) fn finish(&mut self, running: Running, before: &QemuState) -> Result<()> {
        let outcome = running.finish()?;
        ensure!(
            outcome.code() == Some(0),
            "the backup ended with {:?}: {}",
            outcome.code(),
            outcome.stderr
        );
        let backup = Backup::told_by(&outcome)?;
        self.site.check_no_fleecing_images()?;
        let left = self.state()?.differences(before, |_| true);
        ensure!(left.is_empty(), "left behind: {left:?}");
        let restored = self.site.restore(&self.site.archive(), &backup.id)?;
        for (disk, device) in DISKS {
            let image = restored.join(format!("{}.raw", self.volume((disk, device))));
            compare::same_as_live(&image, &self.domain.source(disk)?)
                .with_context(|| format!("{disk} of backup {}: {}", backup.id, backup.said))?;
        }
        self.backups.push(backup);
        Ok(())
    }

    /// Lets the product start and stop the domain by these lines of a shell, in which `virsh` is this libvirt's
    /// and `$domain` the domain.
    pub(super) fn is_started_by(&self, start: &str, stop: Option<&str>) -> Result<()> {
        let words = |line: &str| {
            let virsh = format!("virsh() {{ {} \"$@\"; }}; {line}", self.domain.shell());
            json!(["sh", "-c", virsh.replace("$domain", &self.domain.name)])
        };
        let stop = stop.map(|stop| format!("stop = {}\n", words(stop)));
        let stop = stop.unwrap_or_default();
        let start = words(start);
        let config = format!("[vm.web]\nstart = {start}\n{stop}");
        self.site.configure(&config)
    }

    /// A backup that is made by starting the domain and stopping it again.
    pub(super) fn back_up_stopped(&mut self) -> Result<()> {
        let outcome = self.command().run()?;
        ensure!(outcome.code() == Some(0), "{}", outcome.stderr);
        ensure!(
            outcome.stderr.contains("the VM is stopped again"),
            "{}",
            outcome.stderr
        );
        self.site.check_no_fleecing_images()?;
        self.backups.push(Backup::told_by(&outcome)?);
        Ok(())
    }

    /// A backup is refused as somebody's mistake, and nothing is left of it. Returns its words.
    pub(super) fn is_refused(&self) -> Result<String> {
        let outcome = self.command().run()?;
        ensure!(
            outcome.code() == Some(2),
            "{:?}: {}",
            outcome.code(),
            outcome.stderr
        );
        self.site.check_no_fleecing_images()?;
        Ok(outcome.stderr)
    }

    /// How each backup was read: `full` or `incr` for each disk.
    pub(super) fn told(&self) -> String {
        let of = |backup: &Backup| {
            let read = DISKS.map(|(disk, device)| {
                let is =
                    |volume: &&Value| [disk, device].map(Value::from).contains(&volume["name"]);
                match backup.volumes.iter().find(is) {
                    Some(volume) if volume["base"].is_null() => "full",
                    Some(_) => "incr",
                    None => "none",
                }
            });
            read.join("+")
        };
        self.backups.iter().map(of).collect::<Vec<_>>().join(", ")
    }

    /// Two more backups after what happened, with and without writes before; the last must build on the one before, so
    /// that tracking goes on. All that were made are still intact.
    pub(super) fn goes_on(&mut self) -> Result<()> {
        self.back_up()?;
        self.write()?;
        self.back_up()?;
        let told = self.told();
        ensure!(told.ends_with("incr+incr"), "read in full again: {told}");
        for backup in &self.backups {
            self.site.verify(&self.site.archive(), &backup.id)?;
        }
        Ok(())
    }

    /// Removes the product's bitmaps from all nodes of the domain.
    pub(super) fn drop_bitmaps(&self) -> Result<()> {
        use fleecebox_tests::Qmp;
        let state = QemuState::read(self.domain.monitors())?;
        let mut qmp = Qmp::connect(&self.domain.monitors().control)?;
        for bitmap in state.bitmaps() {
            let arguments = json!({"node": bitmap.node, "name": bitmap.name});
            qmp.execute("block-dirty-bitmap-remove", arguments)?;
        }
        Ok(())
    }
}
