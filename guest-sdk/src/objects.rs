//! Reading back what the provider itself wrote.

use std::io::{self, Read, Seek, SeekFrom};
use std::rc::Rc;

use crate::Error;
use crate::imports::stored;

/// Most bytes that one call asks for, so that an answer stays a small part of the provider's memory.
const READ_AT_ONCE: usize = 1 << 20;

/// The objects that this provider wrote, of one finished backup.
#[derive(Debug, Clone)]
pub struct Objects {
    handle: Rc<stored::Objects>,
}

impl Objects {
    pub(crate) fn new(handle: stored::Objects) -> Objects {
        Objects {
            handle: Rc::new(handle),
        }
    }

    /// Opens an object for reading.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidName`], [`Error::NotFound`], [`Error::Io`].
    pub fn open(&self, name: &str) -> Result<StoredObject, Error> {
        let size = self.handle.size(name)?;
        Ok(StoredObject {
            objects: self.clone(),
            name: name.to_owned(),
            size,
            position: 0,
        })
    }
}

/// One object, read through [`io::Read`] and [`io::Seek`]. What was spliced into it is not served:
/// [`Error::OutOfRange`].
///
/// Nothing is buffered here, and each read is a call to the host, so that small reads are better put through an
/// [`io::BufReader`].
#[derive(Debug)]
pub struct StoredObject {
    objects: Objects,
    name: String,
    size: u64,
    position: u64,
}

impl StoredObject {
    /// Its size before encoding, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Exactly `length` bytes from `offset` on, in as many calls as it takes, wherever the last read ended.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] if that ends past the object or touches what was spliced; [`Error::Io`].
    pub fn read_at(&self, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let position = offset
                .checked_add(bytes.len() as u64)
                .ok_or(Error::OutOfRange)?;
            let part = (length - bytes.len()).min(READ_AT_ONCE) as u32;
            bytes.extend(self.objects.handle.read(&self.name, position, part)?);
        }
        Ok(bytes)
    }
}

impl Read for StoredObject {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.size.saturating_sub(self.position);
        let length = (buffer.len().min(READ_AT_ONCE) as u64).min(rest) as usize;
        if length == 0 {
            return Ok(0);
        }
        let bytes = self
            .objects
            .handle
            .read(&self.name, self.position, length as u32)
            .map_err(Error::from)?;
        buffer[..length].copy_from_slice(&bytes);
        self.position += length as u64;
        Ok(length)
    }
}

impl Seek for StoredObject {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.size.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
