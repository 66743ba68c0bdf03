//! What can go wrong with a server.

use super::wire::{Command, Negotiation};
use fleecebox_contract::extent::Extent;
use std::{fmt, io, sync::Arc, time::Duration};

/// A server's own words are cut off behind the character that passes this length in bytes, after escaping.
const SHOWN_MESSAGE: usize = 256;

/// Why a connection could not be made, or a request failed.
///
/// It can be cloned, because the end of a connection is the error of every request that waits on it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The socket failed, or the server closed it.
    #[error("the connection to the NBD server is lost")]
    Lost(#[source] Arc<io::Error>),
    /// This side ended the connection with [`disconnect`](super::Connection::disconnect).
    #[error("the connection to the NBD server was closed by this side")]
    Disconnected,
    /// The server took too long to negotiate.
    #[error("the NBD server did not finish the handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// The server did what the protocol forbids; the connection is closed.
    #[error("the NBD server broke the protocol")]
    Violation(#[from] Violation),
    /// The server refused something that this connection cannot do without.
    #[error("the NBD server refused {option}: {reason}{}", Said(message))]
    Refused {
        /// What was asked.
        option: Negotiation,
        /// The server's reason.
        reason: Refusal,
        /// The server's own words, shortened and escaped; may be empty.
        message: String,
    },
    /// The server does not know the meta context that was asked for on this export.
    #[error("the NBD server has no meta context {0:?} on this export")]
    NoSuchContext(String),
    /// The server answered a request with an error.
    #[error("{command} of {extent} failed with {code}{}", Said(message))]
    Answered {
        /// What was asked.
        command: Command,
        /// Which bytes it was asked for.
        extent: Extent,
        /// The server's error.
        code: ErrorCode,
        /// The server's own words, shortened and escaped; may be empty.
        message: String,
    },
    /// The request ends past the end of the export.
    #[error("{extent} is not inside the export of {size} bytes")]
    OutOfBounds {
        /// Which bytes were asked for.
        extent: Extent,
        /// Size of the export in bytes.
        size: u64,
    },
    /// The request is longer than the server or the protocol takes.
    #[error("{extent} is longer than the {max} bytes that one request may carry")]
    TooLong {
        /// Which bytes were asked for.
        extent: Extent,
        /// Most bytes that one request may carry.
        max: u64,
    },
    /// The request is not made of whole minimum blocks of the server.
    #[error("{extent} is not made of whole blocks of {min_block} bytes")]
    Misaligned {
        /// Which bytes were asked for.
        extent: Extent,
        /// The server's minimum block in bytes.
        min_block: u32,
    },
    /// The export is read-only or does not take `NBD_CMD_TRIM`.
    #[error("the NBD export cannot be trimmed")]
    CannotTrim,
    /// Block status was asked on a connection made without a meta context.
    #[error("this NBD connection was made without a meta context")]
    WithoutContext,
    /// A range has more status runs than one answer may hold; ask for a shorter range.
    #[error("{extent} has more than {limit} runs of block status")]
    TooManyRuns {
        /// Which bytes were asked for.
        extent: Extent,
        /// Most runs that one answer holds.
        limit: usize,
    },
    /// A name is longer than the protocol takes.
    #[error("a name of {length} bytes is longer than the {max} that NBD takes")]
    NameTooLong {
        /// Length of the name in bytes.
        length: usize,
        /// Most bytes that a string may have.
        max: usize,
    },
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Lost(Arc::new(error))
    }
}

