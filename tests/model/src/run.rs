//! One run of the job process: `recover::recover`, then `backup::backup`, command by command.
//!
//! What is left to do is a list, in the order of the code; an error changes the list as the code's `?` and `left` do.

use crate::Bug;
use crate::archive::{Backup, Commit};
use crate::decision::{self, Choice, Remedy};
use crate::qemu::{self, Action, BLOCKS, BitmapName, BitmapPlan, Content};
use crate::world::World;
use fleecebox::job::journal::Step;
use std::fmt;

/// One command to QMP, or one step of the archive: between any two of them the job can die.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Do {
    /// `removal::remove`: `block-export-del`.
    RemoveExport,
    /// `removal::remove`: `block-job-cancel`, and with it the snapshot.
    RemoveJob,
    /// `recover::settle_bitmaps`, up to its decision: `bitmap::find`, `base::remedies`.
    SettleBitmaps,
    /// `bitmap::accept`
    Accept(BitmapPlan),
    /// `bitmap::back_out`
    BackOut(BitmapPlan),
    /// `bitmap::remove`
    Remove(BitmapName),
    /// `recover::discard_backup`, and the journal cleared.
    DiscardBackup,
    /// `base::choose`, then the journal's first record.
    Choose,
    /// `snapshot::make`: the transaction.
    Transaction,
    /// `snapshot::make`: the exports.
    AddExport,
    /// `Backup::read_all`, with the check at its end that the snapshot held.
    ReadAll,
    /// `BackupWriter::commit`: the manifest's rename.
    Rename,
    /// `BackupWriter::commit`: its directory synced.
    Sync,
    /// The journal reaches `Step::Committed`.
    ReachCommitted,
    /// `Backup::make`'s end: what was stored is removed where it failed, the journal cleared where nothing is left.
    End,
}

impl fmt::Display for Do {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept(plan) => match plan.old() {
                Some(old) => write!(f, "accept: remove {old}"),
                None => f.write_str("accept: nothing to remove"),
            },
            Self::BackOut(BitmapPlan::New { name }) => write!(f, "back_out: remove {name}"),
            Self::BackOut(BitmapPlan::Reuse { old, new }) => {
                write!(f, "back_out: pour {new} back into {old}")
            }
            Self::Remove(name) => write!(f, "remove {name}"),
            other => write!(f, "{other:?}"),
        }
    }
}

/// How a step ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// As it should, unless it was refused; the job knows which.
    Answered,
    /// It did not happen, and the job is told so.
    Failed,
    /// It happened, and the job is told that it failed.
    AnswerLost,
    /// The rename was sent, may happen at any time later, and the job is told that this is unknown.
    MayHappenLater,
}

/// The backup that a run makes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct UnderWay {
    /// Its id.
    pub id: u8,
    /// What its disk builds on.
    pub choice: Choice,
    /// The images that the disk is made of.
    pub images: Vec<u8>,
    /// What was read.
    pub blocks: [Option<u8>; BLOCKS],
    /// The snapshot's content, once it is read. Nobody in the model looks at it.
    pub point_in_time: Content,
    /// Whether some job had died before.
    pub after_crash: bool,
    /// The commit was answered by an error that leaves open whether it happened.
    pub commit_unknown: bool,
    /// There is an error to return.
    pub failed: bool,
}

/// The job process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Job {
    /// Where its backup goes.
    pub archive: u8,
    /// `--full`
    pub full: bool,
    /// The monitor's connection is that of the QEMU that runs.
    pub connected: bool,
    /// How far it got; nothing during recovery.
    pub step: Option<Step>,
    /// What is left to do.
    pub todo: Vec<Do>,
    /// From [`Do::Choose`] on.
    pub backup: Option<UnderWay>,
    /// Something could not be cleaned up.
    pub left: bool,
}

