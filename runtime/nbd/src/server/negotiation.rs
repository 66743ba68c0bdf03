//! The handshake, as a server.

use super::{Bounds, Export};
use crate::wire::{
    FLAG_CAN_MULTI_CONN, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, FLAG_READ_ONLY, FLAG_SEND_DF,
    FLAG_SEND_TRIM, INFO_BLOCK_SIZE, INFO_EXPORT, INIT_MAGIC, MAX_STRING, Negotiation,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR, REP_INFO, REP_META_CONTEXT,
};
use bytes::{Buf, BufMut};
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

// What only a server needs of the protocol.
const OPTION_EXPORT_NAME: u32 = 1;
const OPTION_ABORT: u32 = 2;
const OPTION_LIST: u32 = 3;
const OPTION_INFO: u32 = 6;
const OPTION_LIST_META_CONTEXT: u32 = 9;
const REP_SERVER: u32 = 2;
const REP_ERROR_UNSUPPORTED: u32 = REP_ERROR | 1;
const REP_ERROR_INVALID: u32 = REP_ERROR | 3;
const REP_ERROR_UNKNOWN: u32 = REP_ERROR | 6;
const FLAG_HAS_FLAGS: u16 = 1 << 0;

/// What `NBD_OPT_EXPORT_NAME` is answered with besides, where the client did not say that it wants none of it.
const ZEROES: [u8; 124] = [0; 124];

/// Longest data of an option: two strings and a list of contexts.
const MAX_OPTION: u32 = 4 * MAX_STRING as u32;

/// What a client chose.
pub(super) struct Session<E> {
    pub(super) export: Arc<E>,
    pub(super) structured: bool,
    /// In the order of their ids.
    pub(super) contexts: Vec<String>,
}

struct Negotiator<'a, E> {
    reader: &'a mut BufReader<OwnedReadHalf>,
    writer: &'a mut OwnedWriteHalf,
    exports: &'a [Arc<E>],
    bounds: Bounds,
    zeroes: bool,
    structured: bool,
    /// Chosen by the client, for the export of that name.
    contexts: Option<(String, Vec<String>)>,
}

/// What follows an option.
enum Next<E> {
    Option,
    Transmission(Arc<E>),
    End,
}

/// Until the client chose an export; none where it leaves instead.
pub(super) async fn negotiate<E: Export>(
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
    exports: &[Arc<E>],
    bounds: Bounds,
) -> io::Result<Option<Session<E>>> {
    let mut greeting = Vec::new();
    greeting.put_u64(INIT_MAGIC);
    greeting.put_u64(OPTION_MAGIC);
    greeting.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    writer.write_all(&greeting).await?;
    let flags = reader.read_u32().await?;
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut negotiator = Negotiator {
        reader,
        writer,
        exports,
        bounds,
        zeroes: flags & u32::from(FLAG_NO_ZEROES) == 0,
        structured: false,
        contexts: None,
    };
    loop {
        match negotiator.next().await? {
            Next::Option => {}
            Next::Transmission(export) => return Ok(Some(negotiator.session(export))),
            Next::End => return Ok(None),
        }
    }
}

impl<E: Export> Negotiator<'_, E> {
    async fn next(&mut self) -> io::Result<Next<E>> {
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
        self.option(option, &data).await
    }

    async fn option(&mut self, option: u32, mut data: &[u8]) -> io::Result<Next<E>> {
        const GO: u32 = Negotiation::Go as u32;
        const STRUCTURED_REPLY: u32 = Negotiation::StructuredReply as u32;
        const SET_META_CONTEXT: u32 = Negotiation::SetMetaContext as u32;
        match option {
            GO | OPTION_INFO => {
                let Some(export) = self.find(take_string(&mut data)) else {
                    self.reply(option, REP_ERROR_UNKNOWN, &[]).await?;
                    return Ok(Next::Option);
                };
                self.describe(option, &export).await?;
                if option == GO {
                    return Ok(Next::Transmission(export));
                }
            }
            OPTION_EXPORT_NAME => return self.open(data).await,
            STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(option, REP_ACK, &[]).await?;
            }
            SET_META_CONTEXT | OPTION_LIST_META_CONTEXT => self.contexts(option, data).await?,
            OPTION_LIST => self.list().await?,
            OPTION_ABORT => {
                self.reply(option, REP_ACK, &[]).await?;
                return Ok(Next::End);
            }
            _ => self.reply(option, REP_ERROR_UNSUPPORTED, &[]).await?,
        }
        Ok(Next::Option)
    }

    fn find(&self, name: Option<&str>) -> Option<Arc<E>> {
        let mut exports = self.exports.iter();
        exports.find(|export| Some(export.name()) == name).cloned()
    }

    async fn describe(&mut self, option: u32, export: &E) -> io::Result<()> {
        let mut info = Vec::new();
        info.put_u16(INFO_EXPORT);
        info.put_u64(export.size());
        info.put_u16(flags(export));
        self.reply(option, REP_INFO, &info).await?;
        let mut blocks = Vec::new();
        blocks.put_u16(INFO_BLOCK_SIZE);
        for size in [1, export.preferred_block(), self.bounds.bytes] {
            blocks.put_u32(size);
        }
        self.reply(option, REP_INFO, &blocks).await?;
        self.reply(option, REP_ACK, &[]).await
    }

    /// As clients of old open an export: no answer can say that there is none.
    async fn open(&mut self, name: &[u8]) -> io::Result<Next<E>> {
        let Some(export) = self.find(std::str::from_utf8(name).ok()) else {
            return Ok(Next::End);
        };
        let mut bytes = Vec::new();
        bytes.put_u64(export.size());
        bytes.put_u16(flags(&*export));
        if self.zeroes {
            bytes.put_slice(&ZEROES);
        }
        self.writer.write_all(&bytes).await?;
        Ok(Next::Transmission(export))
    }

    async fn contexts(&mut self, option: u32, mut data: &[u8]) -> io::Result<()> {
        let chosen = option == Negotiation::SetMetaContext as u32;
        let export = self.find(take_string(&mut data));
        let (Some(export), true) = (export, self.structured) else {
            return self.reply(option, REP_ERROR_INVALID, &[]).await;
        };
        let granted = wanted_contexts(&mut data, &*export, chosen);
        for (id, context) in (0u32..).zip(&granted) {
            let named = [&id.to_be_bytes()[..], context.as_bytes()].concat();
            self.reply(option, REP_META_CONTEXT, &named).await?;
        }
        if chosen {
            self.contexts = Some((export.name().to_owned(), granted));
        }
        self.reply(option, REP_ACK, &[]).await
    }

    async fn list(&mut self) -> io::Result<()> {
        for export in self.exports {
            let name = export.name().as_bytes();
            let listed = [&(name.len() as u32).to_be_bytes()[..], name].concat();
            self.reply(OPTION_LIST, REP_SERVER, &listed).await?;
        }
        self.reply(OPTION_LIST, REP_ACK, &[]).await
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

    /// Contexts that were chosen for another export count for nothing.
    fn session(self, export: Arc<E>) -> Session<E> {
        let contexts = self.contexts.filter(|(name, _)| name == export.name());
        Session {
            export,
            structured: self.structured,
            contexts: contexts.map(|(_, contexts)| contexts).unwrap_or_default(),
        }
    }
}

/// Reads of any connection give what all others give.
fn flags(export: &impl Export) -> u16 {
    let kind = match export.can_trim() {
        true => FLAG_SEND_TRIM,
        false => FLAG_READ_ONLY,
    };
    FLAG_HAS_FLAGS | FLAG_SEND_DF | FLAG_CAN_MULTI_CONN | kind
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
