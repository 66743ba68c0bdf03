//! The connection, as the rest of the program uses it.

use super::{
    assembly::{ReadAssembly, StatusAssembly, StatusRun, push_run},
    error::Error,
    handshake::{ExportInfo, Session, negotiate},
    replies::{Answer, Receiver, Requests},
    wire::{Command, Request},
};
use fleecebox_contract::extent::Extent;
use rustix::net::Shutdown;
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{Notify, oneshot},
    task::JoinSet,
    time::timeout,
};

/// Longest handshake; a local server needs milliseconds.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for a server that takes no more bytes, when saying good-bye.
const DISCONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Most runs that one call of [`Connection::block_status`] returns: 24 MiB of them.
const MAX_RUNS: usize = 1 << 20;

/// One connection to one export, for any number of tasks at once.
///
/// Cloning gives another handle of the same connection. When the last handle is dropped the
/// connection is closed without waiting for the server.
///
/// A future of any request may be dropped at any time. The request may still be carried out, and
/// the connection stays usable.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    link: Arc<Link>,
    /// The task that receives, which ends with the last handle.
    _receiving: JoinSet<()>,
}

/// What the handles share with the receiving task.
#[derive(Debug)]
struct Link {
    session: Session,
    requests: Requests,
    socket: OwnedWriteHalf,
    /// Bytes that the socket did not take yet; nearly always none, as requests are small.
    unsent: Mutex<Vec<u8>>,
    /// Wakes the task that sends what is unsent.
    has_unsent: Notify,
}

impl Connection {
    /// Negotiates with the server at the other end of `stream` and opens `export`.
    ///
    /// `meta_context` is what [`block_status`](Self::block_status) will tell of: `base:allocation`
    /// or `qemu:dirty-bitmap:NAME`. A server that does not grant it is an error. The handshake may
    /// take ten seconds. Must be called within a tokio runtime with I/O and time.
    pub async fn connect(
        stream: UnixStream,
        export: &str,
        meta_context: Option<&str>,
    ) -> Result<Self, Error> {
        Self::connect_within(HANDSHAKE_LIMIT, stream, export, meta_context).await
    }

    /// [`connect`](Self::connect) with a time limit for the handshake.
    pub(super) async fn connect_within(
        limit: Duration,
        mut stream: UnixStream,
        export: &str,
        meta_context: Option<&str>,
    ) -> Result<Self, Error> {
        let session = timeout(limit, negotiate(&mut stream, export, meta_context))
            .await
            .map_err(|_| Error::HandshakeTimeout(limit))??;
        let (reading, socket) = stream.into_split();
        let link = Arc::new(Link {
            session,
            requests: Requests::default(),
            socket,
            unsent: Mutex::new(Vec::new()),
            has_unsent: Notify::new(),
        });
        let receiver = Receiver::new(reading, session.headers, session.context);
        let mut receiving = JoinSet::new();
        receiving.spawn({
            let link = link.clone();
            async move {
                let cause = tokio::select! {
                    biased;
                    cause = receiver.run(&link.requests) => cause,
                    cause = link.send_unsent() => cause.into(),
                };
                link.close(cause);
            }
        });
        Ok(Self(Arc::new(Handle {
            link,
            _receiving: receiving,
        })))
    }

    /// What the server said about the export.
    pub fn info(&self) -> &ExportInfo {
        &self.link().session.info
    }

    /// Reads `extent`, at most [`max_block`](ExportInfo::max_block) bytes, and appends it to `buffer`.
    ///
    /// The returned vector is that buffer, grown where its capacity was too small. It is lost with an error.
    pub async fn read(&self, extent: Extent, buffer: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.check(extent)?;
        let max = self.info().max_block;
        let length = u32::try_from(extent.len())
            .ok()
            .filter(|&length| length <= max)
            .ok_or(Error::TooLong {
                extent,
                max: max.into(),
            })?;
        let assembly = ReadAssembly::new(extent, length, buffer);
        self.request(|answer| Answer::Read(assembly, answer)).await
    }

    /// What the meta context says about `extent`: runs in ascending order that follow each other
    /// without gap from its start to its end, neighbours being different.
    ///
    /// Asks as often as needed. A range with more than 2²⁰ runs is [`Error::TooManyRuns`]: ask for
    /// at most 4 GiB at a time and no server whose runs are of 4 KiB or more can come to that.
    pub async fn block_status(&self, extent: Extent) -> Result<Vec<StatusRun>, Error> {
        if self.link().session.context.is_none() {
            return Err(Error::WithoutContext);
        }
        self.check(extent)?;
        let longest = self.longest_effect();
        let mut runs = Vec::new();
        let mut at = extent.start();
        while let Some(rest) = Extent::between(at, extent.end()) {
            // Each answer describes at least one byte of what was asked, so this ends.
            let asked = rest.pieces(longest).next().unwrap_or(rest);
            for run in self
                .request(|answer| Answer::Status(StatusAssembly::new(asked), answer))
                .await?
            {
                at = run.extent.end();
                push_run(&mut runs, run);
            }
            if runs.len() > MAX_RUNS {
                return Err(Error::TooManyRuns {
                    extent,
                    limit: MAX_RUNS,
                });
            }
        }
        Ok(runs)
    }

