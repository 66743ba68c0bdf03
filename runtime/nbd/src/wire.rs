//! NBD's messages as bytes. No I/O happens here, and no input makes anything panic.

use super::error::{ErrorCode, Refusal, Violation};
use bytes::{Buf, BufMut};
use std::fmt;

/// Longest string of the protocol ("Values": strings), in bytes.
pub const MAX_STRING: usize = 4096;
/// Longest reply to an option that is received: a string and the few numbers before it.
pub(super) const MAX_OPTION_REPLY: u32 = 16 + MAX_STRING as u32;
/// Longest error chunk that is received: an error, a message and an offset.
pub(super) const MAX_ERROR_CHUNK: u64 = 14 + MAX_STRING as u64;
/// Most payload in one request that every server takes ("Block size constraints"), in bytes.
pub const MAX_PAYLOAD: u32 = 32 << 20;

pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`, of the server as of the client.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

pub const FLAG_READ_ONLY: u16 = 1 << 1;
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
pub const FLAG_SEND_DF: u16 = 1 << 7;
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

pub const REP_ACK: u32 = 1;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const REP_ERROR: u32 = 1 << 31;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// `NBD_CMD_FLAG_DF`: a read is answered in one chunk.
pub(super) const COMMAND_FLAG_DF: u16 = 1 << 2;

pub const REPLY_FLAG_DONE: u16 = 1 << 0;

/// `NBD_REPLY_TYPE_*`: the types of chunks.
pub(super) const CHUNK_NONE: u16 = 0;
pub const CHUNK_OFFSET_DATA: u16 = 1;
pub(super) const CHUNK_OFFSET_HOLE: u16 = 2;
pub const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
pub(super) const CHUNK_ERROR_OFFSET: u16 = CHUNK_ERROR_BIT | 2;
/// Set in the type of every error chunk, also of those that are still to be invented.
pub const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// Bytes of the server's greeting.
pub(super) const GREETING_BYTES: usize = 18;
/// Bytes of the header of a reply to an option.
pub(super) const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// What a client asks during the handshake (`NBD_OPT_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Negotiation {
    /// `NBD_OPT_GO`: opens the export.
    Go = 7,
    /// `NBD_OPT_STRUCTURED_REPLY`.
    StructuredReply = 8,
    /// `NBD_OPT_SET_META_CONTEXT`: chooses what block status tells.
    SetMetaContext = 10,
    /// `NBD_OPT_EXTENDED_HEADERS`: 64-bit lengths.
    ExtendedHeaders = 11,
}

impl fmt::Display for Negotiation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Go => "NBD_OPT_GO",
            Self::StructuredReply => "NBD_OPT_STRUCTURED_REPLY",
            Self::SetMetaContext => "NBD_OPT_SET_META_CONTEXT",
            Self::ExtendedHeaders => "NBD_OPT_EXTENDED_HEADERS",
        })
    }
}

/// What a client asks of an export (`NBD_CMD_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// `NBD_CMD_READ`.
    Read = 0,
    /// `NBD_CMD_DISC`: the client leaves; it has no reply.
    Disconnect = 2,
    /// `NBD_CMD_FLUSH`.
    Flush = 3,
    /// `NBD_CMD_TRIM`.
    Trim = 4,
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus = 7,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "NBD_CMD_READ",
            Self::Disconnect => "NBD_CMD_DISC",
            Self::Flush => "NBD_CMD_FLUSH",
            Self::Trim => "NBD_CMD_TRIM",
            Self::BlockStatus => "NBD_CMD_BLOCK_STATUS",
        })
    }
}

/// How requests and replies look on a connection, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Headers {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests; structured replies, and simple ones where they carry nothing.
    Structured,
    /// Extended requests and replies, with 64-bit lengths.
    Extended,
}

impl Headers {
    /// Longest range in whole `min_block`s, a power of two, that one request may name if its reply has
    /// no payload.
    pub(super) fn longest_effect(self, min_block: u32) -> u64 {
        match self {
            Self::Simple | Self::Structured => u64::from(!(min_block - 1)),
            Self::Extended => u64::MAX,
        }
    }

