//! The newstyle handshake: what the connection will speak, and what the export is.

use super::{
    error::{Error, Refusal, Violation, shown},
    wire::{
        self, GREETING_BYTES, Headers, MAX_PAYLOAD, MAX_STRING, Negotiation,
        OPTION_REPLY_HEADER_BYTES, OptionReply, TransmissionFlags,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Most replies to one option that are read; a server has a handful of things to say.
const MAX_OPTION_REPLIES: u32 = 64;
/// Minimum block where the server does not say one ("Block size constraints"), in bytes.
const DEFAULT_MIN_BLOCK: u32 = 1;
/// Preferred block where the server does not say one, in bytes.
const DEFAULT_PREFERRED_BLOCK: u32 = 4096;
/// Largest minimum block that a server may have, in bytes.
const LARGEST_MIN_BLOCK: u32 = 64 << 10;
/// Smallest preferred block that a server may have, in bytes.
const SMALLEST_PREFERRED_BLOCK: u32 = 512;

/// What a server says about an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes, at most `i64::MAX`.
    pub size: u64,
    /// Whether `NBD_FLAG_READ_ONLY` is set.
    pub read_only: bool,
    /// Whether [`trim`](super::Connection::trim) can work: `NBD_FLAG_SEND_TRIM`, and not read-only.
    pub can_trim: bool,
    /// Whether [`flush`](super::Connection::flush) can work: `NBD_FLAG_SEND_FLUSH`.
    pub can_flush: bool,
    /// Whether what one connection did is seen by all others (`NBD_FLAG_CAN_MULTI_CONN`).
    pub can_multi_conn: bool,
    /// Requests begin and end on multiples of this, but for the export's end. In bytes, a power of two.
    pub min_block: u32,
    /// The server works best with multiples of this. In bytes, a power of two.
    pub preferred_block: u32,
    /// Longest read in bytes, a multiple of `min_block`, at most 32 MiB.
    pub max_block: u32,
}

/// What was negotiated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Session {
    pub(super) headers: Headers,
    pub(super) info: ExportInfo,
    /// The flags of every read.
    pub(super) read_flags: u16,
    /// The id of the meta context, where one was asked for.
    pub(super) context: Option<u32>,
}

/// Negotiates everything up to the transmission phase.
///
/// Reads exactly what the server says in the handshake, so that nothing of a reply is swallowed.
pub(super) async fn negotiate(
    stream: &mut UnixStream,
    export: &str,
    meta_context: Option<&str>,
) -> Result<Session, Error> {
    for name in [Some(export), meta_context].into_iter().flatten() {
        if name.len() > MAX_STRING {
            return Err(Error::NameTooLong {
                length: name.len(),
                max: MAX_STRING,
            });
        }
    }
    let mut greeting = [0; GREETING_BYTES];
    stream.read_exact(&mut greeting).await?;
    let client_flags = wire::parse_greeting(&greeting)?;
    stream.write_all(&client_flags).await?;

    let headers = choose_headers(stream).await?;
    let context = match meta_context {
        Some(name) => Some(set_meta_context(stream, export, name).await?),
        None => None,
    };
    let (info, flags) = go(stream, export).await?;
    // QEMU closes the connection when the disk fails within a read that it may answer in several
    // chunks, and answers the error when it may not. Holes are then sent as zeroes, but who wants
    // to skip them has asked for block status; asking again for each read costs QEMU time.
    let unfragmented = headers != Headers::Simple && flags.can_read_unfragmented();
    let read_flags = if unfragmented {
        wire::COMMAND_FLAG_DF
    } else {
        0
    };
    Ok(Session {
        headers,
        info,
        read_flags,
        context,
    })
}