    /// Tells the server that the bytes of `extent` are not needed any more.
    ///
    /// Servers round to what they can free and need not do anything. Sent in as few requests as
    /// the protocol carries, one after the other; after an error the ones before have been done.
    pub async fn trim(&self, extent: Extent) -> Result<(), Error> {
        if !self.info().can_trim {
            return Err(Error::CannotTrim);
        }
        self.check(extent)?;
        for piece in extent.pieces(self.longest_effect()) {
            self.request(|answer| Answer::Trim(piece, answer)).await?;
        }
        Ok(())
    }

    /// Waits until all that was written to the export before is in its storage. Does nothing where the server does not
    /// offer it.
    pub async fn flush(&self) -> Result<(), Error> {
        let ExportInfo {
            size, can_flush, ..
        } = *self.info();
        match Extent::new(0, size) {
            Ok(all) if can_flush => self.request(|answer| Answer::Flush(all, answer)).await,
            _ => Ok(()),
        }
    }

    /// Says good-bye and closes the connection, also for other handles of it: requests that wait
    /// there fail with [`Error::Disconnected`].
    ///
    /// A server that takes no more bytes is not waited for longer than a second.
    pub async fn disconnect(self) {
        let link = self.link();
        // There is nobody to tell if the good-bye does not reach the server.
        if link
            .send(Request {
                command: Command::Disconnect,
                flags: 0,
                cookie: 0,
                offset: 0,
                length: 0,
            })
            .is_ok()
        {
            let _ = timeout(DISCONNECT_LIMIT, link.drain_unsent()).await;
        }
        link.close(Error::Disconnected);
    }

    fn link(&self) -> &Link {
        &self.0.link
    }

    /// Longest range for one request that carries no data.
    fn longest_effect(&self) -> u64 {
        self.link()
            .session
            .headers
            .longest_effect(self.info().min_block)
    }

    fn check(&self, extent: Extent) -> Result<(), Error> {
        let ExportInfo {
            size, min_block, ..
        } = *self.info();
        if extent.end() > size {
            return Err(Error::OutOfBounds { extent, size });
        }
        if !extent.is_whole_blocks(min_block, size) {
            return Err(Error::Misaligned { extent, min_block });
        }
        Ok(())
    }

    /// Sends a request and waits for its answer.
    async fn request<T>(
        &self,
        answer: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Answer,
    ) -> Result<T, Error> {
        let link = self.link();
        let (sender, receiver) = oneshot::channel();
        let answer = answer(sender);
        let (command, extent) = (answer.command(), answer.extent());
        let cookie = link.requests.enter(answer)?;
        let flags = if command == Command::Read {
            link.session.read_flags
        } else {
            0
        };
        // A flush names no range (`NBD_CMD_FLUSH`: offset and length are zero).
        let (offset, length) = match command {
            Command::Flush => (0, 0),
            _ => (extent.start(), extent.len()),
        };
        let request = Request {
            command,
            flags,
            cookie,
            offset,
            length,
        };
        if let Err(error) = link.send(request) {
            link.close(error.into());
        }
        // Only the end of the runtime drops the sender without an answer.
        receiver.await.unwrap_or_else(|_| {
            Err(link
                .requests
                .closed()
                .unwrap_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted).into()))
        })
    }
}

impl Link {
    /// Sends a request now as far as the socket takes it; the receiving task sends the rest.
    ///
    /// Not asynchronous, so that no dropped future leaves half a request on the wire.
    fn send(&self, request: Request) -> io::Result<()> {
        let mut unsent = self.unsent();
        let behind = !unsent.is_empty();
        // Reads are bounded by the largest block and everything else by the longest effect, so all fit.
        self.session
            .headers
            .encode_request(&mut unsent, request)
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        if !behind {
            self.send_some(&mut unsent)?;
            if !unsent.is_empty() {
                self.has_unsent.notify_one();
            }
        }
        Ok(())
    }

    /// Sends what the socket takes without waiting.
    fn send_some(&self, unsent: &mut Vec<u8>) -> io::Result<()> {
        while !unsent.is_empty() {
            match self.socket.try_write(unsent) {
                Ok(sent) => drop(unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until everything is sent.
    async fn drain_unsent(&self) -> io::Result<()> {
        while !self.unsent().is_empty() {
            self.socket.writable().await?;
            self.send_some(&mut self.unsent())?;
        }
        Ok(())
    }

    /// Sends what requests left behind, until the socket fails.
    async fn send_unsent(&self) -> io::Error {
        loop {
            self.has_unsent.notified().await;
            if let Err(error) = self.drain_unsent().await {
                return error;
            }
        }
    }

    /// Ends the connection: every waiting request fails with the first cause given.
    fn close(&self, cause: Error) {
        self.requests.close(cause);
        // Fails only on a socket that is closed already.
        let _ = rustix::net::shutdown(self.socket.as_ref(), Shutdown::Both);
    }

    fn unsent(&self) -> MutexGuard<'_, Vec<u8>> {
        // A panic cannot leave half a request: it is appended by infallible writes.
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
