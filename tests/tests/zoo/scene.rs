//! What every attack happens in: a tenant's VM with an honest backup to build on, and a neighbour on the same machine.

use crate::peak::{Peak, Watch};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, Fleecebox, Load, MIB, Order, Outcome, Proxy, QemuState, Random, Running, Site,
    StorageDaemon, Writer, compare, component, files_below,
};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Of each disk, in bytes: as few as show everything, since each attack is followed by a backup that is read back.
const DISK: u64 = 4 * MIB;

/// The disks' parts that a writer changes all the while.
const BUSY: u64 = MIB;

/// A neighbour's job takes some tenths of a second. That of an attacked machine may wait for a processor, but never
/// for the attack to end.
const NEIGHBOUR_LIMIT: Duration = Duration::from_secs(15);

pub(super) struct Scene {
    pub(super) daemon: StorageDaemon,
    pub(super) proxy: Proxy,
    pub(super) site: Site,
    pub(super) honest: Order,
    base: Option<Backup>,
    changes: u64,
    neighbour: Neighbour,
}

/// How one attack went.
pub(super) struct Attack {
    pub(super) outcome: Outcome,
    pub(super) peak: Peak,
    pub(super) neighbour: Duration,
}

impl Scene {
    pub(super) fn new() -> Result<Self> {
        let site = Site::new()?;
        let disks = [Disk::raw("da", DISK), Disk::qcow2("db", DISK + 512)];
        let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
        let proxy = Proxy::start(daemon.monitors())?;
        let honest = Order {
            provider: "honest".into(),
            ..site.order(&daemon, "chunked")?.through(&proxy)
        };
        let mut scene = Self {
            daemon,
            proxy,
            site,
            honest,
            base: None,
            changes: 0,
            neighbour: Neighbour::new()?,
        };
        scene.change()?;
        Ok(scene)
    }

    /// An order for the provider of that name in the configuration.
    pub(super) fn order(&self, provider: &str) -> Order {
        Order {
            provider: provider.into(),
            ..self.honest.clone()
        }
    }

    /// The honest provider, and one more with this component and the text of its own tables. `name` may be the honest
    /// one's, which it then replaces.
    pub(super) fn configure(&self, name: &str, file: &Path, more: &str) -> Result<()> {
        let mut toml = provider(name, "tenant", file, more);
        if name != "honest" {
            toml += &provider("honest", "tenant", &component("chunked")?, "");
        }
        self.site.configure(&toml)
    }

    /// Where an object of the neighbour's lies in the tenant's archive, which the neighbour uses here as well.
    pub(super) fn neighbours_object(&self) -> Result<String> {
        let namespace = "neighbour";
        let image = component("image")?;
        self.site
            .configure(&provider(namespace, namespace, &image, ""))?;
        let backup = self.site.backup(&Order {
            provider: namespace.into(),
            archive: self.honest.archive.clone(),
            full: true,
            ..self.site.order(&self.neighbour.daemon, "image")?
        })?;
        let object = format!("namespaces/{namespace}/backups/{}/objects/dn", backup.id);
        let path = self.honest.archive.join(&object);
        ensure!(path.is_file(), "{} is no object", path.display());
        Ok(object)
    }

    /// Some random data at random places of both disks.
    pub(super) fn change(&mut self) -> Result<()> {
        self.changes += 1;
        let mut random = Random::new(self.changes);
        for disk in ["da", "db"] {
            let mut access = self.daemon.writer_access(disk)?;
            for _ in 0..6 {
                let mut bytes = vec![0; 100 << 10];
                random.fill(&mut bytes);
                access.write(BUSY + random.below(DISK - BUSY - MIB / 8), &bytes)?;
            }
            access.flush()?;
        }
        Ok(())
    }

    /// Fills a whole disk.
    pub(super) fn fill(&self, disk: &str, bytes: impl Iterator<Item = u8>) -> Result<()> {
        let bytes: Vec<u8> = bytes.take(DISK as usize).collect();
        let mut access = self.daemon.writer_access(disk)?;
        for (at, piece) in (0..).step_by(1 << 20).zip(bytes.chunks(1 << 20)) {
            access.write(at, piece)?;
        }
        Ok(access.flush()?)
    }

    /// Runs `command`, which must fail, beside a neighbour and while the guest writes; nothing may come of it.
    pub(super) fn attack(&mut self, command: &Fleecebox) -> Result<Attack> {
        self.change()?;
        self.attack_meanwhile(command, |_, _| Ok(()))
    }

