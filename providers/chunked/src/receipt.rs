//! What is kept with a backup: version (1 byte), chunk size (4), number of chunks (8) and their bytes (8), all
//! little-endian.

use fleecebox_guest::Extent;

const VERSION: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Receipt {
    /// In bytes.
    pub(crate) chunk_size: u32,
    /// How many this backup put.
    pub(crate) chunks: u64,
    /// Sum of their lengths.
    pub(crate) bytes: u64,
}

/// Why bytes are no receipt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAReceipt {
    /// It begins with another version, or is empty.
    #[error("its version is {actual:?} and not {VERSION}")]
    Version { actual: Option<u8> },
    /// It is too short or too long for its version.
    #[error("it has {actual} bytes and not {expected}")]
    Length { expected: usize, actual: usize },
}

impl Receipt {
    const LENGTH: usize = 1 + 4 + 8 + 8;

    pub(crate) fn new(chunk_size: u32) -> Receipt {
        Receipt {
            chunk_size,
            chunks: 0,
            bytes: 0,
        }
    }

    pub(crate) fn count(&mut self, chunk: Extent) {
        self.chunks += 1;
        self.bytes += chunk.length;
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend(self.chunk_size.to_le_bytes());
        bytes.extend(self.chunks.to_le_bytes());
        bytes.extend(self.bytes.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Receipt, NotAReceipt> {
        let actual = bytes.first().copied();
        if actual != Some(VERSION) {
            return Err(NotAReceipt::Version { actual });
        }
        let parts: Option<(_, &[u8; 8])> =
            bytes[1..]
                .split_first_chunk::<4>()
                .and_then(|(chunk_size, rest)| {
                    let (chunks, rest) = rest.split_first_chunk::<8>()?;
                    Some(((chunk_size, chunks), rest.try_into().ok()?))
                });
        let Some(((chunk_size, chunks), sum)) = parts else {
            return Err(NotAReceipt::Length {
                expected: Receipt::LENGTH,
                actual: bytes.len(),
            });
        };
        Ok(Receipt {
            chunk_size: u32::from_le_bytes(*chunk_size),
            chunks: u64::from_le_bytes(*chunks),
            bytes: u64::from_le_bytes(*sum),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt() -> Receipt {
        let mut receipt = Receipt::new(1 << 20);
        receipt.count(Extent {
            offset: 5 << 20,
            length: 1 << 20,
        });
        receipt.count(Extent {
            offset: 9 << 20,
            length: 3 << 16,
        });
        receipt
    }

    #[test]
    fn a_receipt_reads_back_as_it_was() {
        assert_eq!(Receipt::from_bytes(&receipt().to_bytes()), Ok(receipt()));
        assert_eq!(receipt().bytes, (1 << 20) + (3 << 16));
    }

    #[test]
    fn a_receipt_of_another_version_or_length_is_refused() {
        let bytes = receipt().to_bytes();
        assert_eq!(bytes.len(), Receipt::LENGTH);
        assert_eq!(
            Receipt::from_bytes(&[]),
            Err(NotAReceipt::Version { actual: None })
        );
        assert_eq!(
            Receipt::from_bytes(&[2]),
            Err(NotAReceipt::Version { actual: Some(2) })
        );
        for length in 1..bytes.len() {
            let expected = NotAReceipt::Length {
                expected: bytes.len(),
                actual: length,
            };
            assert_eq!(Receipt::from_bytes(&bytes[..length]), Err(expected));
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(Receipt::from_bytes(&longer).is_err());
    }
}
