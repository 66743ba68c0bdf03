//! All there is, and what can happen to it next.

use crate::Bug;
use crate::archive::{Archive, Commit};
use crate::qemu::{BLOCKS, Format, Qemu};
use crate::run::{self, Do, Job, Outcome};
use fleecebox::job::journal::Step;
use stateright::{Model, Property};
use std::fmt;

/// How much may happen. Within it, everything is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// One or two.
    pub archives: u8,
    /// Runs of the job, whatever becomes of them.
    pub runs: u8,
    /// Blocks that the guest writes.
    pub writes: u8,
    /// Crashes, lost answers, failures, restarts and losses together.
    pub faults: u8,
    /// Whether runs with `--full` are among them.
    pub full: bool,
    /// Overlays put, merged, pulled and thrown away, and templates swapped, between two runs.
    pub images: u8,
}

/// The model.
#[derive(Debug, Clone)]
pub struct Protocol {
    /// How much may happen.
    pub bounds: Bounds,
    /// What is wrong on purpose.
    pub bug: Option<Bug>,
}

/// A state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// QEMU, with the disk.
    pub(crate) qemu: Qemu,
    /// The archives.
    pub(crate) archives: Vec<Archive>,
    /// The one job; the lock of the VM keeps others away.
    pub(crate) job: Option<Job>,
    /// The archive and the backup that the journal names.
    pub(crate) journal: Option<(u8, u8)>,
    /// The next backup's id.
    pub(crate) next_id: u8,
    /// What may still happen.
    pub(crate) rest: Bounds,
    /// Whether a job has died. Nobody in the model looks at it.
    pub(crate) crashed: bool,
    /// A disk was read in full although nothing excused it. Nobody in the model looks at it.
    pub(crate) needless_full: bool,
    /// What is wrong on purpose.
    pub(crate) bug: Option<Bug>,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A run begins.
    Run {
        /// Its archive.
        archive: u8,
        /// `--full`
        full: bool,
    },
    /// The job does its next step.
    Step(Outcome),
    /// QEMU carries out the next action of a transaction.
    Advance,
    /// The guest writes a block.
    Write(usize),
    /// The job dies.
    Crash,
    /// QEMU quits and starts again.
    Restart,
    /// QEMU is killed and starts again.
    Kill,
    /// An overlay is put above the image, with the names of its bitmaps or without.
    Overlay {
        /// As libvirt does it.
        carrying: bool,
    },
    /// The overlay is merged into the image below it.
    CommitOverlay,
    /// The overlay is thrown away.
    DropOverlay,
    /// All that is below is pulled into the image.
    Pull,
    /// Another template takes the place of the one that is there.
    SwapTemplate,
    /// A rename that was sent happens.
    Land {
        /// In this archive.
        archive: u8,
        /// Of this backup's manifest.
        id: u8,
    },
    /// The archive's machine loses power, and with it what was not synced.
    PowerLoss {
        /// This one.
        archive: u8,
    },
    /// A backup that no other builds on is removed.
    Disappear {
        /// From this archive.
        archive: u8,
        /// This one.
        id: u8,
    },
}

/// Each committed backup restores to the disk as of its point in time.
pub const RESTORES: &str = "every committed backup restores to its point in time";
/// What failed or died costs no later backup its base.
pub const TRACKED: &str = "no failure costs the tracking";
/// Once recovery is over, an archive has one bitmap that records.
pub const ONE_RECORDS: &str = "after recovery one bitmap of an archive records";
/// A run that has nothing to complain of leaves nothing but its bitmap.
pub const NOTHING_LEFT: &str = "a run that ends well leaves one bitmap and nothing else";
/// The model gets somewhere.
pub const INCREMENTALS: &str = "an incremental on an incremental commits after a crash";

impl World {
    fn archive_ids(&self) -> impl Iterator<Item = u8> {
        0..self.rest.archives
    }

