//! The file that both processes hold and that bytes travel in.
//!
//! It is never mapped. What the other side holds can change at any moment, so bytes are copied out with `pread`
//! before anybody looks at them, and copied in with `pwrite`. It is sealed against shrinking and growing: a copy
//! inside its size can neither fall short nor fault.

use rustix::buffer::spare_capacity;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A sealed memory file of a fixed size.
#[derive(Debug)]
pub struct Payload {
    file: OwnedFd,
    size: u64,
}

/// Why bytes could not be copied in or out.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The file holds fewer bytes than were asked for or offered.
    #[error("{length} bytes do not fit into the {size} bytes that the two processes share")]
    TooLong {
        /// In bytes.
        length: u64,
        /// In bytes.
        size: u64,
    },
    /// The kernel refused, or the file is none of ours.
    #[error("the memory file that the two processes share failed")]
    Os(#[from] Errno),
}

impl Payload {
    /// For a provider's reads and writes: no single one may be longer than this, in bytes. Four MiB are enough for
    /// the copy to cost nothing against a disk, and few enough for a hundred jobs side by side.
    pub const TRANSFER_SIZE: u64 = 4 << 20;

    /// For compiling, in bytes: the component goes in and comes out as machine code, several times its size.
    /// Pages that nobody touches take no memory.
    pub const COMPILE_SIZE: u64 = 512 << 20;

    /// Makes a file of `size` bytes, all zero, and seals its size.
    pub fn create(size: u64) -> Result<Self, PayloadError> {
        let file = rustix::fs::memfd_create(
            "fleecebox-payload",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        rustix::fs::ftruncate(&file, size)?;
        // SEAL: the sandbox must not be able to add a seal of its own, such as one against writing.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self { file, size })
    }

    /// Takes a file that [`Payload::create`] made in another process.
    pub fn adopt(file: OwnedFd) -> Result<Self, PayloadError> {
        let size = u64::try_from(rustix::fs::fstat(&file)?.st_size).map_err(|_| Errno::INVAL)?;
        Ok(Self { file, size })
    }

    /// Largest number of bytes that it can carry at once.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Puts `bytes` at the start of the file, and gives their number.
    pub fn give(&self, bytes: &[u8]) -> Result<u64, PayloadError> {
        let length = self.fits(bytes.len() as u64)?;
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(&self.file, &bytes[done..], done as u64) {
                Ok(0) => return Err(Errno::IO.into()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(length)
    }

    /// Copies the first `length` bytes of the file.
    ///
    /// Nothing is allocated for a length that the file cannot have.
    pub fn take(&self, length: u64) -> Result<Vec<u8>, PayloadError> {
        let length = usize::try_from(self.fits(length)?).map_err(|_| Errno::OVERFLOW)?;
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let at = bytes.len() as u64;
            // Reads into the spare capacity, so that megabytes are not zeroed first.
            match rustix::io::pread(&self.file, spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(Errno::IO.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(length);
        Ok(bytes)
    }

    fn fits(&self, length: u64) -> Result<u64, PayloadError> {
        if length <= self.size {
            Ok(length)
        } else {
            Err(PayloadError::TooLong {
                length,
                size: self.size,
            })
        }
    }
}

impl AsFd for Payload {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_side_gives_the_other_takes() {
        let ours = Payload::create(4096).unwrap();
        let theirs = Payload::adopt(ours.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(theirs.size(), 4096);
        assert_eq!(ours.give(b"a disk's bytes").unwrap(), 14);
        assert_eq!(theirs.take(6).unwrap(), b"a disk");
        assert_eq!(theirs.take(0).unwrap(), b"");
    }

    #[test]
    fn a_length_past_the_end_is_refused_before_anything_is_allocated() {
        let payload = Payload::create(16).unwrap();
        assert!(matches!(
            payload.take(u64::MAX),
            Err(PayloadError::TooLong { size: 16, .. })
        ));
        assert!(matches!(
            payload.give(&[0; 17]),
            Err(PayloadError::TooLong { length: 17, .. })
        ));
        assert!(payload.give(&[0; 16]).is_ok());
    }

    #[test]
    fn neither_side_can_change_the_size_or_forbid_writing() {
        let payload = Payload::create(4096).unwrap();
        assert_eq!(rustix::fs::ftruncate(&payload, 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&payload, 8192), Err(Errno::PERM));
        assert_eq!(
            rustix::fs::fcntl_add_seals(&payload, SealFlags::WRITE),
            Err(Errno::PERM)
        );
    }
}