impl Job {
    /// A run that begins.
    pub(crate) fn new(archive: u8, full: bool) -> Self {
        let todo = vec![
            Do::RemoveExport,
            Do::RemoveJob,
            Do::SettleBitmaps,
            Do::DiscardBackup,
            Do::Choose,
        ];
        Self {
            archive,
            full,
            connected: true,
            step: None,
            todo,
            backup: None,
            left: false,
        }
    }

    /// What the next step may come to.
    pub(crate) fn outcomes(&self) -> &'static [Outcome] {
        use Outcome::{AnswerLost, Answered, Failed, MayHappenLater};
        match self.todo.first() {
            // The queries and the archive's reads change nothing: their failure is the run's end, as its death is.
            Some(
                Do::SettleBitmaps | Do::DiscardBackup | Do::Choose | Do::ReachCommitted | Do::End,
            )
            | None => &[Answered],
            Some(Do::ReadAll | Do::Sync) => &[Answered, Failed],
            Some(Do::Rename) => &[Answered, Failed, AnswerLost, MayHappenLater],
            // Nothing to remove is nothing to fail.
            Some(Do::Accept(plan)) if plan.old().is_none() => &[Answered],
            Some(_) => &[Answered, Failed, AnswerLost],
        }
    }
}

/// A step's error, as the job sees it.
struct Error;

/// Does the next step of the world's job.
pub(crate) fn step(world: &mut World, outcome: Outcome) {
    let Some(mut job) = world.job.take() else {
        return;
    };
    let next = job.todo.remove(0);
    let result = attempt(world, &mut job, &next, outcome);
    let goes_on = match result {
        Ok(goes_on) => goes_on,
        Err(Error) => after_error(&mut job, &next, world.bug),
    };
    if goes_on {
        world.job = Some(job);
    }
}

