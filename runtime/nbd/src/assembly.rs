//! Whether the pieces of a reply make up what was asked: each byte once, none missing, none more.

use super::error::Violation;
use bytes::{BufMut, buf::Limit};
use fleecebox_contract::extent::{Extent, ExtentSet};

/// Smallest chunk that servers should use, but for the first and the last of a read.
const CHUNK_GRAIN: u64 = 512;

/// Neighbouring bytes of one block status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusRun {
    /// Which bytes.
    pub extent: Extent,
    /// What the negotiated meta context says about them, such as `NBD_STATE_HOLE` (1) and
    /// `NBD_STATE_ZERO` (2) for `base:allocation`, or dirty (1) for `qemu:dirty-bitmap:…`.
    pub flags: u64,
}

/// Appends a run to runs that end where it begins, as one with the last where they say the same.
pub(super) fn push_run(runs: &mut Vec<StatusRun>, run: StatusRun) {
    if let Some(last) = runs.last_mut()
        && last.flags == run.flags
        && let Some(both) = Extent::between(last.extent.start(), run.extent.end())
    {
        last.extent = both;
        return;
    }
    runs.push(run);
}

/// The bytes of a read while its chunks come in, in any order.
///
/// The buffer always ends with a byte that was received, or with those that were lent with it. What lies between and was
/// not received yet has been filled with zeroes, so holes there need no work and data there overwrites.
#[derive(Debug)]
pub(super) struct ReadAssembly {
    extent: Extent,
    buffer: Vec<u8>,
    /// Length of the buffer as it was lent: where the extent begins in it.
    start: usize,
    received: ExtentSet,
    chunks: u64,
}

/// Where the bytes of a chunk belong.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// At the end of the buffer, whose capacity suffices.
    End(Limit<&'a mut Vec<u8>>),
    /// In front of bytes that came earlier.
    Gap(&'a mut [u8]),
}

impl ReadAssembly {
    /// Begins to put together `extent`, of `length` bytes, at the end of a buffer.
    pub(super) fn new(extent: Extent, length: u32, mut buffer: Vec<u8>) -> Self {
        buffer.reserve_exact(length as usize);
        Self {
            extent,
            start: buffer.len(),
            buffer,
            received: ExtentSet::new(),
            chunks: 0,
        }
    }

    /// Bytes that were asked for.
    pub(super) fn extent(&self) -> Extent {
        self.extent
    }

    /// Takes note of `length` bytes at `offset`, all of which must then be written to the returned place.
    pub(super) fn data(&mut self, offset: u64, length: u64) -> Result<Place<'_>, Violation> {
        let (at, length) = self.admit(offset, length)?;
        if at < self.buffer.len() {
            // The bytes are new and the buffer's last byte is not, so they end before it.
            return Ok(Place::Gap(&mut self.buffer[at..at + length]));
        }
        self.buffer.resize(at, 0);
        Ok(Place::End((&mut self.buffer).limit(length)))
    }

    /// Takes note of `length` zeroes at `offset`.
    pub(super) fn hole(&mut self, offset: u64, length: u64) -> Result<(), Violation> {
        let (at, length) = self.admit(offset, length)?;
        if at >= self.buffer.len() {
            self.buffer.resize(at + length, 0);
        }
        Ok(())
    }

    /// The buffer, if each byte has been received.
    pub(super) fn finish(self) -> Result<Vec<u8>, Violation> {
        // Chunks do not overlap and lie inside, so the counts are equal only if nothing is missing.
        let received = self.received.bytes();
        if received == self.extent.len() {
            Ok(self.buffer)
        } else {
            Err(Violation::ReadIncomplete {
                extent: self.extent,
                received,
            })
        }
    }

    /// Checks a chunk against the request and the chunks before; its place within the buffer.
    fn admit(&mut self, offset: u64, length: u64) -> Result<(usize, usize), Violation> {
        let extent = self.extent;
        let chunk = Extent::new(offset, length)
            .ok()
            .filter(|chunk| extent.contains(*chunk))
            .ok_or(Violation::ChunkOutside {
                extent,
                offset,
                length,
            })?;
        if self.received.overlaps(chunk) {
            return Err(Violation::ChunksOverlap { extent, chunk });
        }
        // Each chunk may cost an entry of the set: a server must not make that cost more than the data.
        let limit = extent.len() / CHUNK_GRAIN + 2;
        self.chunks += 1;
        if self.chunks > limit {
            return Err(Violation::TooManyChunks { extent, limit });
        }
        self.received.insert(chunk);
        // Within the extent, whose length was given as 32 bits.
        let at = self.start + (offset - extent.start()) as usize;
        Ok((at, length as usize))
    }
}