/// The best headers that the server offers. Extended headers include structured replies.
async fn choose_headers(stream: &mut UnixStream) -> Result<Headers, Error> {
    for (option, headers) in [
        (Negotiation::ExtendedHeaders, Headers::Extended),
        (Negotiation::StructuredReply, Headers::Structured),
    ] {
        let mut exchange = Exchange::begin(stream, option, &[]).await?;
        match exchange.next().await {
            Ok(None) => return Ok(headers),
            Ok(Some(_)) => return Err(Violation::OptionReplyMalformed(option).into()),
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Headers::Simple)
}

/// Chooses the one meta context of the connection.
///
/// Only one: QEMU breaks a connection that negotiated allocation and a dirty bitmap together when
/// it comes to a range that it denies.
async fn set_meta_context(
    stream: &mut UnixStream,
    export: &str,
    context: &str,
) -> Result<u32, Error> {
    let data = wire::encode_set_meta_context(export, context);
    let mut exchange = Exchange::begin(stream, Negotiation::SetMetaContext, &data).await?;
    let mut granted = None;
    while let Some(reply) = exchange.next().await? {
        match reply {
            OptionReply::MetaContext { id, name }
                if name == context.as_bytes() && granted.is_none() =>
            {
                granted = Some(id);
            }
            _ => return Err(Violation::ForeignContext.into()),
        }
    }
    granted.ok_or_else(|| Error::NoSuchContext(context.to_owned()))
}

/// Opens the export.
async fn go(
    stream: &mut UnixStream,
    export: &str,
) -> Result<(ExportInfo, TransmissionFlags), Error> {
    let mut exchange = Exchange::begin(stream, Negotiation::Go, &wire::encode_go(export)).await?;
    let mut described = None;
    let mut blocks = (DEFAULT_MIN_BLOCK, DEFAULT_PREFERRED_BLOCK, MAX_PAYLOAD);
    while let Some(reply) = exchange.next().await? {
        match reply {
            OptionReply::Export { size, flags } => described = Some((size, flags)),
            OptionReply::BlockSize {
                min,
                preferred,
                max,
            } => blocks = (min, preferred, max),
            _ => {}
        }
    }
    let (size, flags) = described.ok_or(Violation::NoExportInfo)?;
    Ok((export_info(size, flags, blocks)?, flags))
}

fn export_info(
    size: u64,
    flags: TransmissionFlags,
    (min, preferred, max): (u32, u32, u32),
) -> Result<ExportInfo, Violation> {
    if i64::try_from(size).is_err() {
        return Err(Violation::ExportTooLarge(size));
    }
    let possible = min.is_power_of_two()
        && min <= LARGEST_MIN_BLOCK
        && preferred.is_power_of_two()
        && preferred >= min.max(SMALLEST_PREFERRED_BLOCK)
        && max >= min;
    if !possible {
        return Err(Violation::BlockSizes {
            min,
            preferred,
            max,
        });
    }
    Ok(ExportInfo {
        size,
        read_only: flags.read_only(),
        can_trim: flags.can_trim(),
        can_flush: flags.can_flush(),
        can_multi_conn: flags.can_multi_conn(),
        min_block: min,
        preferred_block: preferred,
        max_block: max.min(MAX_PAYLOAD) & !(min - 1),
    })
}

/// One option that was sent, and the replies to it.
struct Exchange<'a> {
    stream: &'a mut UnixStream,
    option: Negotiation,
    data: Vec<u8>,
    replies: u32,
}

impl<'a> Exchange<'a> {
    async fn begin(
        stream: &'a mut UnixStream,
        option: Negotiation,
        data: &[u8],
    ) -> Result<Self, Error> {
        stream.write_all(&wire::encode_option(option, data)).await?;
        Ok(Self {
            stream,
            option,
            data: Vec::new(),
            replies: 0,
        })
    }

    /// The next reply; nothing once the option is acknowledged; an error if it is refused.
    async fn next(&mut self) -> Result<Option<OptionReply<'_>>, Error> {
        self.replies += 1;
        if self.replies > MAX_OPTION_REPLIES {
            return Err(Violation::OptionRepliesEndless(self.option).into());
        }
        let mut header = [0; OPTION_REPLY_HEADER_BYTES];
        self.stream.read_exact(&mut header).await?;
        let (reply, length) = wire::parse_option_reply_header(self.option, &header)?;
        self.data.resize(length as usize, 0); // the parser bounds it
        self.stream.read_exact(&mut self.data).await?;
        match wire::parse_option_reply(self.option, reply, &self.data)? {
            OptionReply::Acknowledged => Ok(None),
            OptionReply::Refused { reason, message } => Err(self.refused(reason, message)),
            other => Ok(Some(other)),
        }
    }

    fn refused(&self, reason: Refusal, message: &[u8]) -> Error {
        Error::Refused {
            option: self.option,
            reason,
            message: shown(message),
        }
    }
}
