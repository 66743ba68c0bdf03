//! Large buffers that are used again.
//!
//! Memory of this size goes back to the kernel as soon as it is freed, and the kernel clears each page of it anew for
//! whoever comes next, which took a fifth of the processor time of a backup.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that every buffer of the list has room for: the largest `put`, however zstd encodes it.
pub const ROOM: usize = (1 << 20) + (1 << 12);

/// What is smaller is taken from the allocator, which keeps that much by itself.
const LARGE: usize = 64 << 10;

/// Buffers on the list at most: what one disk has under way (24 MiB). More of them were in use at once before they came
/// here, so they never make the process larger than it was.
const KEPT: usize = 24;

static LIST: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A vector whose memory is kept for the next one.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// An empty buffer with room for `length` bytes.
    pub fn for_bytes(length: usize) -> Self {
        if !(LARGE..=ROOM).contains(&length) {
            return Self(Vec::with_capacity(length));
        }
        let kept = list().pop();
        Self(kept.unwrap_or_else(|| Vec::with_capacity(ROOM)))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.capacity() == ROOM {
            let mut vector = std::mem::take(&mut self.0);
            vector.clear();
            let mut list = list();
            if list.len() < KEPT {
                list.push(vector);
            }
        }
    }
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

fn list() -> MutexGuard<'static, Vec<Vec<u8>>> {
    // A panic cannot leave it half changed.
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_empty_and_with_its_room_whoever_had_it_before() {
        for length in [0, 100, LARGE, 1 << 20, ROOM, ROOM + 1] {
            for _ in 0..2 {
                let mut buffer = Buffer::for_bytes(length);
                assert!(buffer.is_empty() && buffer.capacity() >= length);
                buffer.resize(length, 7);
            }
        }
    }

    #[test]
    fn no_more_are_kept_than_the_list_may_hold() {
        let many: Vec<_> = (0..2 * KEPT).map(|_| Buffer::for_bytes(ROOM)).collect();
        drop(many);
        assert!(list().len() <= KEPT);
    }
}