/// The rule of the protocol that a server broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message of the handshake does not begin with its magic number.
    #[error("expected the magic number {expected:#x} of the handshake, got {actual:#x}")]
    HandshakeMagic {
        /// What the protocol says.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// The server does not speak the fixed newstyle handshake (`NBD_FLAG_FIXED_NEWSTYLE`).
    #[error("the server does not offer the fixed newstyle handshake")]
    NotFixedNewstyle,
    /// A reply to another option than the one that was sent.
    #[error("a reply to option {actual} where option {expected} was sent")]
    OptionReplyTo {
        /// The option that was sent.
        expected: u32,
        /// The option that was answered.
        actual: u32,
    },
    /// A reply type that the option does not have.
    #[error("reply type {reply:#x} to {option}")]
    OptionReplyType {
        /// The option that was sent.
        option: Negotiation,
        /// The reply's type.
        reply: u32,
    },
    /// A reply to an option is longer than its strings may be.
    #[error("a reply of {length} bytes to an option, where {max} are the most")]
    OptionReplyTooLong {
        /// What the server announced.
        length: u32,
        /// Most bytes that such a reply may have.
        max: u32,
    },
    /// A reply to an option does not have the length or form that its type has.
    #[error("a malformed reply to {0}")]
    OptionReplyMalformed(Negotiation),
    /// More replies to one option than make sense.
    #[error("endless replies to {0}")]
    OptionRepliesEndless(Negotiation),
    /// `NBD_OPT_GO` was acknowledged without `NBD_INFO_EXPORT`.
    #[error("the export was opened without saying its size")]
    NoExportInfo,
    /// The export's size does not fit in a signed 64-bit number.
    #[error("an export of {0} bytes")]
    ExportTooLarge(u64),
    /// The minimum, preferred and maximum block sizes contradict the rules of "Block size constraints".
    #[error("impossible block sizes: minimum {min}, preferred {preferred}, maximum {max}")]
    BlockSizes {
        /// Minimum, in bytes.
        min: u32,
        /// Preferred, in bytes.
        preferred: u32,
        /// Maximum, in bytes.
        max: u32,
    },
    /// A meta context was granted that was not asked for, or twice.
    #[error("a meta context was granted that was not asked for")]
    ForeignContext,
    /// A reply begins with a magic number that was not negotiated.
    #[error("a reply with the magic number {0:#x}, which was not negotiated")]
    ReplyMagic(u32),
    /// A reply to a cookie that no waiting request has.
    #[error("a reply to the cookie {0}, which no request waits for")]
    UnknownCookie(u64),
    /// An extended reply whose offset is not the request's.
    #[error("a reply for offset {actual} to a request at {expected}")]
    ReplyOffset {
        /// The request's offset.
        expected: u64,
        /// The reply's offset.
        actual: u64,
    },
    /// A successful read was answered with a simple reply though structured replies were negotiated.
    #[error("a simple reply to a read where structured replies were negotiated")]
    SimpleReplyToRead,
    /// A chunk of a type that the command does not have.
    #[error("a chunk of type {kind:#x} in the reply to {command}")]
    ChunkType {
        /// What was asked.
        command: Command,
        /// The chunk's type.
        kind: u16,
    },
    /// A chunk whose length its type, or the request, cannot have.
    #[error("a chunk of type {kind:#x} with {length} bytes")]
    ChunkLength {
        /// The chunk's type.
        kind: u16,
        /// What the server announced.
        length: u64,
    },
    /// A chunk of type `NBD_REPLY_TYPE_NONE` that is not the last.
    #[error("an empty chunk that does not end its reply")]
    EmptyChunkNotLast,
    /// A chunk that describes no byte, or bytes that were not asked for.
    #[error("a chunk of {length} bytes at {offset} in the reply to a read of {extent}")]
    ChunkOutside {
        /// Which bytes were asked for.
        extent: Extent,
        /// Where the chunk begins.
        offset: u64,
        /// How many bytes it describes.
        length: u64,
    },
    /// A chunk that describes bytes which an earlier chunk of the same reply described.
    #[error("overlapping chunks at {chunk} in the reply to a read of {extent}")]
    ChunksOverlap {
        /// Which bytes were asked for.
        extent: Extent,
        /// The later chunk.
        chunk: Extent,
    },
    /// Chunks far smaller than the 512 bytes that "Structured reply chunk message" asks for.
    #[error("more than {limit} chunks in the reply to a read of {extent}")]
    TooManyChunks {
        /// Which bytes were asked for.
        extent: Extent,
        /// Most chunks that are taken.
        limit: u64,
    },
    /// A read was said to be done with bytes missing.
    #[error("a read of {extent} ended after {received} bytes")]
    ReadIncomplete {
        /// Which bytes were asked for.
        extent: Extent,
        /// How many of them came.
        received: u64,
    },
    /// An error chunk with error 0, or with a message longer than the chunk.
    #[error("a malformed error chunk")]
    ErrorChunkMalformed,
    /// Block status of another context than the negotiated one.
    #[error("block status of context {actual}, where {expected} was negotiated")]
    StatusContext {
        /// The id that was negotiated.
        expected: u32,
        /// The id that came.
        actual: u32,
    },
    /// Block status with a run of no bytes, or with runs behind the end of the request.
    #[error("block status of {extent} with a run of {length} bytes at {offset}")]
    StatusRun {
        /// Which bytes were asked for.
        extent: Extent,
        /// Where the run begins.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// Block status ended without a status chunk, or came with two.
    #[error("{count} status chunks for one context in the reply to {extent}")]
    StatusChunks {
        /// Which bytes were asked for.
        extent: Extent,
        /// How many chunks came.
        count: u32,
    },
}

/// Why a server refused an option (`NBD_REP_ERR_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `NBD_REP_ERR_UNSUP`: the server does not know the option.
    Unsupported,
    /// `NBD_REP_ERR_POLICY`: the server's configuration forbids it.
    Policy,
    /// `NBD_REP_ERR_INVALID`: the option was malformed or came at a wrong time.
    Invalid,
    /// `NBD_REP_ERR_PLATFORM`: the server's platform cannot do it.
    Platform,
    /// `NBD_REP_ERR_TLS_REQD`: only with TLS.
    TlsRequired,
    /// `NBD_REP_ERR_UNKNOWN`: no such export.
    UnknownExport,
    /// `NBD_REP_ERR_SHUTDOWN`: the server is going down.
    Shutdown,
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`: block sizes have to be negotiated.
    BlockSizeRequired,
    /// `NBD_REP_ERR_TOO_BIG`: the option is too long.
    TooBig,
    /// `NBD_REP_ERR_EXT_HEADER_REQD`: only with extended headers.
    ExtendedHeadersRequired,
    /// A reason that the protocol does not name.
    Other(u32),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "not supported",
            Self::Policy => "forbidden by policy",
            Self::Invalid => "invalid",
            Self::Platform => "not possible on its platform",
            Self::TlsRequired => "TLS is required",
            Self::UnknownExport => "no such export",
            Self::Shutdown => "the server is shutting down",
            Self::BlockSizeRequired => "block sizes must be negotiated",
            Self::TooBig => "too big",
            Self::ExtendedHeadersRequired => "extended headers are required",
            Self::Other(code) => return write!(f, "reason {code:#x}"),
        })
    }
}

/// An error that the server answered to a request ("Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// `NBD_EPERM`: not permitted.
    Eperm,
    /// `NBD_EIO`: input or output failed.
    Eio,
    /// `NBD_ENOMEM`: the server is out of memory.
    Enomem,
    /// `NBD_EINVAL`: invalid; QEMU's answer for a range that was discarded or that a snapshot denies.
    Einval,
    /// `NBD_ENOSPC`: no space left.
    Enospc,
    /// `NBD_EOVERFLOW`: too large for the server.
    Eoverflow,
    /// `NBD_ENOTSUP`: not supported; QEMU's answer once the backup job behind a snapshot is gone.
    Enotsup,
    /// `NBD_ESHUTDOWN`: the server is shutting down.
    Eshutdown,
    /// A number that the protocol does not name, to be taken as `NBD_EINVAL`.
    Other(u32),
}

impl ErrorCode {
    /// The error of a number on the wire, which is not 0.
    pub(super) fn from_wire(number: u32) -> Self {
        match number {
            1 => Self::Eperm,
            5 => Self::Eio,
            12 => Self::Enomem,
            22 => Self::Einval,
            28 => Self::Enospc,
            75 => Self::Eoverflow,
            95 => Self::Enotsup,
            108 => Self::Eshutdown,
            other => Self::Other(other),
        }
    }

    /// Its number on the wire.
    pub(super) fn to_wire(self) -> u32 {
        match self {
            Self::Eperm => 1,
            Self::Eio => 5,
            Self::Enomem => 12,
            Self::Einval => 22,
            Self::Enospc => 28,
            Self::Eoverflow => 75,
            Self::Enotsup => 95,
            Self::Eshutdown => 108,
            Self::Other(number) => number,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eperm => "EPERM",
            Self::Eio => "EIO",
            Self::Enomem => "ENOMEM",
            Self::Einval => "EINVAL",
            Self::Enospc => "ENOSPC",
            Self::Eoverflow => "EOVERFLOW",
            Self::Enotsup => "ENOTSUP",
            Self::Eshutdown => "ESHUTDOWN",
            Self::Other(number) => return write!(f, "error {number}"),
        })
    }
}

/// A server's words, fit for a log: what is no plain text is escaped, and the length is bounded.
pub(super) fn shown(message: &[u8]) -> String {
    let mut shown = String::new();
    for character in String::from_utf8_lossy(message).chars() {
        match character {
            '\'' | '"' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
        if shown.len() > SHOWN_MESSAGE {
            break;
        }
    }
    shown
}

/// `: message`, or nothing where there is none.
struct Said<'a>(&'a String);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_servers_words_are_bounded_and_hold_no_control_characters(message in prop::collection::vec(any::<u8>(), 0..1000)) {
            let shown = shown(&message);
            prop_assert!(shown.len() <= SHOWN_MESSAGE + 10); // the longest escape is \\u{10ffff}
            prop_assert!(!shown.chars().any(char::is_control));
        }
    }

    #[test]
    fn an_answered_error_names_the_command_the_range_and_the_code() {
        let error = Error::Answered {
            command: Command::Read,
            extent: Extent::new(4096, 512).unwrap(),
            code: ErrorCode::from_wire(22),
            message: shown(b"no\nway"),
        };
        assert_eq!(
            error.to_string(),
            "NBD_CMD_READ of 4096..4608 failed with EINVAL: no\\nway"
        );
    }
}
