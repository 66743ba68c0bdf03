//! What a run on one volume works on: the frozen disk, the archive, the block table and the books.

use crate::archive::{self, BackupId, BackupWriter, BlockTableWriter, Entry, Frame};
use crate::digest::Digest;
use crate::event::{Event, Events};
use crate::extent::Extent;
use crate::nbd;
use crate::volume::canary::Canary;
use crate::volume::coverage::Coverage;
use crate::volume::discard;
use crate::volume::frozen::Frozen;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinError;
use tokio_util::task::TaskTracker;

/// Why the host could not do what a provider rightly asked for. The provider only learns `io`.
#[derive(Debug, thiserror::Error)]
pub enum HostFailure {
    /// The snapshot could not be read, or not be given back.
    #[error("reading the snapshot failed")]
    Snapshot(#[from] nbd::Error),
    /// The archive could not store.
    #[error("storing in the archive failed")]
    Archive(#[from] archive::Error),
    /// A task of the job itself died.
    #[error("a task of the job died")]
    Task(#[from] JoinError),
}

/// Everything that calls of one run act on.
pub struct Target {
    /// The volume's name.
    pub volume: String,
    /// The disk as of the point in time.
    pub frozen: Arc<Frozen>,
    /// The block that is never given back.
    pub canary: Canary,
    /// The backup that is being made.
    pub archive: Arc<BackupWriter>,
    /// Its id.
    pub backup: BackupId,
    /// Digesting and encoding at once in the whole job: as many as there are cores.
    pub encoders: Arc<Semaphore>,
    /// Whether finished ranges are given back without being asked.
    pub trim_finished: bool,
    /// Where the job tells what it does.
    pub events: Events,
    /// All that is under way for this run, so that its end can be waited for.
    pub tasks: TaskTracker,
    /// Told at the end of each put.
    pub put_ended: Notify,
    table: Mutex<BlockTableWriter>,
    books: Mutex<Coverage>,
    failure: Mutex<Option<HostFailure>>,
    covered: AtomicU64,
}

impl Target {
    /// Nothing is covered yet.
    #[allow(clippy::too_many_arguments)] // each is one of the things that a run needs, made by the job
    pub fn new(
        volume: String,
        frozen: Arc<Frozen>,
        canary: Canary,
        archive: Arc<BackupWriter>,
        backup: BackupId,
        table: BlockTableWriter,
        encoders: Arc<Semaphore>,
        trim_finished: bool,
        events: Events,
    ) -> Self {
        Self {
            volume,
            frozen,
            canary,
            archive,
            backup,
            encoders,
            trim_finished,
            events,
            tasks: TaskTracker::new(),
            put_ended: Notify::new(),
            table: Mutex::new(table),
            books: Mutex::new(Coverage::default()),
            failure: Mutex::new(None),
            covered: AtomicU64::new(0),
        }
    }

    /// The books, for one short look or change.
    pub fn books(&self) -> MutexGuard<'_, Coverage> {
        // A panic while they were held has failed the job already; what they say is still true.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the first failure: it fails the backup, whatever the provider makes of its `io`.
    pub fn fail(&self, failure: HostFailure) {
        let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(failure);
    }

    /// Whether anything failed so far.
    pub fn has_failed(&self) -> bool {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// The first failure, if there was one.
    pub fn take_failure(&self) -> Option<HostFailure> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Runs CPU-bound or file work on a blocking thread, as many at once as there are cores.
    pub async fn encode<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, HostFailure> + Send + 'static,
    ) -> Result<T, HostFailure> {
        let turn = Arc::clone(&self.encoders)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let target = Arc::clone(self);
        self.tasks
            .spawn_blocking(move || {
                let done = work(&target);
                drop(turn);
                done
            })
            .await?
    }

    /// Enters in the block table that `extent` lies at the start of `frame`. Zero blocks stay zero.
    pub fn place(
        &self,
        extent: Extent,
        digests: &[Digest],
        frame: &Frame,
    ) -> Result<(), HostFailure> {
        let block = self.frozen.plan.block();
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let first = extent.start() / u64::from(block);
        for (i, digest) in (0u32..).zip(digests) {
            let index = first + u64::from(i);
            if !self.is_zero(index) {
                table.set(
                    index,
                    Entry::Placed {
                        digest: *digest,
                        frame: frame.clone(),
                        skip: i * block,
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Enters in the block table that the provider holds block `index`. Zero blocks stay zero.
    pub fn claim(&self, index: u64, digest: Digest) -> Result<(), HostFailure> {
        if self.is_zero(index) {
            return Ok(());
        }
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(table.set(
            index,
            Entry::Claimed {
                digest,
                backup: self.backup,
            },
        )?)
    }

    /// Tells the progress: the data in `extent` has been dealt with.
    pub fn advance(&self, extent: Extent) {
        let bytes = self.frozen.plan.zero().gaps(extent).map(Extent::len).sum();
        self.covered.fetch_add(bytes, Ordering::Relaxed);
        let volume = self.volume.clone();
        self.events.send(Event::Advance { volume, bytes });
    }

    /// Bytes that were dealt with so far, zero ones left out.
    pub fn covered_bytes(&self) -> u64 {
        self.covered.load(Ordering::Relaxed)
    }

    /// Gives whole spans back around what has just become final.
    pub async fn finished(&self, extent: Extent) -> Result<(), HostFailure> {
        if self.trim_finished {
            let ripe = discard::ripe(&mut self.books(), &self.frozen.plan, extent);
            for span in ripe {
                discard::trim(&self.frozen, self.canary, span).await?;
            }
        }
        Ok(())
    }

    /// The finished parts, once every task has ended.
    pub fn into_parts(self) -> (Arc<Frozen>, BlockTableWriter, Coverage) {
        let table = self
            .table
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let books = self
            .books
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        (self.frozen, table, books)
    }

    /// Whether block `index` reads as zeroes; it is in the table already.
    pub fn is_zero(&self, index: u64) -> bool {
        let block = u64::from(self.frozen.plan.block());
        Extent::new(index * block, 1).is_ok_and(|byte| self.frozen.plan.zero().overlaps(byte))
    }
}
