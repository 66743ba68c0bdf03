//! Frames on a unix stream socket: four bytes of length, little-endian, then the message in postcard's encoding.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Most bytes in one message. The longest is an order to run, with a receipt of [`fleecebox_contract::MAX_KEPT_RECEIPT`] as
/// its base and the operator's settings beside it.
pub const MAX_MESSAGE: usize = fleecebox_contract::MAX_KEPT_RECEIPT + (512 << 10);

/// Bytes of a frame before its message.
const HEADER: usize = 4;

/// How much is asked of the socket at once. Nearly all messages are far shorter, so one system call fetches one.
const CHUNK: usize = 4 << 10;

/// Why no message was sent or received. After any of these the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The other process closed its end, in most cases by ending.
    #[error("the other process is gone")]
    Closed,
    /// The message has more bytes than any may have.
    #[error("a message of {length} bytes is longer than the {MAX_MESSAGE} that are allowed")]
    TooLong {
        /// In bytes, as claimed by the sender.
        length: usize,
    },
    /// The bytes are no message of the kind that is expected at this point.
    #[error("a message is not one that can be understood here")]
    Malformed,
    /// The kernel failed.
    #[error("the socket between the two processes failed")]
    Os(#[source] std::io::Error),
}

impl From<std::io::Error> for SocketError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => {
                Self::Closed
            }
            _ => Self::Os(error),
        }
    }
}

/// The sandbox's end: blocks.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
    inbox: Inbox,
}

