//! Storing: chunks that the host packs, and objects with names.

use std::io;

use crate::imports::{archive, types};
use crate::{Error, Extent, Snapshot};

/// Longest range that one [`Archive::put`] takes, in bytes.
pub const MAX_PUT: u64 = 1 << 20;

/// How the host encodes what it stores. It decodes again when reading, so that sizes and offsets are always those
/// before encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// Stored as it is.
    Identity,
    /// Compressed with Zstandard at a level that the operator chooses.
    Zstd,
}

/// Authority to store.
#[derive(Debug)]
pub struct Archive {
    handle: archive::Writer,
}

impl Archive {
    pub(crate) fn new(handle: archive::Writer) -> Archive {
        Archive { handle }
    }

    /// Stores a range of whole blocks, at most [`MAX_PUT`] long, as one chunk that is addressed by its content and
    /// stored once. May return before the copy is done; a failure then shows in a later call, or fails the backup.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] above [`MAX_PUT`]; [`Error::OutOfRange`], [`Error::NotDirty`], [`Error::Discarded`],
    /// [`Error::QuotaExceeded`], [`Error::Io`].
    pub fn put(&self, source: &Snapshot, range: Extent, encoding: Encoding) -> Result<(), Error> {
        Ok(self
            .handle
            .put(source.handle(), range.into(), encoding.into())?)
    }

    /// Starts an object. Its name is unique within the backup, which may have other volumes, and plain: 1 to 128
    /// ASCII letters, digits, `-`, `_` and `.`, not beginning with `.`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidName`], [`Error::Exists`], [`Error::QuotaExceeded`], [`Error::Io`].
    pub fn create(&self, name: &str, encoding: Encoding) -> Result<OutputStream, Error> {
        let handle = self.handle.create(name, encoding.into())?;
        let max_write = handle.max_write();
        Ok(OutputStream { handle, max_write })
    }
}

/// An object under construction. Dropping it unfinished discards it and all that it covered.
///
/// Write to it through [`io::Write`]; what the host answers comes back from an [`io::Error`] with `?`, see
/// [`Error`]. Nothing is buffered here, and each write is a call to the host, so that small writes are better put
/// through an [`io::BufWriter`].
///
/// ```no_run
/// # use fleecebox_guest::{Archive, Encoding, Error};
/// # fn example(archive: Archive) -> Result<(), Error> {
/// use std::io::Write;
///
/// let mut object = archive.create("notes.txt", Encoding::Identity)?;
/// object.write_all(b"written by the provider itself")?;
/// object.finish()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct OutputStream {
    handle: archive::OutputStream,
    max_write: u32,
}

impl OutputStream {
    /// Appends a range of whole blocks, of any length, without passing it through the provider. May return before
    /// the copy is done; a failure then shows in a later call or in [`finish`](Self::finish).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`], [`Error::NotDirty`], [`Error::Discarded`], [`Error::QuotaExceeded`], [`Error::Io`].
    pub fn splice(&mut self, source: &Snapshot, range: Extent) -> Result<(), Error> {
        Ok(self.handle.splice(source.handle(), range.into())?)
    }

    /// Says that the bytes written so far hold the backup of a range of whole blocks, of any length, which
    /// [`Image::read`](crate::Image::read) will give back. The host checks it before it commits.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`], [`Error::NotDirty`], [`Error::QuotaExceeded`], [`Error::Io`].
    pub fn claim(&mut self, source: &Snapshot, range: Extent) -> Result<(), Error> {
        Ok(self.handle.claim(source.handle(), range.into())?)
    }

    /// Makes the object durable; returns its size before encoding, in bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], or what an earlier call left behind. The object is then gone, and all that it covered.
    pub fn finish(self) -> Result<u64, Error> {
        Ok(archive::OutputStream::finish(self.handle)?)
    }
}

impl io::Write for OutputStream {
    /// Appends at most as many bytes as the host takes at once.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(self.max_write as usize);
        self.handle.write(&bytes[..length]).map_err(Error::from)?;
        Ok(length)
    }

    /// Does nothing: there is no buffer, and only [`finish`](OutputStream::finish) makes bytes durable.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl From<Encoding> for types::Encoding {
    fn from(encoding: Encoding) -> types::Encoding {
        match encoding {
            Encoding::Identity => types::Encoding::Identity,
            Encoding::Zstd => types::Encoding::Zstd,
        }
    }
}
