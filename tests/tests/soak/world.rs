//! A storage daemon with disks that are written all the while, two archives, and all backups that are known to be
//! committed.

use crate::graph::Images;
use anyhow::{Context, Result, bail, ensure};
use fleecebox_tests::{
    At, Disk, Fault, Fleecebox, Load, MIB, Order, Outcome, Proxy, QemuState, Random,
    ReferenceImage, Running, Site, Stage, StorageDaemon, What, Writer, compare, eventually,
};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A provider, and the archive where its backups go: two tenants of one archive, and an archive of its own.
pub(crate) const TRACKS: [(&str, &str); 3] = [
    ("chunked", "archive"),
    ("image", "archive"),
    ("image", "second"),
];

/// Few enough that most blocks are clean in an incremental: a change that was forgotten then shows.
const WRITES_PER_SECOND: u32 = 60;

/// Backups that are held for a later restore.
const KEPT: usize = 6;

/// A backup that is not disturbed takes about half as long on a quiet machine.
const LONG_ENOUGH: u64 = 1500;

/// A command that is told to wait, or the job's end.
const SOON: Duration = Duration::from_secs(120);

/// How a disturbed job may end, unless it was through already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With an error of its own, and all put back.
    Failed,
    /// By SIGKILL, with all of it left to the next run.
    Killed,
}

/// What was shown so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Backups that were found in an archive.
    pub(crate) committed: u64,
    /// Restores that were held against QEMU's copies.
    pub(crate) compared: u64,
}

/// A backup and what it must restore to.
struct Known {
    archive: PathBuf,
    id: String,
    /// Names of volumes, and copies of their content.
    volumes: Vec<(String, PathBuf)>,
}

/// The namespace of an order's provider, which is part of its bitmaps' names.
fn namespace(order: &Order) -> &str {
    let file = order.provider.rsplit('/').next().unwrap_or_default();
    file.strip_suffix(".wasm").unwrap_or(file)
}

pub(crate) struct World {
    site: Site,
    daemon: StorageDaemon,
    proxy: Proxy,
    before: QemuState,
    writers: Vec<Writer>,
    /// Of the disks whose images change.
    images: Vec<Images>,
    /// Numbers the files of new images.
    files: u32,
    kept: Vec<Known>,
    /// All ids of all archives.
    ids: BTreeSet<String>,
    counts: Counts,
    /// Commands that an undisturbed backup gave, so that a number among them can be chosen.
    commands: u64,
    /// Whether a dead job's things may be in QEMU.
    littered: bool,
    random: Random,
}