    /// Everything that may happen once the bounds do not count.
    fn faults(&self, events: &mut Vec<Event>) {
        if self.job.is_some() {
            events.push(Event::Crash);
        }
        if self.qemu.transaction.is_empty() {
            events.extend([Event::Restart, Event::Kill]);
        }
        for archive in self.archive_ids() {
            let held = &self.archives[usize::from(archive)];
            let in_use = self.job.as_ref().is_some_and(|job| job.archive == archive);
            let volatile = held
                .backups
                .iter()
                .any(|backup| backup.commit == Commit::Visible);
            // A job whose archive fails is a job that fails or dies before.
            if volatile && !in_use {
                events.push(Event::PowerLoss { archive });
            }
            let under_job = |id| {
                let backup = self.job.as_ref().and_then(|job| job.backup.as_ref());
                self.bug != Some(Bug::BaseRemovedUnderJob)
                    && backup
                        .is_some_and(|backup| backup.choice.base == Some(id) || backup.id == id)
            };
            for backup in held.committed() {
                if !held.is_base(backup.id) && !under_job(backup.id) {
                    let id = backup.id;
                    events.push(Event::Disappear { archive, id });
                }
            }
        }
    }

    /// What happens to the images of a disk that no point in time is held of.
    fn image_events(&self, events: &mut Vec<Event>) {
        let quiet = self.job.is_none() && self.qemu.snapshot.is_none();
        if !quiet || self.qemu.format != Format::Qcow2 || self.rest.images == 0 {
            return;
        }
        events.extend([true, false].map(|carrying| Event::Overlay { carrying }));
        if !self.qemu.below.is_empty() {
            events.extend([Event::CommitOverlay, Event::DropOverlay]);
        }
        if self.qemu.template.is_some() {
            events.extend([Event::Pull, Event::SwapTemplate]);
        }
    }

    /// Tracking may be lost now, in every archive or in one.
    fn excuse(&mut self, archive: Option<u8>) {
        for (id, held) in (0..).zip(&mut self.archives) {
            held.tracked &= archive.is_some_and(|archive| archive != id);
        }
    }

    fn happen(&mut self, event: &Event) {
        match *event {
            Event::Run { archive, full } => {
                self.rest.runs -= 1;
                self.job = Some(Job::new(archive, full));
            }
            Event::Step(outcome) => {
                self.rest.faults -= u8::from(outcome != Outcome::Answered);
                run::step(self, outcome);
            }
            Event::Advance => self.qemu.advance(),
            Event::Write(block) => {
                self.rest.writes -= 1;
                self.qemu.write(block);
            }
            Event::Overlay { carrying } => {
                self.rest.images -= 1;
                // What stopped with a job that died is not carried.
                let bitmaps = &self.qemu.bitmaps;
                if !carrying || bitmaps.iter().any(|bitmap| !bitmap.recording) {
                    self.excuse(None);
                }
                self.qemu.put_overlay(carrying);
            }
            Event::CommitOverlay | Event::DropOverlay | Event::Pull | Event::SwapTemplate => {
                self.rest.images -= 1;
                self.excuse(None);
                match event {
                    Event::CommitOverlay => self.qemu.commit_overlay(),
                    Event::DropOverlay => self.qemu.drop_overlay(),
                    Event::Pull => self.qemu.pull(),
                    _ => self.qemu.swap_template(),
                }
            }
            Event::Land { archive, id } => {
                for backup in &mut self.archives[usize::from(archive)].backups {
                    if backup.id == id {
                        backup.commit = Commit::Visible;
                    }
                }
            }
            Event::Crash => {
                self.rest.faults -= 1;
                self.crashed = true;
                self.job = None;
            }
            Event::Restart => {
                self.rest.faults -= 1;
                self.qemu.restart();
                if self.qemu.format == Format::Raw {
                    self.excuse(None);
                }
                self.disconnect();
            }
            Event::Kill => {
                self.rest.faults -= 1;
                self.qemu.kill();
                self.excuse(None);
                self.disconnect();
            }
            Event::PowerLoss { archive } => {
                self.rest.faults -= 1;
                self.archives[usize::from(archive)].lose(|backup| backup.commit == Commit::Visible);
                self.excuse(Some(archive));
            }
            Event::Disappear { archive, id } => {
                self.rest.faults -= 1;
                self.archives[usize::from(archive)].lose(|backup| backup.id == id);
                self.excuse(Some(archive));
            }
        }
    }

