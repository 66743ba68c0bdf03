//! Receiving: whose reply it is, whether it fits what was asked, and where its bytes go.

use super::{
    assembly::{Place, ReadAssembly, StatusAssembly, StatusRun},
    error::{Error, ErrorCode, Violation, shown},
    wire::{
        self, CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CHUNK_ERROR_BIT, CHUNK_NONE,
        CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, Chunk, Command, Headers, MAX_ERROR_CHUNK, ReplyBody,
        ReplyShape,
    },
};
use bytes::BufMut;
use fleecebox_contract::extent::Extent;
use std::{
    collections::HashMap,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::{
    io::{AsyncReadExt, BufReader},
    net::unix::OwnedReadHalf,
    sync::oneshot,
};

/// Bytes that are received at once where headers are expected. What of a payload comes with them is
/// copied, so it is small beside a read; long payloads pass it by.
const HEADER_BUFFER: usize = 1024;
/// Most descriptors in one status chunk: nbdkit's limit, and eight times QEMU's.
const MAX_DESCRIPTORS: u64 = 1 << 20;
/// Bytes of a chunk's offset, in `NBD_REPLY_TYPE_OFFSET_DATA`.
const OFFSET_BYTES: u64 = 8;
/// Bytes of `NBD_REPLY_TYPE_OFFSET_HOLE`.
const HOLE_BYTES: u64 = 12;

/// A request that was sent, or is about to be.
#[derive(Debug)]
pub(super) struct Waiting {
    answer: Answer,
    /// The first error chunk of the reply, which is not over before its last chunk.
    failure: Option<(ErrorCode, String)>,
}

/// What a request waits for, and who waits.
#[derive(Debug)]
pub(super) enum Answer {
    Read(ReadAssembly, oneshot::Sender<Result<Vec<u8>, Error>>),
    Status(
        StatusAssembly,
        oneshot::Sender<Result<Vec<StatusRun>, Error>>,
    ),
    Flush(Extent, oneshot::Sender<Result<(), Error>>),
    Trim(Extent, oneshot::Sender<Result<(), Error>>),
}

impl Answer {
    pub(super) fn command(&self) -> Command {
        match self {
            Self::Read(..) => Command::Read,
            Self::Status(..) => Command::BlockStatus,
            Self::Flush(..) => Command::Flush,
            Self::Trim(..) => Command::Trim,
        }
    }

    pub(super) fn extent(&self) -> Extent {
        match self {
            Self::Read(assembly, _) => assembly.extent(),
            Self::Status(assembly, _) => assembly.extent(),
            Self::Flush(extent, _) | Self::Trim(extent, _) => *extent,
        }
    }

    /// Answers with an error. Nobody may be listening any more: that is the listener's business.
    fn fail(self, error: Error) {
        match self {
            Self::Read(_, sender) => drop(sender.send(Err(error))),
            Self::Status(_, sender) => drop(sender.send(Err(error))),
            Self::Flush(_, sender) | Self::Trim(_, sender) => drop(sender.send(Err(error))),
        }
    }
}

impl Waiting {
    /// Hands over the answer; an error if the server ended the reply against the rules, which whoever waits is told as well.
    fn finish(self) -> Result<(), Violation> {
        if let Some((code, message)) = self.failure {
            let (command, extent) = (self.answer.command(), self.answer.extent());
            self.answer.fail(Error::Answered {
                command,
                extent,
                code,
                message,
            });
            return Ok(());
        }
        let broken = match self.answer {
            Answer::Read(assembly, sender) => settle(assembly.finish(), sender),
            Answer::Status(assembly, sender) => settle(assembly.finish(), sender),
            Answer::Flush(_, sender) | Answer::Trim(_, sender) => settle(Ok(()), sender),
        };
        broken.map_or(Ok(()), Err)
    }
}

/// Sends the result; the violation, if it is one.
fn settle<T>(
    result: Result<T, Violation>,
    sender: oneshot::Sender<Result<T, Error>>,
) -> Option<Violation> {
    let violation = result.as_ref().err().copied();
    drop(sender.send(result.map_err(Error::from)));
    violation
}

/// The requests that wait on a connection.
#[derive(Debug, Default)]
pub(super) struct Requests(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    waiting: HashMap<u64, Waiting>,
    next_cookie: u64,
    /// Why there will be no more answers.
    closed: Option<Error>,
}

impl Requests {
    /// Enters a request; its cookie.
    pub(super) fn enter(&self, answer: Answer) -> Result<u64, Error> {
        let mut table = self.lock();
        if let Some(cause) = &table.closed {
            return Err(cause.clone());
        }
        let cookie = table.next_cookie;
        table.next_cookie += 1;
        table.waiting.insert(
            cookie,
            Waiting {
                answer,
                failure: None,
            },
        );
        Ok(cookie)
    }

    /// Lets every waiting request fail, and every later one. Only the first cause counts.
    pub(super) fn close(&self, cause: Error) {
        let (waiting, cause) = {
            let mut table = self.lock();
            let cause = table.closed.get_or_insert(cause).clone();
            (std::mem::take(&mut table.waiting), cause)
        };
        for request in waiting.into_values() {
            request.answer.fail(cause.clone());
        }
    }

    /// Why the connection ended, if it did.
    pub(super) fn closed(&self) -> Option<Error> {
        self.lock().closed.clone()
    }

    /// Takes a request out, while something of its reply is received.
    fn take(&self, cookie: u64) -> Result<Waiting, Violation> {
        self.lock()
            .waiting
            .remove(&cookie)
            .ok_or(Violation::UnknownCookie(cookie))
    }

    /// Puts a request back whose reply is not complete, unless there will be no more.
    fn put_back(&self, cookie: u64, request: Waiting) {
        let mut table = self.lock();
        match &table.closed {
            None => drop(table.waiting.insert(cookie, request)),
            Some(cause) => request.answer.fail(cause.clone()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing is half done in the table when a panic unwinds: each step is one insertion or removal.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The receiving side of a connection.
#[derive(Debug)]
pub(super) struct Receiver {
    reader: BufReader<OwnedReadHalf>,
    headers: Headers,
    context: Option<u32>,
}

impl Receiver {
    pub(super) fn new(half: OwnedReadHalf, headers: Headers, context: Option<u32>) -> Self {
        Self {
            reader: BufReader::with_capacity(HEADER_BUFFER, half),
            headers,
            context,
        }
    }

    /// Receives replies until the connection ends.
    pub(super) async fn run(mut self, requests: &Requests) -> Error {
        loop {
            if let Err(error) = self.reply(requests).await {
                return error;
            }
        }
    }

    /// Receives one reply or one chunk of a reply.
    async fn reply(&mut self, requests: &Requests) -> Result<(), Error> {
        let shape = self.headers.reply_shape(self.reader.read_u32().await?)?;
        let mut header = [0; ReplyShape::LONGEST];
        let header = &mut header[..shape.length()];
        self.reader.read_exact(header).await?;
        let reply = shape
            .parse(header)
            .ok_or(io::ErrorKind::UnexpectedEof)
            .map_err(io::Error::from)?;
        let mut request = requests.take(reply.cookie)?;
        let received = match reply.body {
            ReplyBody::Simple { error } => self.simple(error, &mut request).await.map(|()| true),
            ReplyBody::Chunk(chunk) => self.chunk(chunk, &mut request).await.map(|()| chunk.done),
        };
        match received {
            Ok(true) => Ok(request.finish()?),
            Ok(false) => {
                requests.put_back(reply.cookie, request);
                Ok(())
            }
            Err(error) => {
                request.answer.fail(error.clone());
                Err(error)
            }
        }
    }

    /// Receives what follows a simple reply.
    async fn simple(
        &mut self,
        error: Option<ErrorCode>,
        request: &mut Waiting,
    ) -> Result<(), Error> {
        if let Some(code) = error {
            request.failure.get_or_insert((code, String::new()));
            return Ok(());
        }
        match &mut request.answer {
            Answer::Flush(..) | Answer::Trim(..) => Ok(()),
            Answer::Read(assembly, _) if self.headers == Headers::Simple => {
                let extent = assembly.extent();
                receive_into(
                    &mut self.reader,
                    assembly.data(extent.start(), extent.len())?,
                )
                .await
            }
            Answer::Read(..) => Err(Violation::SimpleReplyToRead.into()),
            // It has no status chunk, which `finish` notices.
            Answer::Status(..) => Ok(()),
        }
    }

    /// Receives what follows the header of a chunk.
    async fn chunk(&mut self, chunk: Chunk, request: &mut Waiting) -> Result<(), Error> {
        let expected = request.answer.extent().start();
        if let Some(actual) = chunk.offset.filter(|&actual| actual != expected) {
            return Err(Violation::ReplyOffset { expected, actual }.into());
        }
        let command = request.answer.command();
        let Chunk { kind, length, .. } = chunk;
        let wrong_length = Violation::ChunkLength { kind, length };
        match (kind, &mut request.answer) {
            (CHUNK_NONE, _) if length != 0 => Err(wrong_length.into()),
            (CHUNK_NONE, _) if !chunk.done => Err(Violation::EmptyChunkNotLast.into()),
            (CHUNK_NONE, _) => Ok(()),
            (CHUNK_OFFSET_DATA, Answer::Read(assembly, _)) => {
                let data = length.checked_sub(OFFSET_BYTES).ok_or(wrong_length)?;
                let offset = self.reader.read_u64().await?;
                receive_into(&mut self.reader, assembly.data(offset, data)?).await
            }
            (CHUNK_OFFSET_HOLE, Answer::Read(assembly, _)) => {
                if length != HOLE_BYTES {
                    return Err(wrong_length.into());
                }
                let offset = self.reader.read_u64().await?;
                let zeroes = self.reader.read_u32().await?;
                Ok(assembly.hole(offset, u64::from(zeroes))?)
            }
            (CHUNK_BLOCK_STATUS, Answer::Status(assembly, _)) => {
                let count = descriptors(chunk, 4, 8, assembly.extent()).ok_or(wrong_length)?;
                assembly.begin_chunk()?;
                self.check_context().await?;
                for _ in 0..count {
                    let (length, flags) =
                        (self.reader.read_u32().await?, self.reader.read_u32().await?);
                    assembly.descriptor(length.into(), flags.into())?;
                }
                Ok(())
            }
            (CHUNK_BLOCK_STATUS_EXT, Answer::Status(assembly, _))
                if self.headers == Headers::Extended =>
            {
                let count = descriptors(chunk, 8, 16, assembly.extent()).ok_or(wrong_length)?;
                assembly.begin_chunk()?;
                self.check_context().await?;
                if u64::from(self.reader.read_u32().await?) != count {
                    return Err(wrong_length.into());
                }
                for _ in 0..count {
                    let (length, flags) =
                        (self.reader.read_u64().await?, self.reader.read_u64().await?);
                    assembly.descriptor(length, flags)?;
                }
                Ok(())
            }
            (kind, _) if kind & CHUNK_ERROR_BIT != 0 => self.error_chunk(chunk, request).await,
            (kind, _) => Err(Violation::ChunkType { command, kind }.into()),
        }
    }

    /// Receives an error, which is the answer once the reply is over.
    async fn error_chunk(&mut self, chunk: Chunk, request: &mut Waiting) -> Result<(), Error> {
        let Chunk { kind, length, .. } = chunk;
        if length > MAX_ERROR_CHUNK {
            return Err(Violation::ChunkLength { kind, length }.into());
        }
        let mut payload = vec![0; length as usize]; // bounded just above
        self.reader.read_exact(&mut payload).await?;
        let error = wire::parse_error_chunk(kind, &payload)?;
        let extent = request.answer.extent();
        if let Some(offset) = error
            .offset
            .filter(|offset| !(extent.start()..extent.end()).contains(offset))
        {
            return Err(Violation::ChunkOutside {
                extent,
                offset,
                length: 0,
            }
            .into());
        }
        request
            .failure
            .get_or_insert_with(|| (error.code, shown(error.message)));
        Ok(())
    }

    /// Reads the context id of a status chunk. Status is only asked for with a context.
    async fn check_context(&mut self) -> Result<(), Error> {
        let actual = self.reader.read_u32().await?;
        match self.context {
            Some(expected) if expected != actual => {
                Err(Violation::StatusContext { expected, actual }.into())
            }
            _ => Ok(()),
        }
    }
}

/// How many descriptors of `each` bytes follow the `before` bytes of a status chunk, if that fits:
/// a descriptor describes at least one byte that was asked for.
fn descriptors(chunk: Chunk, before: u64, each: u64, asked: Extent) -> Option<u64> {
    let bytes = chunk.length.checked_sub(before)?;
    let count = bytes / each;
    (bytes % each == 0 && count > 0 && count <= asked.len().min(MAX_DESCRIPTORS)).then_some(count)
}

/// Receives bytes straight into their place.
async fn receive_into(
    reader: &mut BufReader<OwnedReadHalf>,
    place: Place<'_>,
) -> Result<(), Error> {
    match place {
        Place::Gap(gap) => {
            reader.read_exact(gap).await?;
        }
        Place::End(mut end) => {
            while end.has_remaining_mut() {
                if reader.read_buf(&mut end).await? == 0 {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
            }
        }
    }
    Ok(())
}
