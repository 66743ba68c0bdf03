//! The contract's functions. Each turns into one call over the socket and waits for its answer; only what the order
//! told already is answered here.
//!
//! Handles hold nothing: there is one volume, one writer, one context. Only an output stream has a number, which
//! the job process gave it and looks up; so no table of resources is needed. wasmtime sees to it that a guest can only name handles that it was given.

use super::bindings::{archive, content, job, stored, types, volume};
use super::limits::Limits;
use super::surroundings::Surroundings;
use super::wasi;
use fleecebox_channel::{Answer, Call, Payload, PayloadError, Socket, SocketError};
use fleecebox_contract::{
    BitmapMode, Context, Encoding, ErrorCode, LogLevel, MAX_ATTACHMENT_NAME, MAX_NAME, MAX_REGIONS,
    MAX_SENT_NAME, MAX_TEXT, Quota, RawRange, VolumeInfo,
};
use serde::de::DeserializeOwned;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use wasmtime::ResourceLimiter;
use wasmtime::component::Resource;

/// What the guest's store holds.
pub(super) struct Host {
    job: Job,
    payload: Payload,
    context: Context,
    /// Absent for an image, which is never given a snapshot.
    volume: Option<VolumeInfo>,
    max_read: u32,
    max_write: u32,
    pub(super) limits: Limits,
    pub(super) wasi: wasi::State,
}

/// The socket to the job process, for the stubs and for what a guest writes as output. There is one thread, and so nobody
/// ever waits for it.
#[derive(Debug, Clone)]
pub(super) struct Job(Arc<Mutex<Socket>>);

/// Why a stub gives the guest no result.
#[derive(Debug)]
pub(super) enum Refused {
    /// The guest sees this.
    Guest(ErrorCode),
    /// The guest sees nothing more: the channel is of no use, and the instance ends.
    Ended(wasmtime::Error),
}

/// The sandbox process cannot go on, and nobody is left to tell: it ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The memory file.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// The process could not be bounded, so it does nothing.
    #[error("the process could not be confined to its order")]
    Unconfined,
    /// An answer to another question, or larger than was asked for.
    #[error("the answer does not belong to the call")]
    WrongAnswer,
}

impl<E: Into<Lost>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self::Ended(wasmtime::Error::new(error.into()))
    }
}

impl Refused {
    fn into_trap(self) -> wasmtime::Error {
        match self {
            // A call without an error in its signature was refused: the job process never does that.
            Self::Guest(_) => wasmtime::Error::new(Lost::WrongAnswer),
            Self::Ended(error) => error,
        }
    }
}

impl Job {
    fn socket(&self) -> MutexGuard<'_, Socket> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, call: &Call) -> Result<Answer, Refused> {
        let mut socket = self.socket();
        socket.send(call)?;
        match socket.receive()? {
            Answer::Error(code) => Err(Refused::Guest(code)),
            answer => Ok(answer),
        }
    }

    fn ask_unit(&self, call: &Call) -> Result<(), Refused> {
        match self.ask(call)? {
            Answer::Unit => Ok(()),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }

    /// A line of the guest's, cut to what a message takes.
    pub(super) fn log(&self, level: LogLevel, message: String) -> Result<(), Refused> {
        self.ask_unit(&Call::Log {
            level,
            message: cut(message),
        })
    }
}

impl Host {
    pub(super) fn new(
        socket: Socket,
        payload: Payload,
        context: Context,
        volume: Option<VolumeInfo>,
        (max_read, max_write): (u32, u32),
        limits: Limits,
        surroundings: Surroundings,
    ) -> Self {
        let job = Job(Arc::new(Mutex::new(socket)));
        Self {
            wasi: wasi::State::new(surroundings, &job),
            job,
            payload,
            context,
            volume,
            max_read,
            max_write,
            limits,
        }
    }

    /// Sends a call that is answered in another way than by an [`Answer`], or not at all.
    pub(super) fn tell(&mut self, call: &Call) -> Result<(), Lost> {
        Ok(self.job.socket().send(call)?)
    }

    /// Waits for what the job process says by itself.
    pub(super) fn hear<M: DeserializeOwned>(&mut self) -> Result<M, Lost> {
        Ok(self.job.socket().receive()?)
    }

    /// Puts bytes where the job process finds them.
    pub(super) fn give(&mut self, bytes: &[u8]) -> Result<u32, Lost> {
        let length = self.payload.give(bytes)?;
        // The payload is far smaller than 4 GiB.
        Ok(length as u32)
    }

    fn ask(&self, call: &Call) -> Result<Answer, Refused> {
        self.job.ask(call)
    }

    fn ask_unit(&self, call: &Call) -> Result<(), Refused> {
        self.job.ask_unit(call)
    }

