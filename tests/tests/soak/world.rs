//! A storage daemon with disks that are written all the while, two archives, and all backups that are known to be
//! committed.

use anyhow::{Context, Result, bail, ensure};
use fleecebox_tests::{
    At, Disk, Fault, Fleecebox, Load, MIB, Order, Outcome, Proxy, QemuState, Random,
    ReferenceImage, Running, Site, Stage, StorageDaemon, What, Writer, compare, eventually,
};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// A provider, and the archive where its backups go.
const TRACKS: [(&str, &str); 2] = [("chunked", "archive"), ("image", "second")];

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
fn track(order: &Order) -> &str {
    let name = |(provider, archive): &(&'static str, &str)| {
        order.archive.ends_with(archive).then_some(*provider)
    };
    TRACKS.iter().find_map(name).unwrap_or_default()
}

pub(crate) struct World {
    site: Site,
    daemon: StorageDaemon,
    proxy: Proxy,
    before: QemuState,
    writers: Vec<Writer>,
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
        let order = self.site.order(&self.daemon, provider)?;
        Ok(Order {
            archive: self.site.path(archive),
            ..order.through(&self.proxy)
        })
    }

    /// A backup that nobody disturbs must go through.
    pub(crate) fn back_up(&mut self, full: bool) -> Result<()> {
        let track = TRACKS[self.random.below(TRACKS.len() as u64) as usize];
        self.back_up_to(track, full)
    }

    fn back_up_to(&mut self, track: (&str, &str), full: bool) -> Result<()> {
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
        self.writers.clear();
        self.daemon.quit()?;
        self.go_on()
    }

    pub(crate) fn kill_qemu(&mut self) -> Result<()> {
        self.writers.clear();
        self.daemon.kill()?;
        self.daemon.start_again()?;
        self.go_on()
    }

    fn go_on(&mut self) -> Result<()> {
        self.daemon.start_again()?;
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
        let devices: Vec<_> = references.iter().map(|image| &image.device).collect();
        ensure!(
            devices == order.disks.iter().collect::<Vec<_>>(),
            "{id} is committed, and QEMU's own copies are of {devices:?}"
        );
        let folder = self.site.path("kept").join(id);
        fs::create_dir(&folder)?;
        let mut volumes = Vec::new();
        for reference in references {
            let copy = folder.join(&reference.device);
            fs::copy(&reference.path, &copy)?;
            volumes.push((reference.device, copy));
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
        let namespace = format!(":{}:", track(order));
        for disk in &order.disks {
            let ours: Vec<_> = state
                .bitmaps()
                .filter(|bitmap| bitmap.node == *disk && bitmap.name.contains(&namespace))
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
