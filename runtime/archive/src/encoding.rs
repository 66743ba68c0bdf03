//! Encoding of single frames.

use super::error::Damage;
use super::frame::{FRAME_LIMIT, STORED_LIMIT};
use super::lock;
use fleecebox_contract::Encoding;
use fleecebox_contract::buffer::Buffer;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::sync::Mutex;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

/// How hard zstd tries, which is the operator's: from 1, the fastest, to 19, the highest that takes no memory out of all
/// proportion. What was stored at any level reads alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct ZstdLevel(u8);

/// A number that is no [`ZstdLevel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a level of zstd's is a number from 1 to 19, and not {0}")]
pub struct NotALevel(i64);

impl TryFrom<i64> for ZstdLevel {
    type Error = NotALevel;

    fn try_from(number: i64) -> Result<Self, NotALevel> {
        match u8::try_from(number) {
            Ok(level @ 1..=19) => Ok(Self(level)),
            _ => Err(NotALevel(number)),
        }
    }
}

impl From<ZstdLevel> for i64 {
    fn from(ZstdLevel(level): ZstdLevel) -> Self {
        level.into()
    }
}

/// zstd's own default: a higher level costs more time than a link or disk saves.
impl Default for ZstdLevel {
    fn default() -> Self {
        Self(3)
    }
}

impl fmt::Display for ZstdLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Compressors that wait for the next frame: one is several hundred KiB that take long to set up. There are
/// as many as there have been frames in the making at once.
#[derive(Default)]
pub(super) struct Compressors {
    level: ZstdLevel,
    idle: Mutex<Vec<Compressor<'static>>>,
}

impl Compressors {
    pub(super) fn at(level: ZstdLevel) -> Self {
        Self {
            level,
            idle: Mutex::default(),
        }
    }

    /// One zstd frame that decodes to `data`.
    pub(super) fn compress(&self, data: &[u8]) -> io::Result<Buffer> {
        let idle = lock(&self.idle).pop();
        let mut compressor = match idle {
            Some(compressor) => compressor,
            None => Compressor::new(self.level.0.into())?,
        };
        let mut compressed = Buffer::for_bytes(compress_bound(data.len()));
        compressor.compress_to_buffer(data, &mut *compressed)?;
        lock(&self.idle).push(compressor);
        Ok(compressed)
    }

    /// One zstd frame that decodes to `data`, where that is smaller.
    pub(super) fn compress_if_smaller(&self, data: &[u8]) -> io::Result<Option<Buffer>> {
        let compressed = self.compress(data)?;
        Ok((compressed.len() < data.len()).then_some(compressed))
    }
}

/// Decodes one frame that must give exactly `decoded` bytes, of which there are at most [`FRAME_LIMIT`].
/// Memory is bounded by that, whatever `stored` claims.
pub(super) fn decode(stored: Vec<u8>, decoded: u32, encoding: Encoding) -> Result<Vec<u8>, Damage> {
    let wanted = decoded as usize;
    if decoded > FRAME_LIMIT || stored.len() > STORED_LIMIT as usize {
        return Err(Damage::Frame);
    }
    let bytes = match encoding {
        Encoding::Identity => stored,
        Encoding::Zstd => {
            let mut bytes = Vec::with_capacity(wanted);
            Decompressor::new()
                .and_then(|mut decoder| decoder.decompress_to_buffer(&stored, &mut bytes))
                .map_err(|_| Damage::Frame)?;
            bytes
        }
    };
    (bytes.len() == wanted)
        .then_some(bytes)
        .ok_or(Damage::Frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_frame_of_the_largest_size_is_stored_in_more_than_the_limit() {
        let bound = compress_bound(FRAME_LIMIT as usize);
        assert_eq!(bound, STORED_LIMIT as usize);
    }

    #[test]
    fn bytes_that_do_not_compress_are_left_as_they_are() {
        let noise = super::super::name::random::<4096>().unwrap();
        let compressors = Compressors::default();
        assert_eq!(compressors.compress_if_smaller(&noise).unwrap(), None);
        let stored = compressors.compress_if_smaller(&[7; 4096]).unwrap();
        assert!(stored.is_some_and(|stored| stored.len() < 100));
    }

    #[test]
    fn a_higher_level_tries_harder_and_every_level_is_read_alike() {
        // Words of a few letters, in an order that is no order.
        let mut state = 1u32;
        let text: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            [&b"alpha "[..], b"beta ", b"gamma ", b"delta\n"][(state >> 30) as usize]
        })
        .take(50_000)
        .flatten()
        .copied()
        .collect();
        let stored = |level| {
            let level = ZstdLevel::try_from(level).unwrap();
            let stored = Compressors::at(level).compress(&text).unwrap().to_vec();
            let length = text.len() as u32;
            assert_eq!(
                decode(stored.clone(), length, Encoding::Zstd).unwrap(),
                text
            );
            stored.len()
        };
        let [least, usual, most] = [1, 3, 19].map(stored);
        assert!(least > most, "{least} {usual} {most}");
        assert_eq!(Compressors::default().compress(&text).unwrap().len(), usual);
    }

    #[test]
    fn only_what_is_a_level_is_taken_for_one() {
        for number in [i64::MIN, -1, 0, 20, 22, 256 + 3, i64::MAX] {
            assert_eq!(ZstdLevel::try_from(number), Err(NotALevel(number)));
        }
        for number in [1, 19] {
            assert_eq!(ZstdLevel::try_from(number).map(i64::from), Ok(number));
        }
    }

    #[test]
    fn a_frame_that_holds_more_than_was_recorded_is_refused() {
        let stored = Compressors::default().compress(&[0; 1 << 20]).unwrap();
        assert!(decode(stored.to_vec(), 1 << 20, Encoding::Zstd).is_ok());
        for wrong in [1, (1 << 20) - 1] {
            assert_eq!(
                decode(stored.to_vec(), wrong, Encoding::Zstd),
                Err(Damage::Frame)
            );
        }
    }

    proptest! {
        #[test]
        fn frames_decode_to_what_was_encoded(data in prop::collection::vec(0u8..4, 1..5000)) {
            let stored = Compressors::default().compress(&data).unwrap().to_vec();
            prop_assert_eq!(decode(stored, data.len() as u32, Encoding::Zstd).unwrap(), data);
        }

        #[test]
        fn arbitrary_bytes_never_decode_to_another_length(stored in prop::collection::vec(any::<u8>(), 0..200), decoded in 1u32..FRAME_LIMIT) {
            if let Ok(bytes) = decode(stored, decoded, Encoding::Zstd) {
                prop_assert_eq!(bytes.len(), decoded as usize);
            }
        }
    }
}
