//! The contract's functions. Each turns into one call over the socket and waits for its answer; only what the order
//! told already is answered here.
//!
//! Handles hold nothing: there is one volume, one writer, one context. Only an output stream has a number, which
//! the job process gave it and looks up; so no table of resources is needed. wasmtime sees to it that a guest can only name handles that it was given.

mod archive;
mod content;
mod job;
mod stored;
mod types;
mod volume;

use super::limits::Limits;
use super::surroundings::Surroundings;
use super::wasi;
use fleecebox_channel::{Answer, Call, Payload, PayloadError, Socket, SocketError};
use fleecebox_contract::{
    Context, ErrorCode, LogLevel, MAX_NAME, MAX_SENT_NAME, MAX_TEXT, VolumeInfo,
};
use serde::de::DeserializeOwned;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use wasmtime::ResourceLimiter;

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

    fn ask_size(&mut self, call: &Call) -> Result<u64, Refused> {
        match self.job.ask(call)? {
            Answer::Size(size) => Ok(size),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }

    /// Asks for at most `most` bytes.
    fn ask_bytes(&mut self, call: &Call, most: u32) -> Result<Vec<u8>, Refused> {
        match self.job.ask(call)? {
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
        match self.job.ask_unit(&Call::Grow { bytes }) {
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