    /// The same without a change before it; `meanwhile` happens while the job runs.
    pub(super) fn attack_meanwhile(
        &mut self,
        command: &Fleecebox,
        meanwhile: impl FnOnce(&Self, &Running) -> Result<()>,
    ) -> Result<Attack> {
        let before = QemuState::read(self.daemon.monitors())?;
        let files = files_below(&self.honest.archive)?;
        // The very first job makes an archive of the folder, whatever else becomes of it.
        let made = !files.is_empty();
        let backups = match made {
            true => self.site.list(&self.honest.archive)?,
            false => Vec::new(),
        };
        let writer = Writer::start(
            self.daemon.writer_access("db")?,
            Load {
                seed: self.changes,
                rate: 50,
                regions: Some(std::iter::once(0..BUSY).collect()),
            },
        )?;
        let neighbour = self.neighbour.start()?;
        let running = command.start()?;
        let watch = Watch::start(running.process().pid);
        meanwhile(self, &running)?;
        let outcome = running.finish();
        let peak = watch.stop();
        let neighbour = self.neighbour.finished(neighbour)?;
        writer.stop().context("the guest saw an error")?;
        self.proxy.references()?;
        let outcome = outcome?;

        let left = QemuState::read(self.daemon.monitors())?.differences(&before, |_| false);
        ensure!(left.is_empty(), "QEMU is not as it was: {left:?}");
        self.site.check_no_fleecing_images()?;
        ensure!(
            self.site.list(&self.honest.archive)? == backups,
            "a backup became visible"
        );
        let visible = files_below(&self.honest.archive)?;
        let new = visible.symmetric_difference(&files);
        // What is known of packs is kept beside them, and made anew at will.
        let new: Vec<_> = new.filter(|file| !file.ends_with("index-cache")).collect();
        ensure!(
            new.is_empty() || !made,
            "the archive is not as it was: {new:?}"
        );
        ensure!(
            neighbour < NEIGHBOUR_LIMIT,
            "the neighbour's job took {neighbour:?}"
        );
        Ok(Attack {
            outcome,
            peak,
            neighbour,
        })
    }

    /// The next honest backup builds on the last honest one, and holds what QEMU itself copied at its point in time.
    pub(super) fn back_up_honestly(&mut self) -> Result<Backup> {
        self.back_up(&self.honest.clone())
    }

    /// The same with a provider that is hostile and right all the same.
    pub(super) fn back_up(&mut self, order: &Order) -> Result<Backup> {
        let next = self.site.backup(order)?;
        for disk in ["da", "db"] {
            next.assert_base(disk, self.base.as_ref().filter(|_| !order.full));
        }
        let references = self.proxy.references()?;
        // Restoring compares every block with its digest, as verify does.
        let restored = self.site.restore(&order.archive, &next.id)?;
        ensure!(references.len() == 2, "{} references", references.len());
        for reference in &references {
            let image = restored.join(format!("{}.raw", reference.device));
            compare::same_bytes(&image, &reference.path)
                .with_context(|| format!("the next backup by {}", order.provider))?;
        }
        std::fs::remove_dir_all(restored)?;
        self.base = Some(next.clone());
        Ok(next)
    }

    /// Everything that the neighbour made meanwhile is whole, and the last is what is on its disk.
    pub(super) fn check_neighbour(&self) -> Result<usize> {
        self.neighbour.check()
    }

    /// How long the neighbour's job takes on a quiet machine.
    pub(super) fn quiet(&self) -> Duration {
        self.neighbour.quiet
    }
}

fn provider(name: &str, namespace: &str, file: &Path, more: &str) -> String {
    format!(
        "[provider.{name}]\ncomponent = '{}'\nnamespace = '{namespace}'\n{}\n",
        file.display(),
        more.replace("[provider.", &format!("[provider.{name}."))
    )
}

/// Another tenant's VM, archive and state on the same machine.
struct Neighbour {
    daemon: StorageDaemon,
    site: Site,
    quiet: Duration,
}

impl Neighbour {
    fn new() -> Result<Self> {
        let site = Site::new()?;
        let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("dn", 8 * MIB)])?;
        let mut bytes = vec![0; 6 << 20];
        Random::new(99).fill(&mut bytes);
        let mut access = daemon.writer_access("dn")?;
        for (at, piece) in (0..).step_by(1 << 20).zip(bytes.chunks(1 << 20)) {
            access.write(at, piece)?;
        }
        access.flush()?;
        let mut neighbour = Self {
            daemon,
            site,
            quiet: Duration::ZERO,
        };
        // The first one also compiles.
        for _ in 0..3 {
            let started = neighbour.start()?;
            neighbour.quiet = neighbour.finished(started)?;
        }
        Ok(neighbour)
    }

    fn order(&self) -> Result<Order> {
        Ok(Order {
            full: true,
            ..self.site.order(&self.daemon, "chunked")?
        })
    }

    fn start(&self) -> Result<JoinHandle<Result<Duration>>> {
        let command = self.site.backup_command(&self.order()?);
        Ok(std::thread::spawn(move || {
            let started = Instant::now();
            let outcome = command.run()?;
            ensure!(outcome.code() == Some(0), "{}", outcome.stderr);
            Ok(started.elapsed())
        }))
    }

    fn finished(&self, job: JoinHandle<Result<Duration>>) -> Result<Duration> {
        let took = job.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
        self.site.check_no_fleecing_images()?;
        took.context("the neighbour's job")
    }

    fn check(&self) -> Result<usize> {
        let archive = self.site.archive();
        let backups = self.site.list(&archive)?;
        for backup in &backups {
            self.site.verify(&archive, backup)?;
        }
        let last = backups.last().context("the neighbour has no backup")?;
        let restored = self.site.restore(&archive, last)?.join("dn.raw");
        let disk: PathBuf = self.daemon.disks()[0].path.clone();
        compare::same_bytes(&restored, &disk)?;
        Ok(backups.len())
    }
}