    /// Appends a request, or says the longest length that it can carry.
    pub(super) fn encode_request(self, into: &mut Vec<u8>, request: Request) -> Result<(), u64> {
        let Request {
            command,
            flags,
            cookie,
            offset,
            length,
        } = request;
        let compact_length = match self {
            Self::Simple | Self::Structured => {
                Some(u32::try_from(length).map_err(|_| u64::from(u32::MAX))?)
            }
            Self::Extended => None,
        };
        into.put_u32(if compact_length.is_some() {
            REQUEST_MAGIC
        } else {
            EXTENDED_REQUEST_MAGIC
        });
        into.put_u16(flags);
        into.put_u16(command as u16);
        into.put_u64(cookie);
        into.put_u64(offset);
        match compact_length {
            Some(length) => into.put_u32(length),
            None => into.put_u64(length),
        }
        Ok(())
    }

    /// The shape of the reply that begins with `magic`, if such replies were negotiated.
    pub(super) fn reply_shape(self, magic: u32) -> Result<ReplyShape, Violation> {
        match (self, magic) {
            (Self::Simple | Self::Structured, SIMPLE_REPLY_MAGIC) => Ok(ReplyShape::Simple),
            (Self::Structured, STRUCTURED_REPLY_MAGIC) => Ok(ReplyShape::Structured),
            (Self::Extended, EXTENDED_REPLY_MAGIC) => Ok(ReplyShape::Extended),
            _ => Err(Violation::ReplyMagic(magic)),
        }
    }
}

/// A request, of which no payload follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) command: Command,
    /// `NBD_CMD_FLAG_*`.
    pub(super) flags: u16,
    /// What the reply will carry.
    pub(super) cookie: u64,
    /// First byte.
    pub(super) offset: u64,
    /// Bytes that are read, trimmed or described.
    pub(super) length: u64,
}

/// The form of a reply's header, which its magic number tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyShape {
    Simple,
    Structured,
    Extended,
}

impl ReplyShape {
    /// Most bytes of a header after its magic number.
    pub(super) const LONGEST: usize = 28;

    /// Bytes of the header after its magic number.
    pub(super) fn length(self) -> usize {
        match self {
            Self::Simple => 12,
            Self::Structured => 16,
            Self::Extended => Self::LONGEST,
        }
    }

    /// Parses the header after its magic number, or nothing if it is too short.
    pub(super) fn parse(self, mut bytes: &[u8]) -> Option<Reply> {
        let bytes = &mut bytes;
        Some(if self == Self::Simple {
            let error = bytes.try_get_u32().ok()?;
            Reply {
                cookie: bytes.try_get_u64().ok()?,
                body: ReplyBody::Simple {
                    error: failure(error),
                },
            }
        } else {
            let done = bytes.try_get_u16().ok()? & REPLY_FLAG_DONE != 0;
            let kind = bytes.try_get_u16().ok()?;
            let cookie = bytes.try_get_u64().ok()?;
            let (offset, length) = if self == Self::Extended {
                (Some(bytes.try_get_u64().ok()?), bytes.try_get_u64().ok()?)
            } else {
                (None, u64::from(bytes.try_get_u32().ok()?))
            };
            Reply {
                cookie,
                body: ReplyBody::Chunk(Chunk {
                    done,
                    kind,
                    offset,
                    length,
                }),
            }
        })
    }
}

/// A reply's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    /// Which request it answers.
    pub(super) cookie: u64,
    pub(super) body: ReplyBody,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyBody {
    /// The whole answer; a successful read's bytes follow.
    Simple { error: Option<ErrorCode> },
    /// One of several pieces; `length` bytes follow.
    Chunk(Chunk),
}

/// The header of a chunk of a structured or extended reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    /// It is the last of its reply.
    pub(super) done: bool,
    /// One of `NBD_REPLY_TYPE_*`.
    pub(super) kind: u16,
    /// The request's offset, which only extended headers repeat.
    pub(super) offset: Option<u64>,
    /// Bytes that follow.
    pub(super) length: u64,
}

/// The first message of the server, of [`GREETING_BYTES`]; what is to be answered to its flags.
pub(super) fn parse_greeting(mut bytes: &[u8]) -> Result<[u8; 4], Violation> {
    for expected in [INIT_MAGIC, OPTION_MAGIC] {
        let actual = bytes.try_get_u64().unwrap_or(0);
        if actual != expected {
            return Err(Violation::HandshakeMagic { expected, actual });
        }
    }
    let flags = bytes.try_get_u16().unwrap_or(0);
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(Violation::NotFixedNewstyle);
    }
    Ok(u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).to_be_bytes())
}

/// An option with what belongs to it; the strings are at most [`MAX_STRING`] long.
pub(super) fn encode_option(option: Negotiation, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.put_u64(OPTION_MAGIC);
    bytes.put_u32(option as u32);
    bytes.put_u32(data.len() as u32); // two strings at most, of 4096 bytes
    bytes.put_slice(data);
    bytes
}