/// The answer to one block status request while it comes in.
#[derive(Debug)]
pub(super) struct StatusAssembly {
    extent: Extent,
    runs: Vec<StatusRun>,
    /// Where the next run begins.
    at: u64,
    chunks: u32,
}

impl StatusAssembly {
    /// Begins to put together what is said about `extent`.
    pub(super) fn new(extent: Extent) -> Self {
        Self {
            extent,
            runs: Vec::new(),
            at: extent.start(),
            chunks: 0,
        }
    }

    /// Bytes that were asked for.
    pub(super) fn extent(&self) -> Extent {
        self.extent
    }

    /// Takes note of a status chunk. One context is negotiated, so there is one.
    pub(super) fn begin_chunk(&mut self) -> Result<(), Violation> {
        self.chunks += 1;
        if self.chunks > 1 {
            Err(self.wrong_count())
        } else {
            Ok(())
        }
    }

    /// Takes the next descriptor. Only the last one may reach past what was asked, and is clipped.
    pub(super) fn descriptor(&mut self, length: u64, flags: u64) -> Result<(), Violation> {
        let wrong = Violation::StatusRun {
            extent: self.extent,
            offset: self.at,
            length,
        };
        let end = self.at.saturating_add(length).min(self.extent.end());
        let extent = Extent::between(self.at, end).ok_or(wrong)?;
        self.at = end;
        push_run(&mut self.runs, StatusRun { extent, flags });
        Ok(())
    }

    /// The runs, which begin where the request begins and describe at least one byte.
    pub(super) fn finish(self) -> Result<Vec<StatusRun>, Violation> {
        if self.runs.is_empty() {
            Err(self.wrong_count())
        } else {
            Ok(self.runs)
        }
    }

