//! Mistakes that the protocol could have made. Each is planted on demand, for the checker to find.

/// What is wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bug {
    /// The old bitmap goes as soon as it was read by.
    OldRemovedBeforeCommit,
    /// The transaction disables the old bitmap, then adds the new, and drains last.
    DisabledBeforeAdded,
    /// The transaction adds, then disables, and drains last.
    BitmapsBeforeBackup,
    /// The newest backup in the archive is taken for what the bitmap speaks of.
    LatestBackupAsBase,
    /// Any bitmap that records is taken for one of this archive.
    AnotherArchivesBitmap,
    /// A bitmap that a full backup makes useless goes in the transaction that adds the new one.
    OldRemovedInNewsTransaction,
    /// Recovery merges into whatever bitmap has stopped.
    AnyStoppedBitmapMerged,
    /// The way back merges first and enables then.
    MergedBeforeEnabled,
    /// The way back enables last.
    EnabledLast,
    /// The way back enables the old bitmap and forgets what the new one has seen.
    NothingMerged,
    /// A commit of which nothing is known counts as done.
    UnknownTakenForCommitted,
    /// A manifest that can be seen is built on, though a loss of power may still take it away.
    UnsyncedManifestBelieved,
    /// Recovery leaves the bitmap of a full backup that never committed.
    UncommittedNewLeft,
    /// The old bitmap is forgotten after the commit.
    OldKeptAfterCommit,
    /// Of a disk with an overlay, only the overlay's own bitmap is read.
    OverlaysBitmapAlone,
    /// A bitmap is believed whatever its disk is made of now.
    ImagesNotCompared,
    /// Backups are removed without regard to a job that builds on them.
    BaseRemovedUnderJob,
}