/// The data of `NBD_OPT_GO` that asks for the block sizes.
pub(super) fn encode_go(export: &str) -> Vec<u8> {
    let mut data = Vec::with_capacity(8 + export.len());
    put_string(&mut data, export);
    data.put_u16(1);
    data.put_u16(INFO_BLOCK_SIZE);
    data
}

/// The data of `NBD_OPT_SET_META_CONTEXT` for one context.
pub(super) fn encode_set_meta_context(export: &str, context: &str) -> Vec<u8> {
    let mut data = Vec::with_capacity(12 + export.len() + context.len());
    put_string(&mut data, export);
    data.put_u32(1);
    put_string(&mut data, context);
    data
}

fn put_string(into: &mut Vec<u8>, string: &str) {
    into.put_u32(string.len() as u32); // at most MAX_STRING
    into.put_slice(string.as_bytes());
}

/// The header of a reply to `option`: its type and length, the length being at most [`MAX_OPTION_REPLY`].
pub(super) fn parse_option_reply_header(
    option: Negotiation,
    mut bytes: &[u8],
) -> Result<(u32, u32), Violation> {
    let short = |_| Violation::OptionReplyMalformed(option);
    let magic = bytes.try_get_u64().map_err(short)?;
    if magic != OPTION_REPLY_MAGIC {
        return Err(Violation::HandshakeMagic {
            expected: OPTION_REPLY_MAGIC,
            actual: magic,
        });
    }
    let answered = bytes.try_get_u32().map_err(short)?;
    if answered != option as u32 {
        return Err(Violation::OptionReplyTo {
            expected: option as u32,
            actual: answered,
        });
    }
    let reply = bytes.try_get_u32().map_err(short)?;
    let length = bytes.try_get_u32().map_err(short)?;
    if length > MAX_OPTION_REPLY {
        return Err(Violation::OptionReplyTooLong {
            length,
            max: MAX_OPTION_REPLY,
        });
    }
    Ok((reply, length))
}

/// What a server replies to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum OptionReply<'a> {
    /// The option is done.
    Acknowledged,
    /// `NBD_INFO_EXPORT`.
    Export { size: u64, flags: TransmissionFlags },
    /// `NBD_INFO_BLOCK_SIZE`, unchecked.
    BlockSize { min: u32, preferred: u32, max: u32 },
    /// Something about the export that was not asked for.
    OtherInfo,
    /// A granted context.
    MetaContext { id: u32, name: &'a [u8] },
    /// The option is refused.
    Refused { reason: Refusal, message: &'a [u8] },
}

/// Parses the data of a reply of the type `reply` to `option`.
pub(super) fn parse_option_reply(
    option: Negotiation,
    reply: u32,
    mut data: &[u8],
) -> Result<OptionReply<'_>, Violation> {
    let malformed = || Violation::OptionReplyMalformed(option);
    let short = |_| malformed();
    let parsed = match (option, reply) {
        (_, REP_ACK) => OptionReply::Acknowledged,
        (Negotiation::Go, REP_INFO) => match data.try_get_u16().map_err(short)? {
            INFO_EXPORT => OptionReply::Export {
                size: data.try_get_u64().map_err(short)?,
                flags: TransmissionFlags(data.try_get_u16().map_err(short)?),
            },
            INFO_BLOCK_SIZE => OptionReply::BlockSize {
                min: data.try_get_u32().map_err(short)?,
                preferred: data.try_get_u32().map_err(short)?,
                max: data.try_get_u32().map_err(short)?,
            },
            _ => return Ok(OptionReply::OtherInfo),
        },
        (Negotiation::SetMetaContext, REP_META_CONTEXT) => {
            let id = data.try_get_u32().map_err(short)?;
            return Ok(OptionReply::MetaContext { id, name: data });
        }
        (_, error) if error & REP_ERROR != 0 => {
            return Ok(OptionReply::Refused {
                reason: refusal(error),
                message: data,
            });
        }
        _ => return Err(Violation::OptionReplyType { option, reply }),
    };
    if data.is_empty() {
        Ok(parsed)
    } else {
        Err(malformed())
    }
}

