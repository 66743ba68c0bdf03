//! A server for [`Export`]s, on a unix socket: newstyle handshake, structured replies, block status, trim.
//!
//! It answers the requests of a connection in their order. Writes are refused as QEMU's snapshot-access refuses them.

use super::assembly::StatusRun;
use super::error::ErrorCode;
use super::wire::{
    CHUNK_BLOCK_STATUS, CHUNK_ERROR_BIT, CHUNK_OFFSET_DATA, Command, FLAG_CAN_MULTI_CONN,
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, FLAG_SEND_DF, FLAG_SEND_TRIM, INFO_BLOCK_SIZE,
    INFO_EXPORT, INIT_MAGIC, MAX_PAYLOAD, MAX_STRING, Negotiation, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR, REP_INFO, REP_META_CONTEXT, REPLY_FLAG_DONE,
    REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use bytes::{Buf, BufMut};
use fleecebox_contract::extent::Extent;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

// What only a server needs of the protocol.
const OPTION_ABORT: u32 = 2;
const OPTION_LIST: u32 = 3;
const OPTION_INFO: u32 = 6;
const OPTION_LIST_META_CONTEXT: u32 = 9;
const REP_SERVER: u32 = 2;
const REP_ERROR_UNSUPPORTED: u32 = REP_ERROR | 1;
const REP_ERROR_INVALID: u32 = REP_ERROR | 3;
const REP_ERROR_UNKNOWN: u32 = REP_ERROR | 6;
const FLAG_HAS_FLAGS: u16 = 1 << 0;
const COMMAND_FLAG_ONE: u16 = 1 << 3;
const WRITE: u16 = 1;

/// Longest data of an option: two strings and a list of contexts.
const MAX_OPTION: u32 = 4 * MAX_STRING as u32;

/// Most runs in one answer to block status, so that clients have to ask again, as they have to with QEMU.
const MAX_RUNS: usize = 256;

/// The meta context that every export has: what is allocated.
pub const ALLOCATION: &str = "base:allocation";
/// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`, of `base:allocation`.
pub const HOLE: u64 = 3;
/// Of `qemu:dirty-bitmap:…`.
pub const DIRTY: u64 = 1;

/// What block size is best, in bytes; any is taken.
const PREFERRED_BLOCK: u32 = 64 << 10;

/// What a server has for its clients.
pub trait Export: Send + Sync + 'static {
    /// By which clients choose it.
    fn name(&self) -> &str;

    /// In bytes.
    fn size(&self) -> u64;

    /// The meta contexts that it has; `base:allocation` is one.
    fn contexts(&self) -> Vec<String>;

    /// The bytes of a range that lies within it, exactly as many.
    fn read(&self, extent: Extent) -> impl Future<Output = Result<Vec<u8>, Refused>> + Send;

    /// Gives back the space of a range that lies within it.
    fn trim(&self, extent: Extent) -> impl Future<Output = Result<(), Refused>> + Send;

    /// What one of its contexts says of a range that lies within it, from its start on: at least one run, and at most
    /// `most`, none beyond the range.
    fn status(
        &self,
        context: &str,
        extent: Extent,
        most: usize,
    ) -> impl Future<Output = Result<Vec<StatusRun>, Refused>> + Send;
}

/// Why an export does not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// For programs.
    pub code: ErrorCode,
}

/// A server that runs until it is dropped, which also ends its connections.
#[derive(Debug)]
pub struct Server {
    _accepting: JoinSet<()>,
}

impl Server {
    /// Serves whoever can connect. Must be called within a tokio runtime.
    pub fn start<E: Export>(listener: UnixListener, exports: Vec<E>) -> Self {
        let exports = Arc::new(exports);
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&exports)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            _accepting: accepting,
        }
    }
}

/// A client that breaks the protocol or leaves ends only its own connection.
async fn serve<E: Export>(stream: UnixStream, exports: Arc<Vec<E>>) {
    let (reader, writer) = stream.into_split();
    let mut client = Client {
        reader: BufReader::new(reader),
        writer,
        structured: false,
        contexts: Vec::new(),
    };
    if let Ok(Some(export)) = client.negotiate(&exports).await {
        while let Ok(true) = client.answer(export).await {}
    }
}

struct Client {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    structured: bool,
    /// Chosen by the client, in the order of their ids.
    contexts: Vec<String>,
}

