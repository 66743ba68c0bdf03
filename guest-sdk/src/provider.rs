//! The two kinds of provider, and what each is handed.

use crate::{Archive, Context, DirtyRegions, Discarder, Error, Objects, Reader, Snapshot};

/// What a backup may do with one volume. What is absent, the operator's policy does not grant.
#[derive(Debug)]
pub struct Volume {
    /// The volume.
    pub snapshot: Snapshot,
    /// What of it is to be backed up.
    pub dirty: DirtyRegions,
    /// Authority to see its bytes.
    pub reader: Option<Reader>,
    /// Authority to give snapshot space back early.
    pub discarder: Option<Discarder>,
}

/// What a blind backup may do with one volume. What is absent, the operator's policy does not grant.
#[derive(Debug)]
pub struct BlindVolume {
    /// The volume.
    pub snapshot: Snapshot,
    /// What of it is to be backed up.
    pub dirty: DirtyRegions,
    /// Authority to give snapshot space back early.
    pub discarder: Option<Discarder>,
}

/// A provider that sees the bytes: the contract's world `provider`. [`export!`](crate::export!) makes a component of
/// it.
///
/// ```
/// use std::io::{Read, Seek, SeekFrom, Write};
///
/// use fleecebox_guest::{
///     Archive, Context, Encoding, Error, Image, Objects, Provider, RegionKind, StoredObject, Volume,
/// };
///
/// /// Keeps the whole of a volume as one flat object, zeroes and all: good for full backups only.
/// struct Flat;
///
/// impl Provider for Flat {
///     type Image = FlatImage;
///
///     fn run(
///         _job: Context,
///         volume: Volume,
///         archive: Archive,
///         _base: Option<Vec<u8>>,
///     ) -> Result<Vec<u8>, Error> {
///         let reader = volume.reader.ok_or_else(|| Error::other("the policy grants no reader"))?;
///         let name = volume.snapshot.info().name;
///         let mut object = archive.create(&name, Encoding::Zstd)?;
///         for region in volume.dirty {
///             let range = region?.range;
///             for piece in range.pieces(reader.max_read().into()) {
///                 let mut bytes = vec![0; piece.length as usize];
///                 reader.read_into(piece.offset, &mut bytes)?;
///                 object.write_all(&bytes)?;
///             }
///             object.claim(&volume.snapshot, range)?;
///         }
///         object.finish()?;
///         Ok(name.into_bytes())
///     }
/// }
///
/// struct FlatImage(StoredObject);
///
/// impl Image for FlatImage {
///     fn open(_job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Self, Error> {
///         let name = String::from_utf8(receipt).map_err(|_| Error::other("not a receipt of flat"))?;
///         Ok(FlatImage(objects.open(&name)?))
///     }
///
///     fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
///         let mut bytes = vec![0; length as usize];
///         self.0.seek(SeekFrom::Start(offset))?;
///         self.0.read_exact(&mut bytes)?;
///         Ok(bytes)
///     }
/// }
///
/// fleecebox_guest::export!(Flat);
/// ```
pub trait Provider: 'static {
    /// Gives back what [`run`](Self::run) claimed.
    type Image: Image;

    /// Backs up one volume. Volumes may run side by side, each in an instance of its own that shares no memory with
    /// this one.
    ///
    /// `base` is what this returned for the volume in the backup that this one builds on. What it returns, the
    /// receipt, is kept with the backup; it has at most 64 KiB.
    ///
    /// # Errors
    ///
    /// Whatever a call failed with is best passed on with `?`. [`Error::other`] carries the provider's own words.
    /// After an error nothing of the backup is kept, and the next one covers the same changes again.
    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error>;
}

/// The claimed ranges of one volume in one backup: the contract's `restore.image`.
pub trait Image: Sized + 'static {
    /// Opens the image that the receipt of [`Provider::run`] stands for. `objects` holds what all volumes of that
    /// backup wrote.
    ///
    /// # Errors
    ///
    /// The host shows the error to whoever restores or verifies.
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Self, Error>;

    /// Returns exactly `length` bytes of the volume, at most 4 MiB. Called in any order, for ranges of whole blocks
    /// that were claimed in this very backup, though not necessarily by one claim.
    ///
    /// # Errors
    ///
    /// The host shows the error to whoever restores or verifies.
    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error>;
}

/// A provider that cannot see the bytes: the contract's world `blind-provider`.
/// [`export_blind!`](crate::export_blind!) makes a component of it; the crate's own page holds a whole one.
pub trait BlindProvider: 'static {
    /// Backs up one volume, as [`Provider::run`] does.
    ///
    /// # Errors
    ///
    /// As for [`Provider::run`].
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error>;
}