/// Whether the run goes on.
fn attempt(world: &mut World, job: &mut Job, next: &Do, outcome: Outcome) -> Result<bool, Error> {
    let archive = job.archive;
    let held = usize::from(archive);
    match next {
        Do::RemoveExport => command(job, outcome, || {
            world.qemu.export = None;
            Ok(())
        })?,
        Do::RemoveJob => command(job, outcome, || {
            world.qemu.snapshot = None;
            Ok(())
        })?,
        Do::SettleBitmaps => {
            connected(job)?;
            believe(world, archive);
            let dead = world.journal.filter(|&(owner, _)| owner == archive);
            let dead = dead.map(|(_, backup)| backup);
            let (qemu, archives) = (&world.qemu, &world.archives);
            let remedies = decision::remedies(archive, qemu, &archives[held], dead, world.bug);
            let todo = remedies.into_iter().map(|remedy| match remedy {
                Remedy::Accept(plan) => Do::Accept(plan),
                Remedy::BackOut(plan) => Do::BackOut(plan),
            });
            job.todo.splice(0..0, todo);
        }
        Do::Accept(plan) => {
            if let Some(old) = plan.old() {
                remove(world, job, old, outcome)?;
            }
        }
        Do::Remove(name) => remove(world, job, *name, outcome)?,
        Do::BackOut(BitmapPlan::New { name }) => remove(world, job, *name, outcome)?,
        Do::BackOut(BitmapPlan::Reuse { old, new }) => {
            connected(job)?;
            let before = world.qemu.bitmap(*old).copied();
            let since = world.qemu.bitmap(*new).copied();
            match (before, since) {
                (Some(before), None) if before.recording && !before.inconsistent => {}
                (Some(before), Some(since))
                    if since.recording && !since.inconsistent && !before.inconsistent =>
                {
                    let actions = qemu::pour_back(*old, *new, world.bug);
                    command(job, outcome, || {
                        world.qemu.begin(actions).map_err(|_| Error)
                    })?;
                }
                _ => {
                    job.todo.splice(0..0, [Do::Remove(*new), Do::Remove(*old)]);
                }
            }
        }
        Do::DiscardBackup => {
            if let Some((owner, id)) = world.journal
                && owner == archive
            {
                world.archives[held]
                    .backups
                    .retain(|backup| backup.id != id || backup.commit != Commit::InFlight);
            }
            world.journal = None;
        }
        Do::Choose => {
            connected(job)?;
            believe(world, archive);
            let id = world.next_id;
            world.next_id += 1;
            let choice = decision::choose(
                archive,
                &world.qemu,
                &world.archives[held],
                id,
                job.full,
                world.bug,
            );
            world.needless_full |=
                world.archives[held].tracked && choice.base.is_none() && !job.full;
            job.backup = Some(UnderWay {
                id,
                choice,
                images: world.qemu.chain(),
                blocks: [None; BLOCKS],
                point_in_time: [0; BLOCKS],
                after_crash: world.crashed,
                commit_unknown: false,
                failed: false,
            });
            world.journal = Some((archive, id));
            job.step = Some(Step::Snapshot);
            job.todo = vec![Do::Transaction, Do::AddExport, Do::ReadAll];
        }
        Do::Transaction => {
            let backup = under_way(job)?;
            let Choice { bitmap, stale, .. } = &backup.choice;
            let actions = qemu::point_in_time(&world.qemu, bitmap, stale, world.bug);
            command(job, outcome, || {
                world.qemu.begin(actions).map_err(|_| Error)
            })?;
        }
        Do::AddExport => {
            let old = under_way(job)?.choice.bitmap.old();
            command(job, outcome, || {
                world.qemu.export = Some(old);
                Ok(())
            })?;
            job.step = Some(Step::Running);
        }
        Do::ReadAll => {
            connected(job)?;
            let (Outcome::Answered, Some(content), Some(_)) =
                (outcome, world.qemu.snapshot, world.qemu.export)
            else {
                return Err(Error);
            };
            let old = under_way(job)?.choice.bitmap.old();
            let dirty = match old {
                Some(old) => world.qemu.bitmap(old).ok_or(Error)?.dirty,
                None => qemu::Dirty::MAX,
            };
            let backup = job.backup.as_mut().ok_or(Error)?;
            for (block, read) in backup.blocks.iter_mut().enumerate() {
                *read = (dirty >> block & 1 == 1).then_some(content[block]);
            }
            backup.point_in_time = content;
            release(job, world.bug);
        }
        Do::Rename => {
            job.step = Some(Step::Committing);
            let backup = job.backup.as_mut().ok_or(Error)?;
            let commit = match outcome {
                Outcome::Failed => return Err(Error),
                Outcome::MayHappenLater => Commit::InFlight,
                Outcome::Answered | Outcome::AnswerLost => Commit::Visible,
            };
            backup.commit_unknown = outcome != Outcome::Answered;
            world.archives[held].backups.push(Backup {
                id: backup.id,
                base: backup.choice.base,
                images: backup.images.clone(),
                blocks: backup.blocks,
                point_in_time: backup.point_in_time,
                after_crash: backup.after_crash,
                commit,
            });
            if backup.commit_unknown {
                return Err(Error);
            }
        }
        Do::Sync => {
            let backup = job.backup.as_mut().ok_or(Error)?;
            if outcome != Outcome::Answered {
                backup.commit_unknown = true;
                return Err(Error);
            }
            world.archives[held].make_durable(backup.id);
        }
        Do::ReachCommitted => {
            // Where QEMU went away meanwhile, its bitmaps may have gone with it.
            world.archives[held].tracked |= job.connected;
            switch_bitmaps(job);
            if world.bug == Some(Bug::OldKeptAfterCommit) {
                job.todo = vec![Do::End];
            }
        }
        Do::End => {
            if !job.left {
                world.journal = None;
            }
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the code does about an error of `what`: whether the run goes on.
fn after_error(job: &mut Job, what: &Do, bug: Option<Bug>) -> bool {
    let Some(backup) = &mut job.backup else {
        // Recovery ends with its first error; the journal stays as it was.
        return false;
    };
    match what {
        Do::Transaction | Do::AddExport => {
            // `snapshot::undo`
            backup.failed = true;
            let undo = Do::BackOut(backup.choice.bitmap);
            job.todo = vec![Do::RemoveExport, Do::RemoveJob, undo, Do::End];
        }
        Do::ReadAll => {
            backup.failed = true;
            release(job, bug);
        }
        Do::RemoveExport | Do::RemoveJob => job.left = true,
        Do::Rename | Do::Sync => {
            backup.failed = true;
            let believed = bug == Some(Bug::UnknownTakenForCommitted);
            match backup.commit_unknown {
                true if believed => {
                    backup.failed = false;
                    switch_bitmaps(job);
                }
                true => {
                    job.left = true;
                    job.todo = vec![Do::End];
                }
                false => switch_bitmaps(job),
            }
        }
        // Settling one disk's bitmaps ends with its first error.
        _ => {
            job.left = true;
            job.todo = vec![Do::End];
        }
    }
    true
}

/// `Step::Releasing`, and what comes after it.
fn release(job: &mut Job, bug: Option<Bug>) {
    let Some(backup) = &job.backup else { return };
    job.step = Some(Step::Releasing);
    job.todo = vec![Do::RemoveExport, Do::RemoveJob];
    if backup.failed {
        let settle = Do::BackOut(backup.choice.bitmap);
        job.todo.extend([settle, Do::End]);
    } else {
        if bug == Some(Bug::OldRemovedBeforeCommit) {
            job.todo.push(Do::Accept(backup.choice.bitmap));
        }
        job.todo.extend([Do::Rename, Do::Sync, Do::ReachCommitted]);
    }
}

/// `Backup::settle_bitmaps`, where it is known whether the backup committed.
fn switch_bitmaps(job: &mut Job) {
    let Some(backup) = &job.backup else { return };
    job.step = Some(Step::SwitchingBitmaps);
    job.todo = match backup.failed {
        true => vec![Do::BackOut(backup.choice.bitmap)],
        false => [Do::Accept(backup.choice.bitmap)]
            .into_iter()
            .chain(backup.choice.stale.iter().copied().map(Do::Remove))
            .collect(),
    };
    job.todo.push(Do::End);
}

fn under_way(job: &Job) -> Result<&UnderWay, Error> {
    job.backup.as_ref().ok_or(Error)
}

fn connected(job: &Job) -> Result<(), Error> {
    job.connected.then_some(()).ok_or(Error)
}

/// A command to QMP that changes something.
fn command(
    job: &Job,
    outcome: Outcome,
    effect: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    connected(job)?;
    match outcome {
        Outcome::Answered => effect(),
        Outcome::AnswerLost | Outcome::MayHappenLater => effect().and(Err(Error)),
        Outcome::Failed => Err(Error),
    }
}

/// `bitmap::remove`: does nothing where it is gone already.
fn remove(world: &mut World, job: &Job, name: BitmapName, outcome: Outcome) -> Result<(), Error> {
    connected(job)?;
    if world.qemu.bitmap(name).is_none() {
        return Ok(());
    }
    command(job, outcome, || {
        world
            .qemu
            .begin(vec![Action::Remove(name)])
            .map_err(|_| Error)?;
        world.qemu.advance();
        Ok(())
    })
}

/// `recover::recorded`: a manifest is made durable before anything is concluded from it.
fn believe(world: &mut World, archive: u8) {
    if world.bug == Some(Bug::UnsyncedManifestBelieved) {
        return;
    }
    let archive = &mut world.archives[usize::from(archive)];
    let named: Vec<_> = world
        .qemu
        .bitmaps
        .iter()
        .map(|bitmap| bitmap.name.backup)
        .collect();
    for id in named {
        archive.make_durable(id);
    }
}
