//! What the host placed, on its way back.

use crate::archive::{self, Frame, Namespace};
use crate::digest::{self, Digest};
use crate::extent::Extent;

/// Neighbouring blocks that lie in one frame.
pub struct Placed {
    /// Where they lie on the volume.
    pub extent: Extent,
    /// Where the first one begins in the decoded frame, in bytes.
    pub skip: u32,
    /// One for each block.
    pub digests: Vec<Digest>,
    /// Of the blocks, in bytes.
    pub block: u32,
}

/// Why a frame does not give the bytes.
#[derive(Debug, thiserror::Error)]
pub enum PlacedError {
    /// The archive does not give them.
    #[error("{extent}")]
    Unreadable {
        /// Of the volume.
        extent: Extent,
        /// Why.
        source: archive::Error,
    },
    /// They are not those that were backed up.
    #[error("{extent}: the bytes are not those that were backed up ({origin})")]
    Wrong {
        /// The block.
        extent: Extent,
        /// Where they came from.
        origin: String,
    },
}

impl Placed {
    /// From `frame`, compared; what is found is remembered for backups that would refer to it.
    ///
    /// # Errors
    /// A [`PlacedError`], and no byte of it then.
    pub fn read(&self, namespace: &Namespace, frame: &Frame) -> Result<Vec<u8>, PlacedError> {
        let mut bytes = self.decoded(namespace, frame)?;
        let range = self.compare(namespace, frame, &bytes)?;
        bytes.truncate(range.end);
        bytes.drain(..range.start);
        Ok(bytes)
    }

    /// From where a later backup stored the same chunk anew.
    pub fn of_a_copy(&self, namespace: &Namespace, frame: &Frame) -> Option<Vec<u8>> {
        let copies = namespace.copies(frame);
        copies
            .iter()
            .find_map(|copy| self.read(namespace, copy).ok())
    }

    /// All bytes of `frame`, not yet compared.
    ///
    /// # Errors
    /// As [`Placed::read`].
    pub fn decoded(&self, namespace: &Namespace, frame: &Frame) -> Result<Vec<u8>, PlacedError> {
        namespace.read_frame(frame).map_err(|source| {
            if source.is_damage() {
                namespace.note_wrong(frame);
            }
            PlacedError::Unreadable {
                extent: self.extent,
                source,
            }
        })
    }

    /// Where these blocks lie among the bytes of `frame`, which have their digests.
    ///
    /// # Errors
    /// As [`Placed::read`].
    pub fn compare(
        &self,
        namespace: &Namespace,
        frame: &Frame,
        decoded: &[u8],
    ) -> Result<std::ops::Range<usize>, PlacedError> {
        let wrong = |extent| {
            namespace.note_wrong(frame);
            let origin = frame.object().to_string();
            Err(PlacedError::Wrong { extent, origin })
        };
        let start = self.skip as usize;
        // A table that somebody made may say anything.
        let Some(bytes) = usize::try_from(self.extent.len())
            .ok()
            .and_then(|length| decoded.get(start..)?.get(..length))
        else {
            return wrong(self.extent);
        };
        if let Some(extent) = digest::first_wrong(bytes, self.extent, self.block, &self.digests) {
            return wrong(extent);
        }
        if bytes.len() == decoded.len() {
            namespace.note_seen(frame);
        }
        Ok(start..start + bytes.len())
    }
}