impl Socket {
    /// Frames on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            inbox: Inbox::default(),
        }
    }

    /// Sends one message.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), SocketError> {
        Ok(self.stream.write_all(&frame(message)?)?)
    }

    /// Waits for one message.
    pub fn receive<M: DeserializeOwned>(&mut self) -> Result<M, SocketError> {
        loop {
            if let Some(message) = self.inbox.message()? {
                return Ok(message);
            }
            let mut chunk = [0; CHUNK];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(SocketError::Closed),
                Ok(count) => self.inbox.bytes.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The job's end.
#[derive(Debug)]
pub struct AsyncSocket {
    stream: tokio::net::UnixStream,
    inbox: Inbox,
    outbox: Outbox,
}

impl AsyncSocket {
    /// Frames on `stream`. Must be called inside a tokio runtime.
    pub fn new(stream: UnixStream) -> Result<Self, SocketError> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        Ok(Self {
            stream,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
        })
    }

    /// Puts one message on its way: [`Self::receive`] sends it, as far as it is not sent yet.
    pub fn queue(&mut self, message: &impl Serialize) -> Result<(), SocketError> {
        self.outbox.bytes.extend(frame(message)?);
        Ok(())
    }

    /// Sends one message. May be cancelled: what is left of it goes first the next time.
    pub async fn send(&mut self, message: &impl Serialize) -> Result<(), SocketError> {
        self.queue(message)?;
        self.flush().await
    }

    /// Waits for one message, after the other side has taken what is queued: one that does not read gets no further.
    /// May be cancelled: what has arrived is kept for the next call.
    pub async fn receive<M: DeserializeOwned>(&mut self) -> Result<M, SocketError> {
        self.flush().await?;
        loop {
            if let Some(message) = self.inbox.message()? {
                return Ok(message);
            }
            let mut chunk = [0; CHUNK];
            match self.stream.read(&mut chunk).await? {
                0 => return Err(SocketError::Closed),
                count => self.inbox.bytes.extend_from_slice(&chunk[..count]),
            }
        }
    }

    async fn flush(&mut self) -> Result<(), SocketError> {
        while let left @ [_, ..] = &self.outbox.bytes[self.outbox.sent..] {
            match self.stream.write(left).await? {
                0 => return Err(SocketError::Closed),
                count => self.outbox.sent += count,
            }
        }
        self.outbox = Outbox::default();
        Ok(())
    }
}

/// What is to be sent. Turns are strict, so that it is one frame, or two where the first is an order.
#[derive(Debug, Default)]
struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

fn frame(message: &impl Serialize) -> Result<Vec<u8>, SocketError> {
    let mut bytes =
        postcard::to_extend(message, vec![0; HEADER]).map_err(|_| SocketError::Malformed)?;
    let length = bytes.len() - HEADER;
    if length > MAX_MESSAGE {
        return Err(SocketError::TooLong { length });
    }
    // MAX_MESSAGE is far below u32::MAX.
    bytes[..HEADER].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// What has arrived and is no whole message yet. Holds at most one frame and one chunk more.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
}

impl Inbox {
    /// Takes the first message out, if all of it has arrived.
    ///
    /// The decoder reserves no more elements than there are bytes left in the message, so what a few bytes can
    /// make it allocate stays a small multiple of them.
    fn message<M: DeserializeOwned>(&mut self) -> Result<Option<M>, SocketError> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_MESSAGE {
            return Err(SocketError::TooLong { length });
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        match postcard::take_from_bytes(body) {
            Ok((message, [])) => {
                self.bytes.drain(..HEADER + length);
                Ok(Some(message))
            }
            _ => Err(SocketError::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Answer, Call, Order};
    use fleecebox_contract::RawRange;
    use proptest::prelude::*;

    fn inbox(bytes: &[u8]) -> Inbox {
        Inbox {
            bytes: bytes.to_vec(),
        }
    }

    #[test]
    fn a_message_arrives_as_it_was_sent() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Socket::new(a), Socket::new(b));
        a.send(&Call::Discard(RawRange {
            offset: u64::MAX,
            length: 7,
        }))
        .unwrap();
        a.send(&Call::NextRegions { limit: 3 }).unwrap();
        assert!(matches!(
            b.receive::<Call>().unwrap(),
            Call::Discard(RawRange {
                offset: u64::MAX,
                length: 7
            })
        ));
        assert!(matches!(
            b.receive::<Call>().unwrap(),
            Call::NextRegions { limit: 3 }
        ));
        drop(a);
        assert!(matches!(b.receive::<Call>(), Err(SocketError::Closed)));
    }

    #[test]
    fn the_two_ends_understand_each_other() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (a, b) = UnixStream::pair().unwrap();
            let mut here = AsyncSocket::new(a).unwrap();
            let there = std::thread::spawn(move || {
                let mut there = Socket::new(b);
                let order: Order = there.receive().unwrap();
                assert!(matches!(order, Order::Compile { length: 9 }));
                there
                    .send(&Call::Read {
                        offset: 1,
                        length: 2,
                    })
                    .unwrap();
            });
            here.send(&Order::Compile { length: 9 }).await.unwrap();
            assert!(matches!(
                here.receive().await.unwrap(),
                Call::Read {
                    offset: 1,
                    length: 2
                }
            ));
            there.join().unwrap();
            assert!(matches!(
                here.receive::<Call>().await,
                Err(SocketError::Closed)
            ));
        });
    }

    #[test]
    fn what_was_begun_to_be_sent_to_one_that_does_not_read_is_finished_later() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (a, b) = UnixStream::pair().unwrap();
            let mut here = AsyncSocket::new(a).unwrap();
            let long = |byte| Call::Done(crate::Outcome::Receipt(vec![byte; 1 << 20]));
            let moment = std::time::Duration::from_millis(50);
            here.queue(&long(1)).unwrap();
            let heard = tokio::time::timeout(moment, here.receive::<Answer>()).await;
            assert!(heard.is_err(), "it is stuck in the socket: {heard:?}");
            let there = std::thread::spawn(move || {
                let mut there = Socket::new(b);
                for byte in 1..=2 {
                    assert_eq!(there.receive::<Call>().unwrap(), long(byte));
                }
                there.send(&Answer::Unit).unwrap();
            });
            here.queue(&long(2)).unwrap();
            assert_eq!(here.receive::<Answer>().await.unwrap(), Answer::Unit);
            there.join().unwrap();
        });
    }

    #[test]
    fn a_receipt_of_the_greatest_length_fits_and_a_longer_message_does_not() {
        let receipt = |length| Call::Done(crate::Outcome::Receipt(vec![1; length]));
        assert!(frame(&receipt(fleecebox_contract::MAX_KEPT_RECEIPT)).is_ok());
        assert!(matches!(
            frame(&receipt(MAX_MESSAGE)),
            Err(SocketError::TooLong { length }) if length > MAX_MESSAGE
        ));
    }

    #[test]
    fn a_claimed_length_past_the_limit_is_refused_by_its_header_alone() {
        let header = (MAX_MESSAGE as u32 + 1).to_le_bytes();
        assert!(matches!(
            inbox(&header).message::<Call>(),
            Err(SocketError::TooLong { .. })
        ));
    }

    #[test]
    fn bytes_after_the_message_inside_its_frame_are_refused() {
        let mut bytes = frame(&Answer::Unit).unwrap();
        bytes[0] += 1;
        bytes.push(0);
        assert!(matches!(
            inbox(&bytes).message::<Answer>(),
            Err(SocketError::Malformed)
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_at_all_give_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut framed = (bytes.len() as u32).to_le_bytes().to_vec();
            framed.extend_from_slice(&bytes);
            match inbox(&framed).message::<Call>() {
                // What is understood is understood completely.
                Ok(message) => prop_assert!(message.is_some()),
                Err(error) => prop_assert!(matches!(error, SocketError::Malformed)),
            }
            prop_assert!(!matches!(inbox(&bytes).message::<Answer>(), Err(SocketError::Closed)));
        }

        #[test]
        fn a_message_cut_anywhere_is_waited_for(offset: u64, length: u32, cut in 0usize..100) {
            let bytes = frame(&Call::Read { offset, length }).unwrap();
            let cut = cut % bytes.len();
            let mut inbox = inbox(&bytes[..cut]);
            prop_assert!(inbox.message::<Call>().unwrap().is_none());
            inbox.bytes.extend_from_slice(&bytes[cut..]);
            match inbox.message::<Call>().unwrap() {
                Some(Call::Read { offset: o, length: l }) => prop_assert_eq!((o, l), (offset, length)),
                other => prop_assert!(false, "{:?}", other),
            }
            prop_assert!(inbox.bytes.is_empty());
        }
    }
}
