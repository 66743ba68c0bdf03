//! Requests and their replies, in the order in which they are ready.

use super::negotiation::Session;
use super::places::Seat;
use super::{Bounds, Export, Refused};
use crate::error::ErrorCode;
use crate::wire::{
    CHUNK_BLOCK_STATUS, CHUNK_ERROR_BIT, CHUNK_ERROR_OFFSET, CHUNK_OFFSET_DATA, Command,
    MAX_STRING, REPLY_FLAG_DONE, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use bytes::{Buf, BufMut};
use fleecebox_contract::extent::Extent;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

const COMMAND_FLAG_ONE: u16 = 1 << 3;
const READ: u16 = Command::Read as u16;
const WRITE: u16 = 1;
const DISCONNECT: u16 = Command::Disconnect as u16;
const TRIM: u16 = Command::Trim as u16;
const BLOCK_STATUS: u16 = Command::BlockStatus as u16;
const CHUNK_ERROR: u16 = CHUNK_ERROR_BIT | 1;

/// Bytes of a request, without what is to be written.
const REQUEST_BYTES: usize = 28;

/// Most runs in one answer to block status, so that clients have to ask again, as they have to with QEMU.
const MAX_RUNS: usize = 256;

/// What is left of a connection once its export is chosen.
pub(super) struct Transmission<E> {
    session: Session<E>,
    bounds: Bounds,
    seat: Arc<Seat>,
    writer: Mutex<OwnedWriteHalf>,
    /// A reply could not be sent, or half of one was.
    broken: Notify,
}

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl<E: Export> Transmission<E> {
    pub(super) fn new(session: Session<E>, writer: OwnedWriteHalf, seat: Arc<Seat>) -> Arc<Self> {
        Arc::new(Self {
            session,
            bounds: seat.bounds(),
            seat,
            writer: Mutex::new(writer),
            broken: Notify::new(),
        })
    }

    /// Until the client leaves, or cannot be talked with any more.
    pub(super) async fn run(self: Arc<Self>, reader: BufReader<OwnedReadHalf>) {
        tokio::select! {
            // Why it ended is of no use to anybody: it was the client's doing.
            _ = self.take_requests(reader) => {}
            () = self.broken.notified() => {}
        }
    }

    /// A request is read only once there is room for it.
    async fn take_requests(
        self: &Arc<Self>,
        mut reader: BufReader<OwnedReadHalf>,
    ) -> io::Result<()> {
        let places = Arc::new(Semaphore::new(self.bounds.requests));
        let memory = Arc::new(Semaphore::new(self.bounds.bytes as usize));
        let mut answers = JoinSet::new();
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            let request = self.request(&mut reader).await?;
            if request.command == DISCONNECT {
                // What it asked for before, it gets.
                while answers.join_next().await.is_some() {}
                return Ok(());
            }
            let under_way = self.seat.begin();
            let bytes = match request.command {
                READ => request.length.min(self.bounds.bytes),
                _ => 0,
            };
            let room = Arc::clone(&memory).acquire_many_owned(bytes).await;
            let transmission = Arc::clone(self);
            answers.spawn(async move {
                if transmission.answer(request).await.is_err() {
                    transmission.broken.notify_one();
                }
                drop((place, room, under_way));
            });
            while answers.try_join_next().is_some() {}
        }
    }

    /// The next request, for whose first byte is waited as long as it takes.
    async fn request(&self, reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Request> {
        if reader.fill_buf().await?.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let rest = async {
            let mut bytes = [0; REQUEST_BYTES];
            reader.read_exact(&mut bytes).await?;
            let mut bytes = &bytes[..];
            if bytes.get_u32() != REQUEST_MAGIC {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let request = Request {
                flags: bytes.get_u16(),
                command: bytes.get_u16(),
                cookie: bytes.get_u64(),
                offset: bytes.get_u64(),
                length: bytes.get_u32(),
            };
            if request.command == WRITE {
                let mut payload = reader.take(request.length.into());
                tokio::io::copy_buf(&mut payload, &mut tokio::io::sink()).await?;
            }
            Ok(request)
        };
        timeout(self.bounds.request, rest).await?
    }

    async fn answer(&self, request: Request) -> io::Result<()> {
        let cookie = request.cookie;
        let export = &self.session.export;
        let asked = Extent::new(request.offset, request.length.into()).ok();
        let asked = asked.filter(|asked| asked.end() <= export.size());
        match (request.command, asked) {
            (READ, _) if request.length > self.bounds.bytes => {
                let told = format!("more than {} bytes at once", self.bounds.bytes);
                self.refuse(cookie, None, invalid(&told)).await
            }
            (READ, Some(asked)) => match export.read(asked).await {
                Ok(bytes) => self.data(cookie, asked, &bytes).await,
                Err(refused) => self.refuse(cookie, Some(asked), refused).await,
            },
            (TRIM, Some(asked)) if export.can_trim() => match export.trim(asked).await {
                Ok(()) => self.done(cookie).await,
                Err(refused) => self.refuse(cookie, None, refused).await,
            },
            (BLOCK_STATUS, Some(asked)) if !self.session.contexts.is_empty() => {
                let one = request.flags & COMMAND_FLAG_ONE != 0;
                match self.status(cookie, asked, one).await {
                    Ok(bytes) => self.send(&bytes, &[]).await,
                    Err(refused) => self.refuse(cookie, None, refused).await,
                }
            }
            (WRITE, _) => {
                // As QEMU's snapshot-access says it of what can be trimmed.
                let code = match export.can_trim() {
                    true => ErrorCode::Enotsup,
                    false => ErrorCode::Eperm,
                };
                self.refuse(cookie, None, code.into()).await
            }
            (READ | TRIM | BLOCK_STATUS, None) => {
                let told = invalid("the range is empty or ends past the export");
                self.refuse(cookie, None, told).await
            }
            _ => self.refuse(cookie, None, ErrorCode::Einval.into()).await,
        }
    }

    async fn data(&self, cookie: u64, asked: Extent, bytes: &[u8]) -> io::Result<()> {
        debug_assert_eq!(bytes.len() as u64, asked.len());
        let mut header = Vec::with_capacity(28);
        if self.session.structured {
            let length = 8 + bytes.len() as u32; // at most `Bounds::bytes`
            put_chunk(&mut header, true, CHUNK_OFFSET_DATA, cookie, length);
            header.put_u64(asked.start());
        } else {
            put_simple(&mut header, 0, cookie);
        }
        self.send(&header, bytes).await
    }

    /// One chunk for each context.
    async fn status(&self, cookie: u64, asked: Extent, one: bool) -> Result<Vec<u8>, Refused> {
        let most = if one { 1 } else { MAX_RUNS };
        let contexts = &self.session.contexts;
        let mut bytes = Vec::new();
        for (id, context) in (0u32..).zip(contexts) {
            let runs = self.session.export.status(context, asked, most).await?;
            let last = id as usize + 1 == contexts.len();
            let length = 4 + 8 * runs.len() as u32; // at most MAX_RUNS
            put_chunk(&mut bytes, last, CHUNK_BLOCK_STATUS, cookie, length);
            bytes.put_u32(id);
            for run in runs {
                // No longer than what was asked, which had 32 bits; flags of contexts that are known have as many.
                bytes.put_u32(run.extent.len() as u32);
                bytes.put_u32(run.flags as u32);
            }
        }
        Ok(bytes)
    }

    /// Where it is about a place within `asked`, that is told.
    async fn refuse(&self, cookie: u64, asked: Option<Extent>, refused: Refused) -> io::Result<()> {
        let mut bytes = Vec::new();
        let code = refused.code.to_wire();
        if !self.session.structured {
            put_simple(&mut bytes, code, cookie);
            return self.send(&bytes, &[]).await;
        }
        let message = &refused.message[..refused.message.floor_char_boundary(MAX_STRING)];
        let within =
            |at: &u64| asked.is_some_and(|asked| (asked.start()..asked.end()).contains(at));
        let at = refused.at.filter(within);
        let length = 6 + message.len() as u32; // at most MAX_STRING
        match at {
            Some(_) => put_chunk(&mut bytes, true, CHUNK_ERROR_OFFSET, cookie, length + 8),
            None => put_chunk(&mut bytes, true, CHUNK_ERROR, cookie, length),
        }
        bytes.put_u32(code);
        bytes.put_u16(message.len() as u16); // at most MAX_STRING
        bytes.put_slice(message.as_bytes());
        if let Some(at) = at {
            bytes.put_u64(at);
        }
        self.send(&bytes, &[]).await
    }

    async fn done(&self, cookie: u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        put_simple(&mut bytes, 0, cookie);
        self.send(&bytes, &[]).await
    }

    async fn send(&self, header: &[u8], payload: &[u8]) -> io::Result<()> {
        let sent = async {
            let mut writer = self.writer.lock().await;
            writer.write_all(header).await?;
            writer.write_all(payload).await
        };
        timeout(self.bounds.reply, sent).await?
    }
}

fn invalid(message: &str) -> Refused {
    Refused {
        message: message.into(),
        ..ErrorCode::Einval.into()
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