impl Client {
    /// Until the client chose an export, or left.
    async fn negotiate<'a, E: Export>(&mut self, exports: &'a [E]) -> io::Result<Option<&'a E>> {
        let mut greeting = Vec::new();
        greeting.put_u64(INIT_MAGIC);
        greeting.put_u64(OPTION_MAGIC);
        greeting.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.writer.write_all(&greeting).await?;
        self.reader.read_u32().await?;
        loop {
            if self.reader.read_u64().await? != OPTION_MAGIC {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let option = self.reader.read_u32().await?;
            let length = self.reader.read_u32().await?;
            if length > MAX_OPTION {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut data = vec![0; length as usize];
            self.reader.read_exact(&mut data).await?;
            if let Some(export) = self.option(option, &data, exports).await? {
                return Ok(Some(export));
            }
            if option == OPTION_ABORT {
                return Ok(None);
            }
        }
    }

    /// Answers one option; returns the export that it opened.
    async fn option<'a, E: Export>(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &'a [E],
    ) -> io::Result<Option<&'a E>> {
        const GO: u32 = Negotiation::Go as u32;
        const STRUCTURED_REPLY: u32 = Negotiation::StructuredReply as u32;
        const SET_META_CONTEXT: u32 = Negotiation::SetMetaContext as u32;
        let mut rest = data;
        match option {
            GO | OPTION_INFO => {
                let Some(export) = find(take_string(&mut rest), exports) else {
                    self.reply(option, REP_ERROR_UNKNOWN, &[]).await?;
                    return Ok(None);
                };
                self.describe(option, export).await?;
                return Ok((option == GO).then_some(export));
            }
            STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(option, REP_ACK, &[]).await?;
            }
            SET_META_CONTEXT | OPTION_LIST_META_CONTEXT => {
                let export = find(take_string(&mut rest), exports);
                let (Some(export), true) = (export, self.structured) else {
                    self.reply(option, REP_ERROR_INVALID, &[]).await?;
                    return Ok(None);
                };
                let granted = wanted_contexts(&mut rest, export, option == SET_META_CONTEXT);
                for (id, context) in (0u32..).zip(&granted) {
                    let named = [&id.to_be_bytes()[..], context.as_bytes()].concat();
                    self.reply(option, REP_META_CONTEXT, &named).await?;
                }
                self.reply(option, REP_ACK, &[]).await?;
                if option == SET_META_CONTEXT {
                    self.contexts = granted;
                }
            }
            OPTION_LIST => {
                for export in exports {
                    let name = export.name().as_bytes();
                    let listed = [&(name.len() as u32).to_be_bytes()[..], name].concat();
                    self.reply(option, REP_SERVER, &listed).await?;
                }
                self.reply(option, REP_ACK, &[]).await?;
            }
            OPTION_ABORT => self.reply(option, REP_ACK, &[]).await?,
            _ => self.reply(option, REP_ERROR_UNSUPPORTED, &[]).await?,
        }
        Ok(None)
    }

    async fn describe(&mut self, option: u32, export: &impl Export) -> io::Result<()> {
        let mut info = Vec::new();
        info.put_u16(INFO_EXPORT);
        info.put_u64(export.size());
        info.put_u16(FLAG_HAS_FLAGS | FLAG_SEND_TRIM | FLAG_SEND_DF | FLAG_CAN_MULTI_CONN);
        self.reply(option, REP_INFO, &info).await?;
        let mut blocks = Vec::new();
        blocks.put_u16(INFO_BLOCK_SIZE);
        for size in [1, PREFERRED_BLOCK, MAX_PAYLOAD] {
            blocks.put_u32(size);
        }
        self.reply(option, REP_INFO, &blocks).await?;
        self.reply(option, REP_ACK, &[]).await
    }

    async fn reply(&mut self, option: u32, reply: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(20 + data.len());
        bytes.put_u64(OPTION_REPLY_MAGIC);
        bytes.put_u32(option);
        bytes.put_u32(reply);
        bytes.put_u32(data.len() as u32); // a few names of at most MAX_STRING
        bytes.put_slice(data);
        self.writer.write_all(&bytes).await
    }

    /// Answers one request; says whether there may be another.
    async fn answer(&mut self, export: &impl Export) -> io::Result<bool> {
        const READ: u16 = Command::Read as u16;
        const DISCONNECT: u16 = Command::Disconnect as u16;
        const TRIM: u16 = Command::Trim as u16;
        const BLOCK_STATUS: u16 = Command::BlockStatus as u16;
        if self.reader.read_u32().await? != REQUEST_MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let flags = self.reader.read_u16().await?;
        let command = self.reader.read_u16().await?;
        let cookie = self.reader.read_u64().await?;
        let offset = self.reader.read_u64().await?;
        let length = self.reader.read_u32().await?;
        let asked = Extent::new(offset, length.into()).ok();
        let asked = asked.filter(|asked| asked.end() <= export.size());
        match (command, asked) {
            (DISCONNECT, _) => return Ok(false),
            (READ, Some(asked)) if length <= MAX_PAYLOAD => match export.read(asked).await {
                Ok(bytes) => self.data(cookie, offset, &bytes).await?,
                Err(refused) => self.done(cookie, Some(refused.code)).await?,
            },
            (TRIM, Some(asked)) => {
                let trimmed = export.trim(asked).await;
                let refused = trimmed.err().map(|refused| refused.code);
                self.done(cookie, refused).await?;
            }
            (BLOCK_STATUS, Some(asked)) if !self.contexts.is_empty() => {
                let one = flags & COMMAND_FLAG_ONE != 0;
                self.status(cookie, export, asked, one).await?;
            }
            (WRITE, _) if length <= MAX_PAYLOAD => {
                let mut payload = vec![0; length as usize];
                self.reader.read_exact(&mut payload).await?;
                self.done(cookie, Some(ErrorCode::Enotsup)).await?;
            }
            _ => self.done(cookie, Some(ErrorCode::Einval)).await?,
        }
        Ok(true)
    }

    async fn data(&mut self, cookie: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut header = Vec::with_capacity(28);
        if self.structured {
            let length = 8 + bytes.len() as u32; // at most MAX_PAYLOAD
            put_chunk(&mut header, true, CHUNK_OFFSET_DATA, cookie, length);
            header.put_u64(offset);
        } else {
            put_simple(&mut header, 0, cookie);
        }
        self.writer.write_all(&header).await?;
        self.writer.write_all(bytes).await
    }

    /// One chunk for each context.
    async fn status(
        &mut self,
        cookie: u64,
        export: &impl Export,
        asked: Extent,
        one: bool,
    ) -> io::Result<()> {
        let most = if one { 1 } else { MAX_RUNS };
        let mut bytes = Vec::new();
        for (id, context) in (0u32..).zip(&self.contexts) {
            let runs = match export.status(context, asked, most).await {
                Ok(runs) => runs,
                Err(refused) => return self.done(cookie, Some(refused.code)).await,
            };
            let last = id as usize + 1 == self.contexts.len();
            let length = 4 + 8 * runs.len() as u32; // at most MAX_RUNS
            put_chunk(&mut bytes, last, CHUNK_BLOCK_STATUS, cookie, length);
            bytes.put_u32(id);
            for run in runs {
                // No longer than what was asked, which had 32 bits; flags of contexts that are known have as many.
                bytes.put_u32(run.extent.len() as u32);
                bytes.put_u32(run.flags as u32);
            }
        }
        self.writer.write_all(&bytes).await
    }

    /// Without data: all is well, or an error.
    async fn done(&mut self, cookie: u64, error: Option<ErrorCode>) -> io::Result<()> {
        let mut bytes = Vec::new();
        match error {
            Some(error) if self.structured => {
                put_chunk(&mut bytes, true, CHUNK_ERROR_BIT | 1, cookie, 6);
                bytes.put_u32(error.to_wire());
                bytes.put_u16(0);
            }
            error => put_simple(&mut bytes, error.map_or(0, ErrorCode::to_wire), cookie),
        }
        self.writer.write_all(&bytes).await
    }
}