    fn ask_size(&mut self, call: &Call) -> Result<u64, Refused> {
        match self.ask(call)? {
            Answer::Size(size) => Ok(size),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }

    /// Asks for at most `most` bytes.
    fn ask_bytes(&mut self, call: &Call, most: u32) -> Result<Vec<u8>, Refused> {
        match self.ask(call)? {
            Answer::Bytes { length } if length <= most => Ok(self.payload.take(length.into())?),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }
}

/// Its own limits first, and then its job's, which other instances use too.
impl ResourceLimiter for Host {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if !self.limits.memory_growing(current, desired, maximum)? {
            return Ok(false);
        }
        let bytes = desired.saturating_sub(current) as u64;
        match self.ask_unit(&Call::Grow { bytes }) {
            Ok(()) => Ok(true),
            Err(Refused::Guest(_)) => {
                self.limits.refuse_memory();
                Ok(false)
            }
            Err(Refused::Ended(error)) => Err(error),
        }
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        self.limits.table_growing(current, desired, maximum)
    }

    fn instances(&self) -> usize {
        self.limits.instances()
    }

    fn tables(&self) -> usize {
        self.limits.tables()
    }

    fn memories(&self) -> usize {
        self.limits.memories()
    }
}

impl types::Host for Host {
    fn convert_error_code(&mut self, refused: Refused) -> wasmtime::Result<types::ErrorCode> {
        match refused {
            Refused::Guest(code) => Ok(code.into()),
            Refused::Ended(error) => Err(error),
        }
    }
}

impl volume::Host for Host {}

impl volume::HostSnapshot for Host {
    fn info(&mut self, _: Resource<volume::Snapshot>) -> wasmtime::Result<volume::VolumeInfo> {
        let volume = self.volume.as_ref().ok_or(Lost::WrongAnswer)?;
        Ok(volume::VolumeInfo {
            name: volume.name.clone(),
            size: volume.size,
            block_size: volume.block_size,
            mode: match volume.mode {
                BitmapMode::None => volume::BitmapMode::None,
                BitmapMode::New => volume::BitmapMode::New,
                BitmapMode::Reuse => volume::BitmapMode::Reuse,
            },
        })
    }