    fn disconnect(&mut self) {
        if let Some(job) = &mut self.job {
            job.connected = false;
        }
    }

    fn restores(&self) -> bool {
        self.archives.iter().all(|held| {
            held.committed()
                .all(|backup| held.restore(backup) == Some(backup.point_in_time))
        })
    }

    /// How many bitmaps of `archive` record.
    /// Of `archive`, but for those of backups that left it, which stay until the next commit.
    fn recording(&self, archive: u8) -> usize {
        let gone = &self.archives[usize::from(archive)].gone;
        let own = |bitmap: &&crate::qemu::Bitmap| {
            bitmap.name.archive == archive && !gone.contains(&bitmap.name.backup)
        };
        self.qemu
            .bitmaps
            .iter()
            .filter(own)
            .filter(|bitmap| bitmap.recording)
            .count()
    }

    /// A run with `--full`, or in full since the images changed, that dies after its commit leaves two that are both sound,
    /// until the next commit.
    fn one_records(&self) -> bool {
        let recovered = self
            .job
            .as_ref()
            .filter(|job| matches!(job.todo.first(), Some(Do::Choose)));
        let excused = self.rest.full || !self.qemu.is_as_made();
        excused || recovered.is_none_or(|job| self.recording(job.archive) <= 1)
    }

    fn nothing_left(&self) -> bool {
        let ending = self
            .job
            .as_ref()
            .filter(|job| matches!(job.todo.first(), Some(Do::End)) && !job.left && job.connected);
        ending.is_none_or(|job| {
            let clean = self.qemu.snapshot.is_none() && self.qemu.export.is_none();
            let own = |bitmap: &&crate::qemu::Bitmap| bitmap.name.archive == job.archive;
            let failed = job.backup.as_ref().is_some_and(|backup| backup.failed);
            let bitmaps = self.qemu.bitmaps.iter().filter(own).count();
            clean && (failed || !self.qemu.transaction.is_empty() || bitmaps == 1)
        })
    }

    fn incremental_on_incremental(&self) -> bool {
        self.archives.iter().any(|held| {
            held.committed().any(|backup| {
                let base = backup.base.and_then(|base| held.manifest(base));
                backup.after_crash
                    && base.is_some_and(|base| base.after_crash && base.base.is_some())
            })
        })
    }
}

impl Model for Protocol {
    type State = World;
    type Action = Event;

    fn init_states(&self) -> Vec<World> {
        [Format::Raw, Format::Qcow2]
            .map(|format| World {
                qemu: Qemu::new(format),
                archives: vec![Archive::default(); usize::from(self.bounds.archives)],
                job: None,
                journal: None,
                next_id: 1,
                rest: self.bounds,
                crashed: false,
                needless_full: false,
                bug: self.bug,
            })
            .into()
    }

    fn actions(&self, world: &World, events: &mut Vec<Event>) {
        let carrying_out = !world.qemu.transaction.is_empty();
        if carrying_out {
            events.push(Event::Advance);
        } else if let Some(job) = &world.job {
            let affordable =
                |outcome: &&Outcome| **outcome == Outcome::Answered || world.rest.faults > 0;
            events.extend(
                job.outcomes()
                    .iter()
                    .filter(affordable)
                    .map(|&outcome| Event::Step(outcome)),
            );
        } else if world.rest.runs > 0 {
            // The first archive to be used may as well be the first.
            let archives = if world.next_id == 1 {
                1
            } else {
                world.rest.archives
            };
            for archive in 0..archives {
                events.push(Event::Run {
                    archive,
                    full: false,
                });
                if world.rest.full {
                    events.push(Event::Run {
                        archive,
                        full: true,
                    });
                }
            }
        }
        if world.rest.writes > 0 && !world.qemu.drained {
            // And the first block to be written.
            let blocks = if world.qemu.disk == [0; BLOCKS] {
                1
            } else {
                BLOCKS
            };
            events.extend((0..blocks).map(Event::Write));
        }
        for archive in world.archive_ids() {
            for backup in &world.archives[usize::from(archive)].backups {
                if backup.commit == Commit::InFlight {
                    let id = backup.id;
                    events.push(Event::Land { archive, id });
                }
            }
        }
        if world.rest.faults > 0 {
            world.faults(events);
        }
        world.image_events(events);
    }