fn put_chunk(into: &mut Vec<u8>, last: bool, kind: u16, cookie: u64, length: u32) {
    into.put_u32(STRUCTURED_REPLY_MAGIC);
    into.put_u16(if last { REPLY_FLAG_DONE } else { 0 });
    into.put_u16(kind);
    into.put_u64(cookie);
    into.put_u32(length);
}

fn put_simple(into: &mut Vec<u8>, error: u32, cookie: u64) {
    into.put_u32(SIMPLE_REPLY_MAGIC);
    into.put_u32(error);
    into.put_u64(cookie);
}

fn find<'a, E: Export>(name: Option<&str>, exports: &'a [E]) -> Option<&'a E> {
    exports.iter().find(|export| Some(export.name()) == name)
}

fn take_string<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let length = rest.try_get_u32().ok()? as usize;
    let (string, after) = rest.split_at_checked(length)?;
    *rest = after;
    std::str::from_utf8(string).ok()
}

/// The contexts that an export has and a client asks for; where it only wants a list, no question means all.
fn wanted_contexts(rest: &mut &[u8], export: &impl Export, exactly: bool) -> Vec<String> {
    let count = rest.try_get_u32().unwrap_or(0);
    let queries: Vec<&str> = (0..count).map_while(|_| take_string(rest)).collect();
    let asked = |context: &String| {
        let matches = |query: &&str| {
            query == context || !exactly && query.ends_with(':') && context.starts_with(query)
        };
        !exactly && count == 0 || queries.iter().any(matches)
    };
    let mut contexts = export.contexts();
    contexts.retain(asked);
    contexts
}