    fn wrong_count(&self) -> Violation {
        Violation::StatusChunks {
            extent: self.extent,
            count: self.chunks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: u64 = 10_000;

    fn write(place: Place<'_>, bytes: &[u8]) {
        match place {
            Place::End(mut end) => end.put_slice(bytes),
            Place::Gap(gap) => gap.copy_from_slice(bytes),
        }
    }

    /// Content, and the pieces of it in a shuffled order.
    fn partition() -> impl Strategy<Value = (Vec<u8>, Vec<(u64, u64, bool)>)> {
        (
            prop::collection::vec(any::<u8>(), 2000..8000),
            prop::collection::btree_set(1u64..2000, 0..5),
        )
            .prop_flat_map(|(content, cuts)| {
                let mut edges = vec![0];
                edges.extend(cuts);
                edges.push(content.len() as u64);
                let pieces: Vec<(u64, u64)> =
                    edges.windows(2).map(|w| (w[0], w[1] - w[0])).collect();
                let holes = prop::collection::vec(any::<bool>(), pieces.len());
                (Just(content), Just(pieces).prop_shuffle(), holes)
            })
            .prop_map(|(mut content, pieces, holes)| {
                let pieces: Vec<_> = pieces
                    .into_iter()
                    .zip(holes)
                    .map(|((o, l), hole)| (o, l, hole))
                    .collect();
                for &(offset, length, _) in pieces.iter().filter(|piece| piece.2) {
                    content[offset as usize..(offset + length) as usize].fill(0);
                }
                (content, pieces)
            })
    }

    fn assemble(content: &[u8], pieces: &[(u64, u64, bool)]) -> Result<Vec<u8>, Violation> {
        let extent = Extent::new(START, content.len() as u64).unwrap();
        let lent = vec![0xa5; 3000];
        let mut assembly = ReadAssembly::new(extent, content.len() as u32, lent.clone());
        let capacity = assembly.buffer.capacity();
        for &(offset, length, hole) in pieces {
            if hole {
                assembly.hole(START + offset, length)?;
            } else {
                let bytes = &content[offset as usize..(offset + length) as usize];
                write(assembly.data(START + offset, length)?, bytes);
            }
        }
        assert_eq!(assembly.buffer.capacity(), capacity);
        let mut bytes = assembly.finish()?;
        let read = bytes.split_off(lent.len());
        assert_eq!(bytes, lent);
        Ok(read)
    }

    proptest! {
        #[test]
        fn chunks_in_any_order_make_up_the_read((content, pieces) in partition()) {
            prop_assert_eq!(assemble(&content, &pieces).unwrap(), content);
        }

        #[test]
        fn a_missing_chunk_is_noticed((content, pieces) in partition(), left_out: prop::sample::Index) {
            let mut pieces = pieces;
            pieces.remove(left_out.index(pieces.len()));
            let noticed = matches!(assemble(&content, &pieces), Err(Violation::ReadIncomplete { .. }));
            prop_assert!(noticed);
        }

        #[test]
        fn a_repeated_chunk_is_noticed((content, pieces) in partition(), again: prop::sample::Index) {
            let mut pieces = pieces;
            pieces.push(pieces[again.index(pieces.len())]);
            let noticed = matches!(assemble(&content, &pieces), Err(Violation::ChunksOverlap { .. }));
            prop_assert!(noticed);
        }

        #[test]
        fn whatever_chunks_come_the_buffer_never_outgrows_the_request(
            chunks in prop::collection::vec((START - 600..START + 2600, prop_oneof![0u64..900, any::<u64>()], any::<bool>()), 0..30),
        ) {
            let extent = Extent::new(START, 2000).unwrap();
            let mut assembly = ReadAssembly::new(extent, 2000, Vec::new());
            for (offset, length, hole) in chunks {
                let taken = if hole {
                    assembly.hole(offset, length).is_ok()
                } else {
                    assembly.data(offset, length).map(|place| write(place, &vec![7; length as usize])).is_ok()
                };
                prop_assert!(!taken || Extent::new(offset, length).is_ok_and(|chunk| extent.contains(chunk)));
                prop_assert!(assembly.buffer.len() <= 2000 && assembly.buffer.capacity() == 2000);
            }
        }

        #[test]
        fn status_runs_describe_a_prefix_of_the_request(
            descriptors in prop::collection::vec((prop_oneof![4 => 0u64..400, 1 => any::<u64>()], 0u64..3), 0..12),
        ) {
            let extent = Extent::new(START, 1000).unwrap();
            let mut assembly = StatusAssembly::new(extent);
            assembly.begin_chunk().unwrap();
            let mut at = START;
            for (length, flags) in descriptors {
                let fits = length > 0 && at < extent.end();
                prop_assert_eq!(assembly.descriptor(length, flags).is_ok(), fits);
                if !fits {
                    return Ok(());
                }
                at = at.saturating_add(length).min(extent.end());
            }
            if let Ok(runs) = assembly.finish() {
                prop_assert_eq!(runs[0].extent.start(), START);
                prop_assert_eq!(runs.last().unwrap().extent.end(), at);
                prop_assert!(runs.windows(2).all(|w| w[0].extent.end() == w[1].extent.start() && w[0].flags != w[1].flags));
            } else {
                prop_assert_eq!(at, START);
            }
        }
    }

    #[test]
    fn a_read_in_single_bytes_is_cut_off() {
        let extent = Extent::new(START, 4096).unwrap();
        let mut assembly = ReadAssembly::new(extent, 4096, Vec::new());
        let taken = (0..2048)
            .take_while(|n| assembly.hole(START + 2 * n, 1).is_ok())
            .count();
        assert_eq!(taken, 10);
    }
}
