//! Reads up to a delimiter, but never more than a cap: neither QEMU nor a guest may fill our memory.

use std::io;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// How a read up to a delimiter ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// The delimiter was found; it is not part of the bytes.
    Whole,
    /// The peer closed the connection first.
    Closed,
    /// `cap` bytes came without the delimiter.
    TooLong,
}

/// Appends to `into` what comes before `delimiter`, at most `cap` bytes.
pub(super) async fn read_until(
    reader: &mut (impl AsyncBufRead + Unpin),
    delimiter: u8,
    cap: usize,
    into: &mut Vec<u8>,
) -> io::Result<Read> {
    let before = into.len();
    reader
        .take(cap as u64 + 1)
        .read_until(delimiter, into)
        .await?;
    Ok(if into.last() == Some(&delimiter) && into.len() > before {
        into.pop();
        Read::Whole
    } else if into.len() - before > cap {
        Read::TooLong
    } else {
        Read::Closed
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_line_is_whole_closed_or_too_long() {
        let mut reader: &[u8] = b"ab\ncdefgh";
        let mut bytes = Vec::new();
        assert_eq!(
            read_until(&mut reader, b'\n', 2, &mut bytes).await.unwrap(),
            Read::Whole
        );
        assert_eq!(bytes, b"ab");
        assert_eq!(
            read_until(&mut reader, b'\n', 3, &mut bytes).await.unwrap(),
            Read::TooLong
        );
        assert_eq!(
            read_until(&mut reader, b'\n', 3, &mut bytes).await.unwrap(),
            Read::Closed
        );
    }
}