fn refusal(reply: u32) -> Refusal {
    match reply & !REP_ERROR {
        1 => Refusal::Unsupported,
        2 => Refusal::Policy,
        3 => Refusal::Invalid,
        4 => Refusal::Platform,
        5 => Refusal::TlsRequired,
        6 => Refusal::UnknownExport,
        7 => Refusal::Shutdown,
        8 => Refusal::BlockSizeRequired,
        9 => Refusal::TooBig,
        10 => Refusal::ExtendedHeadersRequired,
        _ => Refusal::Other(reply),
    }
}

/// What an export can do ("Transmission flags").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TransmissionFlags(u16);

impl TransmissionFlags {
    pub(super) fn read_only(self) -> bool {
        self.0 & FLAG_READ_ONLY != 0
    }

    pub(super) fn can_flush(self) -> bool {
        self.0 & FLAG_SEND_FLUSH != 0
    }

    pub(super) fn can_trim(self) -> bool {
        self.0 & FLAG_SEND_TRIM != 0 && !self.read_only()
    }

    pub(super) fn can_read_unfragmented(self) -> bool {
        self.0 & FLAG_SEND_DF != 0
    }

    pub(super) fn can_multi_conn(self) -> bool {
        self.0 & FLAG_CAN_MULTI_CONN != 0
    }
}

/// The payload of an error chunk: the error, and the server's words.
pub(super) fn parse_error_chunk(
    kind: u16,
    mut payload: &[u8],
) -> Result<ChunkError<'_>, Violation> {
    let short = |_| Violation::ErrorChunkMalformed;
    let error = payload.try_get_u32().map_err(short)?;
    let length = usize::from(payload.try_get_u16().map_err(short)?);
    let code = failure(error).ok_or(Violation::ErrorChunkMalformed)?;
    let (message, mut rest) = payload
        .split_at_checked(length)
        .ok_or(Violation::ErrorChunkMalformed)?;
    let offset = if kind == CHUNK_ERROR_OFFSET {
        Some(rest.try_get_u64().map_err(short)?)
    } else {
        None
    };
    Ok(ChunkError {
        code,
        message,
        offset,
    })
}

/// What an error chunk says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkError<'a> {
    pub(super) code: ErrorCode,
    pub(super) message: &'a [u8],
    /// Where it happened, for `NBD_REPLY_TYPE_ERROR_OFFSET`.
    pub(super) offset: Option<u64>,
}