impl World {
    /// Disks of random sizes, some no multiple of a block, with writers at work.
    pub(crate) fn new(seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        let mut size = || 4 * MIB + 512 * random.below(32 * MIB / 512);
        let disks = [
            Disk::raw("da", size()),
            Disk::qcow2("db", size()),
            Disk::qcow2("dc", size()),
        ];
        let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
        let site = Site::new()?;
        for (_, archive) in TRACKS {
            fs::create_dir_all(site.path(archive))?;
        }
        fs::create_dir(site.path("kept"))?;
        let mut world = Self {
            proxy: Proxy::start(daemon.monitors())?,
            before: QemuState::read(daemon.monitors())?,
            site,
            daemon,
            writers: Vec::new(),
            images: vec![Images::new("db", 1), Images::new("dc", 2)],
            files: 0,
            kept: Vec::new(),
            ids: BTreeSet::new(),
            counts: Counts::default(),
            commands: 1,
            littered: false,
            random,
        };
        world.start_writers()?;
        for track in TRACKS {
            world.back_up_to(track, false)?;
        }
        Ok(world)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// The longest that a write took since this was asked last.
    pub(crate) fn worst_write(&mut self) -> Result<Duration> {
        let mut worst = Duration::ZERO;
        for writer in self.writers.drain(..) {
            worst = worst.max(writer.stop()?.worst_latency);
        }
        self.start_writers()?;
        Ok(worst)
    }

    fn start_writers(&mut self) -> Result<()> {
        for disk in self.daemon.disks() {
            let access = self.daemon.writer_access(&disk.node)?;
            let load = Load {
                seed: self.random.bits(),
                rate: WRITES_PER_SECOND,
                regions: None,
            };
            self.writers.push(Writer::start(access, load)?);
        }
        Ok(())
    }

    /// An order of one of the tracks, with a fresh proxy.
    fn order(&mut self) -> Result<Order> {
        let track = TRACKS[self.random.below(TRACKS.len() as u64) as usize];
        self.order_to(track)
    }

    fn order_to(&mut self, (provider, archive): (&str, &str)) -> Result<Order> {
        self.proxy = Proxy::start(self.daemon.monitors())?;
        let mut order = self.site.order(&self.daemon, provider)?;
        // Without a device, a disk has its node's name; where another node is active now, the configuration keeps it.
        let moved = |disk: &&Images| disk.active() != disk.disk;
        let mut configuration = String::from("[vm.web.extra]\n");
        for disk in self.images.iter().filter(moved) {
            order.disks.retain(|name| *name != disk.disk);
            writeln!(configuration, "{} = {:?}", disk.disk, disk.active())?;
        }
        self.site.configure(&configuration)?;
        Ok(Order {
            archive: self.site.path(archive),
            ..order.through(&self.proxy)
        })
    }

    /// The disks of an order as pairs of their names and their nodes, in the order in which they are taken.
    fn nodes(&self, order: &Order) -> Vec<(String, String)> {
        let plain = order.disks.iter().map(|disk| (disk.clone(), disk.clone()));
        let moved = self
            .images
            .iter()
            .filter(|disk| !order.disks.contains(&disk.disk));
        let moved = moved.map(|disk| (disk.disk.clone(), disk.active().to_owned()));
        plain.chain(moved).collect()
    }

    pub(crate) fn daemon(&self) -> &StorageDaemon {
        &self.daemon
    }

    pub(crate) fn site(&self) -> &Site {
        &self.site
    }

    /// Backups of a damaged archive need not restore any more.
    pub(crate) fn forget_kept(&mut self, archive: &Path) -> Result<()> {
        for known in self.kept.extract_if(.., |known| known.archive == archive) {
            fs::remove_dir_all(self.site.path("kept").join(known.id))?;
        }
        Ok(())
    }

    /// The archive and the id of one that is kept.
    pub(crate) fn random_kept(&mut self) -> Option<(PathBuf, String)> {
        let some = self.kept.len().max(1) as u64;
        let known = self.kept.get(self.random.below(some) as usize)?;
        Some((known.archive.clone(), known.id.clone()))
    }

    pub(crate) fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    pub(crate) fn images(&self) -> &[Images] {
        &self.images
    }

    pub(crate) fn images_mut(&mut self, number: usize) -> &mut Images {
        &mut self.images[number]
    }

    pub(crate) fn random_images(&mut self) -> usize {
        self.random.below(self.images.len() as u64) as usize
    }

    /// The file that a disk's users read and write.
    pub(crate) fn active_file(&self, number: usize) -> PathBuf {
        self.daemon.disks()[self.images[number].daemon_disk()]
            .path
            .clone()
    }

    /// What QEMU is started with from now on.
    pub(crate) fn set_active_file(&mut self, number: usize, file: PathBuf) {
        let disk = self.images[number].daemon_disk();
        self.daemon.disks_mut()[disk].path = file;
    }

    /// A node's name and a file for a new image.
    pub(crate) fn new_image(&mut self, number: usize) -> (String, PathBuf) {
        self.files += 1;
        let node = format!("{}-{}", self.images[number].disk, self.files);
        let file = self.daemon.folder().join(format!("{node}.qcow2"));
        (node, file)
    }

    /// What a dead job left would be in the way of whoever changes images.
    pub(crate) fn settle_litter(&mut self) -> Result<()> {
        match self.litter()?.is_empty() {
            true => Ok(()),
            false => self.recover(),
        }
    }

    /// What is in QEMU now is how it has to be after a job.
    pub(crate) fn look_again(&mut self) -> Result<()> {
        self.before = QemuState::read(self.daemon.monitors())?;
        Ok(())
    }

    /// Ends QEMU in good order, lets `change` change its images, and starts it again.
    pub(crate) fn while_off(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.writers.clear();
        self.daemon.quit()?;
        change(self)?;
        self.go_on()
    }

    /// A backup that nobody disturbs must go through.
    pub(crate) fn back_up(&mut self, full: bool) -> Result<()> {
        let track = TRACKS[self.random.below(TRACKS.len() as u64) as usize];
        self.back_up_to(track, full)
    }

    pub(crate) fn back_up_to(&mut self, track: (&str, &str), full: bool) -> Result<()> {
        let order = Order {
            full,
            ..self.order_to(track)?
        };
        let backup = self.site.backup(&order)?;
        self.commands = self.proxy.commands().len() as u64;
        self.littered = false;
        let new = self.take_in(&order)?;
        ensure!(new.as_ref() == Some(&backup.id), "listed {new:?}");
        self.check_tracking(&backup.id, &order)
    }

    /// Lets a backup run for a moment, disturbs it, and sees what came of it. Where it was not killed, nothing of its own
    /// is left; what a dead one had left before may be, if it did not come to that.
    pub(crate) fn disturb(
        &mut self,
        ended: Ended,
        how: impl FnOnce(&Running, &mut Random) -> Result<()>,
    ) -> Result<()> {
        let order = self.order()?;
        let litter = self.litter()?;
        let moment = Duration::from_millis(self.random.below(LONG_ENOUGH));
        let running = self.site.backup_command(&order).start()?;
        std::thread::sleep(moment);
        how(&running, &mut self.random)?;
        let outcome = running.finish()?;
        let through = outcome.code() == Some(0);
        match ended {
            _ if through => {}
            Ended::Killed => ensure!(outcome.signal() == Some(9), "{outcome:?}"),
            // Or by the cancel's SIGINT itself, before the job listened: it had done nothing yet.
            Ended::Failed => ensure!(
                matches!(outcome.code(), Some(1 | 130)) || outcome.signal() == Some(2),
                "{outcome:?}"
            ),
        }
        let killed = outcome.signal().is_some();
        self.littered |= killed;
        let new = self.take_in(&order)?;
        ensure!(killed || through == new.is_some(), "{new:?}: {outcome:?}");
        if !killed {
            self.check_nothing_new(&litter, &outcome)?;
        }
        Ok(())
    }

    /// Kills a job while one of its commands waits, before QEMU has it or before the job has its answer.
    pub(crate) fn kill_at_command(&mut self) -> Result<()> {
        let order = self.order()?;
        self.inject(What::Hold);
        let running = self.site.backup_command(&order).start()?;
        let pid = running.process().pid;
        let held = eventually("the command, or the end", SOON, || {
            if let Ok(held) = self.proxy.wait_held(Duration::from_millis(1)) {
                return Ok(Some(Some(held)));
            }
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
            Ok(stat.contains(") Z ").then_some(None))
        })?;
        if let Some(held) = held {
            let outcome = running.kill()?;
            ensure!(outcome.signal() == Some(9), "{outcome:?}");
            held.cut();
            self.littered = true;
        } else {
            drop(running.finish()?.assert_success());
            self.littered = false;
        }
        self.take_in(&order).map(drop)
    }

    /// The monitor goes away under a job; a new connection can be made at once.
    pub(crate) fn cut_monitor(&mut self) -> Result<()> {
        let order = self.order()?;
        let litter = self.litter()?;
        self.inject(What::Cut);
        let outcome = self.site.backup_command(&order).run()?;
        let new = self.take_in(&order)?;
        let through = outcome.code() == Some(0);
        ensure!(through || outcome.code() == Some(1), "{outcome:?}");
        ensure!(through == new.is_some(), "{new:?}: {outcome:?}");
        self.check_nothing_new(&litter, &outcome)
    }

    fn inject(&mut self, what: What) {
        let at = At::Number(1 + self.random.below(self.commands.max(1)) as usize);
        let stage = match self.random.below(2) {
            0 => Stage::BeforeQemu,
            _ => Stage::BeforeAnswer,
        };
        self.proxy.inject(Fault { at, stage, what });
    }

    /// `fleecebox recover`, whether there is something or not.
    pub(crate) fn recover(&mut self) -> Result<()> {
        let order = self.order()?;
        let command = self.within(&["recover"], &order);
        command.run()?.assert_success();
        self.littered = false;
        self.check_clean().map(drop)
    }

    /// A command on the order's VM, archive and fleecing folder.
    fn within(&self, arguments: &[&str], order: &Order) -> Fleecebox {
        let command = self.site.command(arguments).arg(&order.vm);
        let command = command.arg("--qmp").arg(&order.qmp);
        let command = command.arg("--archive").arg(&order.archive);
        command.arg("--fleecing").arg(self.site.path("fleecing"))
    }

    pub(crate) fn restore_another(&mut self) -> Result<()> {
        match self.kept.len() as u64 {
            0 => Ok(()),
            some => {
                let number = self.random.below(some) as usize;
                self.compare(number)
            }
        }
    }

    pub(crate) fn restart_qemu(&mut self) -> Result<()> {
        // What a dead job left would hold it up.
        if self.littered {
            self.recover()?;
        }
        self.while_off(|_| Ok(()))
    }

    pub(crate) fn kill_qemu(&mut self) -> Result<()> {
        self.writers.clear();
        self.daemon.kill()?;
        self.go_on()
    }

    fn go_on(&mut self) -> Result<()> {
        self.daemon.start_again()?;
        self.images.iter_mut().for_each(Images::restarted);
        self.before = QemuState::read(self.daemon.monitors())?;
        self.start_writers()
    }

    /// All that is kept restores once more, after all that happened since.
    pub(crate) fn end(mut self) -> Result<()> {
        self.back_up(false)?;
        for number in 0..self.kept.len() {
            self.compare(number)?;
        }
        for writer in self.writers.drain(..) {
            writer.stop()?;
        }
        Ok(())
    }

    /// What is in the order's archive since the last time: at most one, and it is right. Returns its id.
    fn take_in(&mut self, order: &Order) -> Result<Option<String>> {
        self.daemon.check_alive()?;
        self.proxy.wait_for_clients_to_go()?;
        let references = self.proxy.references()?;
        let listed = self.site.list(&order.archive)?;
        let new: Vec<_> = listed
            .into_iter()
            .filter(|id| !self.ids.contains(id))
            .collect();
        let id = match &new[..] {
            [] => return Ok(None),
            [id] => id.clone(),
            _ => bail!("more than one new backup: {new:?}"),
        };
        self.ids.insert(id.clone());
        self.counts.committed += 1;
        let known = self.keep(order, &id, references)?;
        if self.kept.len() == KEPT {
            let number = self.random.below(KEPT as u64) as usize;
            let old = self.kept.swap_remove(number);
            fs::remove_dir_all(self.site.path("kept").join(old.id))?;
        }
        self.kept.push(known);
        self.compare(self.kept.len() - 1)?;
        Ok(Some(id))
    }

    /// Copies the references: they go with the proxy.
    fn keep(&self, order: &Order, id: &str, references: Vec<ReferenceImage>) -> Result<Known> {
        let nodes = self.nodes(order);
        let devices: Vec<_> = references.iter().map(|image| &image.device).collect();
        ensure!(
            devices == nodes.iter().map(|(_, node)| node).collect::<Vec<_>>(),
            "{id} is committed, and QEMU's own copies are of {devices:?}"
        );
        let folder = self.site.path("kept").join(id);
        fs::create_dir(&folder)?;
        let mut volumes = Vec::new();
        for (reference, (volume, _)) in references.into_iter().zip(nodes) {
            let copy = folder.join(&volume);
            fs::copy(&reference.path, &copy)?;
            volumes.push((volume, copy));
        }
        Ok(Known {
            archive: order.archive.clone(),
            id: id.into(),
            volumes,
        })
    }

    /// Verifies and restores one of those that are kept.
    fn compare(&mut self, number: usize) -> Result<()> {
        let known = &self.kept[number];
        self.site.verify(&known.archive, &known.id)?;
        let restored = self.site.restore(&known.archive, &known.id)?;
        for (volume, copy) in &known.volumes {
            compare::same_bytes(copy, &restored.join(format!("{volume}.raw")))
                .with_context(|| format!("{volume} of backup {}", known.id))?;
        }
        self.counts.compared += 1;
        Ok(fs::remove_dir_all(restored)?)
    }

    /// What jobs have left in QEMU, but for bitmaps, and in the fleecing folder.
    fn litter(&self) -> Result<BTreeSet<String>> {
        let state = QemuState::read(self.daemon.monitors())?;
        let mut litter = BTreeSet::from_iter(state.differences(&self.before, |_| true));
        let images = self.site.fleecing_images()?.into_iter();
        litter.extend(images.map(|image| image.display().to_string()));
        Ok(litter)
    }

    /// A job that ended by itself has left nothing; if it failed, dead ones before it may have, as it may have been cut
    /// off before it had cleaned up after them.
    fn check_nothing_new(&mut self, before: &BTreeSet<String>, outcome: &Outcome) -> Result<()> {
        let litter = self.litter()?;
        let may_be = match outcome.code() {
            Some(0) => &BTreeSet::new(),
            _ => before,
        };
        let left: Vec<_> = litter.difference(may_be).collect();
        ensure!(left.is_empty(), "left: {left:#?}: {outcome:?}");
        self.littered = !litter.is_empty();
        Ok(())
    }

    /// Nothing is left in QEMU but bitmaps, and nothing in the fleecing folder.
    fn check_clean(&self) -> Result<QemuState> {
        let state = QemuState::read(self.daemon.monitors())?;
        let left = state.differences(&self.before, |_| true);
        ensure!(left.is_empty(), "left in QEMU: {left:#?}");
        self.site.check_no_fleecing_images()?;
        Ok(state)
    }

    /// After a backup that nobody disturbed there is just its own bitmap on each disk, but for those of the other track:
    /// only a run that sees their archive can settle them.
    fn check_tracking(&self, id: &str, order: &Order) -> Result<()> {
        let state = self.check_clean()?;
        let archive = fs::read_to_string(order.archive.join("fleecebox-archive.json"))?;
        let archive: serde_json::Value = serde_json::from_str(&archive)?;
        let archive = archive["id"].as_str().context("an archive without an id")?;
        let names = format!("fleecebox:{archive}:{}:", namespace(order));
        for (_, disk) in self.nodes(order) {
            let ours: Vec<_> = state
                .bitmaps()
                .filter(|bitmap| bitmap.node == disk && bitmap.name.starts_with(&names))
                .collect();
            let [bitmap] = ours[..] else {
                bail!("not one bitmap on {disk}: {ours:#?}");
            };
            let sound = bitmap.recording && !bitmap.inconsistent;
            ensure!(
                sound && bitmap.name.contains(&format!(":{id}:")),
                "{bitmap}"
            );
        }
        Ok(())
    }
}