    fn drop(&mut self, _: Resource<volume::Snapshot>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl volume::HostDirtyRegions for Host {
    fn next(
        &mut self,
        _: Resource<volume::DirtyRegions>,
        limit: u32,
    ) -> Result<Vec<types::Region>, Refused> {
        let limit = limit.min(MAX_REGIONS);
        let Answer::Regions(regions) = self.ask(&Call::NextRegions { limit })? else {
            return Err(Lost::WrongAnswer.into());
        };
        if regions.len() > limit as usize {
            return Err(Lost::WrongAnswer.into());
        }
        let region = |(offset, length, zero)| types::Region {
            range: types::Extent { offset, length },
            kind: if zero {
                types::RegionKind::Zero
            } else {
                types::RegionKind::Data
            },
        };
        Ok(regions.into_iter().map(region).collect())
    }

    fn drop(&mut self, _: Resource<volume::DirtyRegions>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl volume::HostDiscarder for Host {
    fn discard(
        &mut self,
        _: Resource<volume::Discarder>,
        range: types::Extent,
    ) -> Result<(), Refused> {
        self.ask_unit(&Call::Discard(range.into()))
    }

    fn drop(&mut self, _: Resource<volume::Discarder>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl content::Host for Host {}

impl content::HostReader for Host {
    fn max_read(&mut self, _: Resource<content::Reader>) -> wasmtime::Result<u32> {
        Ok(self.max_read)
    }

    fn read(
        &mut self,
        _: Resource<content::Reader>,
        offset: u64,
        length: u32,
    ) -> Result<Vec<u8>, Refused> {
        if length > self.max_read {
            return Err(Refused::Guest(ErrorCode::TooLarge));
        }
        self.ask_bytes(&Call::Read { offset, length }, length)
    }

    fn drop(&mut self, _: Resource<content::Reader>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl archive::Host for Host {}

impl archive::HostWriter for Host {
    fn put(
        &mut self,
        _: Resource<archive::Writer>,
        _: Resource<volume::Snapshot>,
        range: types::Extent,
        encoding: types::Encoding,
    ) -> Result<(), Refused> {
        self.ask_unit(&Call::Put(range.into(), encoding.into()))
    }

    fn create(
        &mut self,
        _: Resource<archive::Writer>,
        name: String,
        encoding: types::Encoding,
    ) -> Result<Resource<archive::OutputStream>, Refused> {
        match self.ask(&Call::Create {
            name: sent(name),
            encoding: encoding.into(),
        })? {
            Answer::Stream(number) => Ok(Resource::new_own(number)),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }

    fn drop(&mut self, _: Resource<archive::Writer>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl archive::HostOutputStream for Host {
    fn max_write(&mut self, _: Resource<archive::OutputStream>) -> wasmtime::Result<u32> {
        Ok(self.max_write)
    }

    fn write(
        &mut self,
        stream: Resource<archive::OutputStream>,
        bytes: Vec<u8>,
    ) -> Result<(), Refused> {
        if bytes.len() > self.max_write as usize {
            return Err(Refused::Guest(ErrorCode::TooLarge));
        }
        let length = self.give(&bytes)?;
        self.ask_unit(&Call::Write {
            stream: stream.rep(),
            length,
        })
    }

    fn splice(
        &mut self,
        stream: Resource<archive::OutputStream>,
        _: Resource<volume::Snapshot>,
        range: types::Extent,
    ) -> Result<(), Refused> {
        self.ask_unit(&Call::Splice {
            stream: stream.rep(),
            range: range.into(),
        })
    }

    fn claim(
        &mut self,
        stream: Resource<archive::OutputStream>,
        _: Resource<volume::Snapshot>,
        range: types::Extent,
    ) -> Result<(), Refused> {
        self.ask_unit(&Call::Claim {
            stream: stream.rep(),
            range: range.into(),
        })
    }

    fn finish(&mut self, stream: Resource<archive::OutputStream>) -> Result<u64, Refused> {
        self.ask_size(&Call::Finish {
            stream: stream.rep(),
        })
    }

    fn drop(&mut self, stream: Resource<archive::OutputStream>) -> wasmtime::Result<()> {
        self.ask_unit(&Call::DropStream {
            stream: stream.rep(),
        })
        .map_err(Refused::into_trap)
    }
}

impl job::Host for Host {}

impl job::HostContext for Host {
    fn id(&mut self, _: Resource<job::Context>) -> wasmtime::Result<String> {
        Ok(self.context.id.clone())
    }

    fn settings(&mut self, _: Resource<job::Context>) -> wasmtime::Result<String> {
        Ok(self.context.settings.clone())
    }

    fn attachment(
        &mut self,
        _: Resource<job::Context>,
        name: String,
    ) -> wasmtime::Result<Option<Vec<u8>>> {
        if name.len() > MAX_ATTACHMENT_NAME {
            return Ok(None);
        }
        match self
            .ask(&Call::Attachment { name })
            .map_err(Refused::into_trap)?
        {
            Answer::Bytes { length } => {
                Ok(Some(self.payload.take(length.into()).map_err(Lost::from)?))
            }
            Answer::Nothing => Ok(None),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }

    fn log(
        &mut self,
        _: Resource<job::Context>,
        level: job::Level,
        message: String,
    ) -> wasmtime::Result<()> {
        let level = match level {
            job::Level::Debug => LogLevel::Debug,
            job::Level::Info => LogLevel::Info,
            job::Level::Warn => LogLevel::Warn,
            job::Level::Error => LogLevel::Error,
        };
        self.job.log(level, message).map_err(Refused::into_trap)
    }

    fn drop(&mut self, _: Resource<job::Context>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl stored::Host for Host {}

impl stored::HostObjects for Host {
    fn size(&mut self, _: Resource<stored::Objects>, name: String) -> Result<u64, Refused> {
        self.ask_size(&Call::ObjectSize { name: sent(name) })
    }

    fn read(
        &mut self,
        _: Resource<stored::Objects>,
        name: String,
        offset: u64,
        length: u32,
    ) -> Result<Vec<u8>, Refused> {
        if length > self.max_read {
            return Err(Refused::Guest(ErrorCode::TooLarge));
        }
        self.ask_bytes(
            &Call::ObjectRead {
                name: sent(name),
                offset,
                length,
            },
            length,
        )
    }

    fn drop(&mut self, _: Resource<stored::Objects>) -> wasmtime::Result<()> {
        Ok(())
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

/// The beginning of a guest's text, at most [`MAX_TEXT`] bytes.
fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

/// A name, or of one that is too long as much as shows that it is: one byte more than a name may have, whichever character
/// lies across that end.
fn sent(mut name: String) -> String {
    if name.len() > MAX_NAME {
        name.truncate(name.floor_char_boundary(MAX_SENT_NAME));
        name.extend(std::iter::repeat_n('-', MAX_SENT_NAME - name.len()));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_text_is_cut_between_two_characters_and_never_grows(text in "\\PC{0,3000}") {
            let short = cut(text.clone());
            prop_assert!(short.len() <= MAX_TEXT && text.starts_with(&short));
            prop_assert!(short.len() + 4 > MAX_TEXT || short == text);
        }

        #[test]
        fn what_is_sent_of_a_name_is_too_long_if_and_only_if_the_name_is(name in "[a-z]{120,129}ä?[a-zä]{0,9}") {
            let sent = sent(name.clone());
            prop_assert!(sent.len() <= MAX_SENT_NAME);
            prop_assert_eq!(sent.len() > MAX_NAME, name.len() > MAX_NAME);
            prop_assert!(name.len() > MAX_NAME || sent == name);
        }
    }
}
