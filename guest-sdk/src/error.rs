//! Why a call failed, and how an export says so.

use std::fmt::Display;
use std::io;

use crate::imports::types;

/// Why a call failed: the contract's `error-code`. Details of host failures go to the host's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The job was cancelled; return promptly. Every later call fails the same way.
    #[error("the job was cancelled")]
    Cancelled,
    /// The range was discarded and can no longer be read.
    #[error("the range was discarded")]
    Discarded,
    /// An object of that name exists in this backup.
    #[error("an object of that name exists")]
    Exists,
    /// Storage or the snapshot failed. The backup will not be committed.
    #[error("storage or the snapshot failed")]
    Io,
    /// The name is empty, too long, or not a single plain component.
    #[error("not a plain name")]
    InvalidName,
    /// Some byte of the range lies in no dirty region.
    #[error("the range is not part of what this backup covers")]
    NotDirty,
    /// There is no such object.
    #[error("there is no such object")]
    NotFound,
    /// The range is empty, overflows, ends past the end, or is not made of whole blocks.
    #[error("the range is empty, ends past the end, or is not made of whole blocks")]
    OutOfRange,
    /// The call would pass a limit of the policy.
    #[error("the limit on {0} is reached")]
    QuotaExceeded(Quota),
    /// The call carries more bytes than the host takes at once.
    #[error("more bytes than the host takes at once")]
    TooLarge,
    /// Anything else, in words.
    #[error("{}", .0.as_deref().unwrap_or("an error without a description"))]
    Other(Option<String>),
}

/// A limit that the host's policy sets: the contract's `quota`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Quota {
    /// Objects that one backup may hold.
    #[error("objects")]
    Objects,
    /// Bytes that one backup may store, before encoding.
    #[error("bytes stored")]
    OutputBytes,
    /// Bytes of volumes that one backup may read.
    #[error("bytes read")]
    ReadBytes,
}

impl Error {
    /// An error in the provider's own words: one line that the operator reads.
    ///
    /// ```
    /// # use fleecebox_guest::Error;
    /// let error = Error::other(format_args!("the receipt is of version {}", 7));
    /// assert_eq!(error.to_string(), "the receipt is of version 7");
    /// ```
    pub fn other(words: impl Display) -> Error {
        Error::Other(Some(words.to_string()))
    }
}

/// So that `?` works in code that reads and writes through [`io`]: an error that came from the host stays what it
/// was.
impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        match error.downcast::<Error>() {
            Ok(error) => error,
            Err(error) => Error::other(error),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match error {
            Error::Exists => io::ErrorKind::AlreadyExists,
            Error::InvalidName | Error::OutOfRange | Error::TooLarge => io::ErrorKind::InvalidInput,
            Error::NotFound => io::ErrorKind::NotFound,
            Error::QuotaExceeded(_) => io::ErrorKind::QuotaExceeded,
            Error::Cancelled | Error::Discarded | Error::Io | Error::NotDirty | Error::Other(_) => {
                io::ErrorKind::Other
            }
        };
        io::Error::new(kind, error)
    }
}

impl From<types::ErrorCode> for Error {
    fn from(code: types::ErrorCode) -> Error {
        match code {
            types::ErrorCode::Cancelled => Error::Cancelled,
            types::ErrorCode::Discarded => Error::Discarded,
            types::ErrorCode::Exists => Error::Exists,
            types::ErrorCode::Io => Error::Io,
            types::ErrorCode::InvalidName => Error::InvalidName,
            types::ErrorCode::NotDirty => Error::NotDirty,
            types::ErrorCode::NotFound => Error::NotFound,
            types::ErrorCode::OutOfRange => Error::OutOfRange,
            types::ErrorCode::QuotaExceeded(quota) => Error::QuotaExceeded(match quota {
                types::Quota::Objects => Quota::Objects,
                types::Quota::OutputBytes => Quota::OutputBytes,
                types::Quota::ReadBytes => Quota::ReadBytes,
            }),
            types::ErrorCode::TooLarge => Error::TooLarge,
            types::ErrorCode::Other(words) => Error::Other(words),
        }
    }
}

impl From<Error> for types::ErrorCode {
    fn from(error: Error) -> types::ErrorCode {
        match error {
            Error::Cancelled => types::ErrorCode::Cancelled,
            Error::Discarded => types::ErrorCode::Discarded,
            Error::Exists => types::ErrorCode::Exists,
            Error::Io => types::ErrorCode::Io,
            Error::InvalidName => types::ErrorCode::InvalidName,
            Error::NotDirty => types::ErrorCode::NotDirty,
            Error::NotFound => types::ErrorCode::NotFound,
            Error::OutOfRange => types::ErrorCode::OutOfRange,
            Error::QuotaExceeded(quota) => types::ErrorCode::QuotaExceeded(match quota {
                Quota::Objects => types::Quota::Objects,
                Quota::OutputBytes => types::Quota::OutputBytes,
                Quota::ReadBytes => types::Quota::ReadBytes,
            }),
            Error::TooLarge => types::ErrorCode::TooLarge,
            Error::Other(words) => types::ErrorCode::Other(words),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_way_through_io() {
        for error in [
            Error::QuotaExceeded(Quota::ReadBytes),
            Error::Io,
            Error::other("words"),
        ] {
            assert_eq!(Error::from(io::Error::from(error.clone())), error);
        }
    }

    #[test]
    fn an_error_of_io_itself_keeps_its_words() {
        let error = Error::from(io::Error::from(io::ErrorKind::UnexpectedEof));
        assert_eq!(error, Error::other("unexpected end of file"));
    }
}