fn failure(error: u32) -> Option<ErrorCode> {
    (error != 0).then(|| ErrorCode::from_wire(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn negotiation() -> impl Strategy<Value = Negotiation> {
        prop_oneof![
            Just(Negotiation::Go),
            Just(Negotiation::StructuredReply),
            Just(Negotiation::SetMetaContext),
            Just(Negotiation::ExtendedHeaders),
        ]
    }

    fn headers() -> impl Strategy<Value = Headers> {
        prop_oneof![
            Just(Headers::Simple),
            Just(Headers::Structured),
            Just(Headers::Extended)
        ]
    }

    #[test]
    fn requests_have_the_bytes_of_the_protocol() {
        let request = Request {
            command: Command::Trim,
            flags: 0,
            cookie: 7,
            offset: 0x1000,
            length: 0x200,
        };
        let mut compact = Vec::new();
        Headers::Structured
            .encode_request(&mut compact, request)
            .unwrap();
        assert_eq!(
            hex::encode(compact),
            "25609513000000040000000000000007000000000000100000000200"
        );
        let mut read = Vec::new();
        let flagged = Request {
            command: Command::Read,
            flags: COMMAND_FLAG_DF,
            ..request
        };
        Headers::Structured
            .encode_request(&mut read, flagged)
            .unwrap();
        assert_eq!(
            hex::encode(read),
            "25609513000400000000000000000007000000000000100000000200"
        );
        let mut extended = Vec::new();
        let long = Request {
            command: Command::BlockStatus,
            length: 1 << 40,
            ..request
        };
        Headers::Extended
            .encode_request(&mut extended, long)
            .unwrap();
        assert_eq!(
            hex::encode(extended),
            "21e41c7100000007000000000000000700000000000010000000010000000000"
        );
    }

    #[test]
    fn options_have_the_bytes_of_the_protocol() {
        assert_eq!(
            hex::encode(encode_option(Negotiation::Go, &encode_go("ab"))),
            "49484156454f5054000000070000000a00000002616200010003"
        );
        assert_eq!(
            hex::encode(encode_set_meta_context("a", "b:c")),
            "00000001610000000100000003623a63"
        );
    }

    #[test]
    fn a_length_over_32_bits_needs_extended_headers() {
        let mut bytes = Vec::new();
        let length = u64::from(u32::MAX) + 1;
        let request = Request {
            command: Command::Trim,
            flags: 0,
            cookie: 0,
            offset: 0,
            length,
        };
        assert_eq!(
            Headers::Structured.encode_request(&mut bytes, request),
            Err(u64::from(u32::MAX))
        );
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_greeting_without_fixed_newstyle_is_refused() {
        let greeting = |flags: u16| [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat();
        assert_eq!(parse_greeting(&greeting(3)), Ok([0, 0, 0, 3]));
        assert_eq!(parse_greeting(&greeting(0xfff1)), Ok([0, 0, 0, 1]));
        assert_eq!(
            parse_greeting(&greeting(2)),
            Err(Violation::NotFixedNewstyle)
        );
        assert!(matches!(
            parse_greeting(b"SSH-2.0-x"),
            Err(Violation::HandshakeMagic { .. })
        ));
    }

    #[test]
    fn a_reply_of_a_style_that_was_not_negotiated_is_refused() {
        for (headers, allowed) in [
            (Headers::Simple, &[SIMPLE_REPLY_MAGIC][..]),
            (
                Headers::Structured,
                &[SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC],
            ),
            (Headers::Extended, &[EXTENDED_REPLY_MAGIC]),
        ] {
            for magic in [
                SIMPLE_REPLY_MAGIC,
                STRUCTURED_REPLY_MAGIC,
                EXTENDED_REPLY_MAGIC,
                0,
            ] {
                assert_eq!(
                    headers.reply_shape(magic).is_ok(),
                    allowed.contains(&magic),
                    "{headers:?} {magic:#x}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..64),
            option in negotiation(),
            reply in prop_oneof![0u32..6, (0u32..12).prop_map(|n| REP_ERROR | n), any::<u32>()],
            kind: u16,
        ) {
            let _ = parse_greeting(&bytes);
            let _ = parse_option_reply_header(option, &bytes);
            let _ = parse_option_reply(option, reply, &bytes);
            if let Ok(error) = parse_error_chunk(kind, &bytes) {
                prop_assert!(error.message.len() <= bytes.len());
            }
            for shape in [ReplyShape::Simple, ReplyShape::Structured, ReplyShape::Extended] {
                prop_assert_eq!(shape.parse(&bytes).is_some(), bytes.len() >= shape.length());
            }
        }

        #[test]
        fn option_replies_that_are_accepted_are_short(option in negotiation(), reply: u32, length: u32) {
            let mut bytes = Vec::new();
            bytes.put_u64(OPTION_REPLY_MAGIC);
            bytes.put_u32(option as u32);
            bytes.put_u32(reply);
            bytes.put_u32(length);
            match parse_option_reply_header(option, &bytes) {
                Ok(parsed) => prop_assert!(parsed == (reply, length) && length <= MAX_OPTION_REPLY),
                Err(_) => prop_assert!(length > MAX_OPTION_REPLY),
            }
        }

        #[test]
        fn chunk_headers_keep_their_fields(done: bool, kind: u16, cookie: u64, offset: u64, length: u32) {
            let mut bytes = Vec::new();
            bytes.put_u16(u16::from(done));
            bytes.put_u16(kind);
            bytes.put_u64(cookie);
            let mut extended = bytes.clone();
            bytes.put_u32(length);
            extended.put_u64(offset);
            extended.put_u64(u64::from(length) << 20);
            let structured = Chunk { done, kind, offset: None, length: u64::from(length) };
            prop_assert_eq!(
                ReplyShape::Structured.parse(&bytes),
                Some(Reply { cookie, body: ReplyBody::Chunk(structured) })
            );
            let chunk = Chunk { done, kind, offset: Some(offset), length: u64::from(length) << 20 };
            prop_assert_eq!(ReplyShape::Extended.parse(&extended), Some(Reply { cookie, body: ReplyBody::Chunk(chunk) }));
        }

        #[test]
        fn requests_keep_their_fields(headers in headers(), cookie: u64, offset: u64, length: u32) {
            let mut bytes = Vec::new();
            let request = Request { command: Command::Read, flags: 0, cookie, offset, length: length.into() };
            headers.encode_request(&mut bytes, request).unwrap();
            let mut rest = &bytes[8..];
            prop_assert_eq!((rest.get_u64(), rest.get_u64()), (cookie, offset));
            let carried = if headers == Headers::Extended { rest.get_u64() } else { u64::from(rest.get_u32()) };
            prop_assert!(rest.is_empty());
            prop_assert_eq!(carried, u64::from(length));
        }
    }
}
