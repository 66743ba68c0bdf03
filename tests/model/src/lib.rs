//! The bitmap protocol, checked in every state that it can reach.
//!
//! What must never be lost rests on an agreement between three parties that can each fail on its own: QEMU, whose
//! bitmaps say what changed, the archive, which says what committed, and the job, which dies between any two of its
//! steps. This model puts them together, with a guest that writes at any moment, and a checker (`stateright`) that
//! walks through everything that can happen within [`Bounds`].
//!
//! # Read it beside the code
//! | here | there |
//! |---|---|
//! | `qemu.rs`: `Action`, `point_in_time`, `pour_back` | `qemu/src/snapshot/make.rs`: `freeze_disks`; `qemu/src/bitmap.rs`: `switch`, `pour_back` |
//! | `run.rs`: `Do` in the order of `Job::new`, `release`, `switch_bitmaps` | `job/recover.rs`: `recover`; `job/backup.rs`: `Attempt::make`; `job/point_in_time.rs`: `Prepared::settle` |
//! | `run.rs`: `after_error` | each `?` and each `left` of these |
//! | `decision.rs` | **is** `job/base.rs`: `choose`, `in_full` and `remedies` are called, not copied |
//! | `archive.rs`: `Commit` | `archive/backup.rs`: `BackupWriter::commit`, and its `CommitUnknown` |
//!
//! # What is modelled
//! - A disk of two blocks, raw (bitmaps are transient) or qcow2 (they are stored when QEMU quits). Each write raises
//!   the block's version, so no two contents are alike.
//! - Every QMP command that changes something, and every step of the archive on the way to a commit, as a step of its
//!   own. It is answered, or fails without effect, or has its effect while the job is told that it failed.
//! - A transaction action by action, with guest writes in between, unless `blockdev-backup` has drained the disk.
//! - The job's death between any two steps; QEMU quitting or being killed at any moment outside a transaction. What
//!   was loaded from the image is inconsistent after a kill, what was added since was never in it.
//! - A commit that is unknown: it did not happen, or it did, or it will at any time later. A manifest that can be seen
//!   and is not synced, which the archive's loss of power takes away.
//! - Two archives with one disk, one journal, and one lock, so that no two jobs run at once.
//! - Backups that are removed, where no other builds on them and no job that runs does. Nothing in the product
//!   removes any yet; whatever will has to keep to this, as [`Bug::BaseRemovedUnderJob`] shows.
//! - Runs with `--full`, where the bounds ask for them.
//! - Overlays that are put above the image, merged into it, thrown away, and all below pulled up, and another template
//!   under all of them, where the bounds ask for them: between two runs, since QEMU refuses them while a point in time
//!   is held. A transaction on an image that got its overlay since it was chosen fails, as any may.
//!
//! # What is not
//! - Several disks, files that change places, sizes that change, devices that share their disk: `choose` compares names and sizes, and is tested for
//!   that where it stands.
//! - A guest's write as more than one step. QEMU marks a write's blocks when it has completed, and draining waits for
//!   that, so a write that is on its way through a transaction counts as one after it.
//! - A QMP command that QEMU carries out after the job was told that it failed *and* asked something else: the
//!   monitor answers in order.
//! - The content of the snapshot while it is read, trimming, digests, the provider, the proof: reading gives the disk
//!   as of the point in time or fails. A damaged manifest: for a decision it is one that disappeared.
//! - Writes to the disk while no QEMU runs, or past QEMU.
//!
//! # What has to hold
//! [`RESTORES`] is the point of all this. [`TRACKED`] says that no failure makes a later backup a full one, unless
//! QEMU or the archive lost something. [`ONE_RECORDS`] and [`NOTHING_LEFT`] say that nothing of ours piles up.
//! [`INCREMENTALS`] says that the model gets somewhere at all. Each [`Bug`] breaks at least one of them.

mod archive;
mod bug;
mod decision;
mod qemu;
mod run;
mod world;

pub use bug::Bug;
pub use run::Outcome;
pub use world::{
    Bounds, Event, INCREMENTALS, NOTHING_LEFT, ONE_RECORDS, Protocol, RESTORES, TRACKED, World,
};