    fn next_state(&self, world: &World, event: Event) -> Option<World> {
        let mut next = world.clone();
        next.happen(&event);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(RESTORES, |_, world: &World| world.restores()),
            Property::always(TRACKED, |_, world: &World| !world.needless_full),
            Property::always(ONE_RECORDS, |_, world: &World| world.one_records()),
            Property::always(NOTHING_LEFT, |_, world: &World| world.nothing_left()),
            Property::sometimes(INCREMENTALS, |_, world: &World| {
                world.incremental_on_incremental()
            }),
        ]
    }
}

impl World {
    /// `event`, as it happens in this state, for people.
    pub fn tell(&self, event: &Event) -> String {
        let letter = |archive: u8| char::from(b'A' + archive);
        match event {
            Event::Run { archive, full } => {
                let full = if *full { " in full" } else { "" };
                format!("a run for archive {} begins{full}", letter(*archive))
            }
            Event::Step(outcome) => {
                let job = self.job.as_ref();
                let step = job.and_then(|job| job.step).map_or("recover", Step::name);
                let next = job
                    .and_then(|job| job.todo.first())
                    .map_or(String::new(), Do::to_string);
                match outcome {
                    Outcome::Answered => format!("{step}: {next}"),
                    outcome => format!("{step}: {next}, {outcome:?}"),
                }
            }
            Event::Advance => match self.qemu.transaction.first() {
                Some(action) => format!("  QEMU: {action}"),
                None => String::new(),
            },
            Event::Write(block) => format!("THE GUEST WRITES block {block}"),
            Event::Crash => "THE JOB DIES".into(),
            Event::Restart => "QEMU QUITS AND STARTS AGAIN".into(),
            Event::Kill => "QEMU IS KILLED AND STARTS AGAIN".into(),
            Event::Overlay { carrying: true } => {
                "AN OVERLAY IS PUT above the image, with its bitmaps' names".into()
            }
            Event::Overlay { carrying: false } => "AN OVERLAY IS PUT above the image".into(),
            Event::CommitOverlay => "THE OVERLAY IS MERGED into the image below".into(),
            Event::DropOverlay => "THE OVERLAY IS THROWN AWAY".into(),
            Event::Pull => "ALL THAT IS BELOW IS PULLED into the image".into(),
            Event::SwapTemplate => "ANOTHER TEMPLATE TAKES ITS PLACE".into(),
            Event::Land { archive, id } => {
                format!(
                    "THE MANIFEST of backup {id} APPEARS LATE in archive {}",
                    letter(*archive)
                )
            }
            Event::PowerLoss { archive } => format!("ARCHIVE {} LOSES POWER", letter(*archive)),
            Event::Disappear { archive, id } => {
                format!("BACKUP {id} DISAPPEARS from archive {}", letter(*archive))
            }
        }
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.qemu)?;
        for (letter, held) in ('A'..).zip(&self.archives) {
            for backup in &held.backups {
                write!(f, "; {letter} holds {backup}")?;
                if let (true, restored) = (backup.commit != Commit::InFlight, held.restore(backup))
                    && restored != Some(backup.point_in_time)
                {
                    write!(
                        f,
                        " WHICH RESTORES {restored:?} INSTEAD OF {:?}",
                        backup.point_in_time
                    )?;
                }
            }
        }
        Ok(())
    }
}
