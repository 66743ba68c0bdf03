//! The words of `types`, and back.

use super::{Host, Refused, cut};
use crate::bindings::types;
use fleecebox_contract::{Encoding, ErrorCode, Quota, RawRange};

impl types::Host for Host {
    fn convert_error_code(&mut self, refused: Refused) -> wasmtime::Result<types::ErrorCode> {
        match refused {
            Refused::Guest(code) => Ok(code.into()),
            Refused::Ended(error) => Err(error),
        }
    }
}

impl From<types::Extent> for RawRange {
    fn from(range: types::Extent) -> Self {
        Self {
            offset: range.offset,
            length: range.length,
        }
    }
}

impl From<types::Encoding> for Encoding {
    fn from(encoding: types::Encoding) -> Self {
        match encoding {
            types::Encoding::Identity => Self::Identity,
            types::Encoding::Zstd => Self::Zstd,
        }
    }
}

impl From<ErrorCode> for types::ErrorCode {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Cancelled => Self::Cancelled,
            ErrorCode::Discarded => Self::Discarded,
            ErrorCode::Exists => Self::Exists,
            ErrorCode::Io => Self::Io,
            ErrorCode::InvalidName => Self::InvalidName,
            ErrorCode::NotDirty => Self::NotDirty,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::OutOfRange => Self::OutOfRange,
            ErrorCode::QuotaExceeded(quota) => Self::QuotaExceeded(match quota {
                Quota::Objects => types::Quota::Objects,
                Quota::OutputBytes => types::Quota::OutputBytes,
                Quota::ReadBytes => types::Quota::ReadBytes,
            }),
            ErrorCode::TooLarge => Self::TooLarge,
            ErrorCode::Other(text) => Self::Other(text),
        }
    }
}

/// A guest's own error, its text cut to what a message takes.
impl From<types::ErrorCode> for ErrorCode {
    fn from(code: types::ErrorCode) -> Self {
        match code {
            types::ErrorCode::Cancelled => Self::Cancelled,
            types::ErrorCode::Discarded => Self::Discarded,
            types::ErrorCode::Exists => Self::Exists,
            types::ErrorCode::Io => Self::Io,
            types::ErrorCode::InvalidName => Self::InvalidName,
            types::ErrorCode::NotDirty => Self::NotDirty,
            types::ErrorCode::NotFound => Self::NotFound,
            types::ErrorCode::OutOfRange => Self::OutOfRange,
            types::ErrorCode::QuotaExceeded(quota) => Self::QuotaExceeded(match quota {
                types::Quota::Objects => Quota::Objects,
                types::Quota::OutputBytes => Quota::OutputBytes,
                types::Quota::ReadBytes => Quota::ReadBytes,
            }),
            types::ErrorCode::TooLarge => Self::TooLarge,
            types::ErrorCode::Other(text) => Self::Other(text.map(cut)),
        }
    }
}
