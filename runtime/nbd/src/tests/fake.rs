//! A server made of the bytes that a test wants, at the other end of a socket pair.

use crate::Connection;
use bytes::BufMut;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

pub(super) const SIZE: u64 = 1 << 30;
pub(super) const CONTEXT: &str = "base:allocation";
pub(super) const CONTEXT_ID: u32 = 77;

pub(super) const ACK: u32 = 1;
pub(super) const INFO: u32 = 3;
pub(super) const META_CONTEXT: u32 = 4;
pub(super) const ERR_UNSUP: u32 = 0x8000_0001;

pub(super) const DATA: u16 = 1;
pub(super) const HOLE: u16 = 2;
pub(super) const STATUS: u16 = 5;
pub(super) const STATUS_EXT: u16 = 6;
pub(super) const ERROR: u16 = 0x8001;
pub(super) const ERROR_OFFSET: u16 = 0x8002;

/// How much of the protocol the server speaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Speaks {
    Simple,
    Structured,
    Extended,
}

pub(super) struct Server {
    pub(super) stream: UnixStream,
    pub(super) speaks: Speaks,
}

/// A request as the server sees it.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Server {
    pub(super) async fn greet(&mut self) {
        self.stream
            .write_all(b"NBDMAGICIHAVEOPT\0\x03")
            .await
            .unwrap();
        assert_eq!(self.stream.read_u32().await.unwrap(), 3);
    }

    /// The next option and its data.
    pub(super) async fn option(&mut self) -> (u32, Vec<u8>) {
        assert_eq!(
            &self.stream.read_u64().await.unwrap().to_be_bytes(),
            b"IHAVEOPT"
        );
        let option = self.stream.read_u32().await.unwrap();
        let mut data = vec![0; self.stream.read_u32().await.unwrap() as usize];
        self.stream.read_exact(&mut data).await.unwrap();
        (option, data)
    }

    pub(super) async fn reply_option(&mut self, option: u32, reply: u32, data: &[u8]) {
        let mut bytes = Vec::new();
        bytes.put_u64(0x0003_e889_0455_65a9);
        bytes.put_u32(option);
        bytes.put_u32(reply);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// Answers every option as an honest server does, up to the transmission phase.
    pub(super) async fn negotiate(&mut self) {
        self.greet().await;
        loop {
            let (option, _) = self.option().await;
            match option {
                11 if self.speaks == Speaks::Extended => self.reply_option(option, ACK, &[]).await,
                8 if self.speaks == Speaks::Structured => self.reply_option(option, ACK, &[]).await,
                10 => {
                    let context = [&CONTEXT_ID.to_be_bytes()[..], CONTEXT.as_bytes()].concat();
                    self.reply_option(option, META_CONTEXT, &context).await;
                    self.reply_option(option, ACK, &[]).await;
                }
                7 => {
                    self.reply_option(option, INFO, &export_info(SIZE, 0x1a1))
                        .await;
                    self.reply_option(option, INFO, &block_sizes(512, 4096, 1 << 20))
                        .await;
                    self.reply_option(option, ACK, &[]).await;
                    return;
                }
                _ => self.reply_option(option, ERR_UNSUP, b"not here").await,
            }
        }
    }

    pub(super) async fn request(&mut self) -> Seen {
        let extended = self.speaks == Speaks::Extended;
        let magic = self.stream.read_u32().await.unwrap();
        assert_eq!(magic, if extended { 0x21e4_1c71 } else { 0x2560_9513 });
        let flags = self.stream.read_u16().await.unwrap();
        let command = self.stream.read_u16().await.unwrap();
        // Only a read with structured replies may be asked not to be cut in pieces.
        assert_eq!(
            flags,
            if command == 0 && self.speaks != Speaks::Simple {
                4
            } else {
                0
            }
        );
        Seen {
            command,
            cookie: self.stream.read_u64().await.unwrap(),
            offset: self.stream.read_u64().await.unwrap(),
            length: if extended {
                self.stream.read_u64().await.unwrap()
            } else {
                self.stream.read_u32().await.unwrap().into()
            },
        }
    }

    /// Sends a chunk whose header announces `length` bytes, whatever `payload` has.
    pub(super) async fn chunk_announcing(
        &mut self,
        seen: &Seen,
        done: bool,
        kind: u16,
        length: u64,
        payload: &[u8],
    ) {
        let mut bytes = Vec::new();
        bytes.put_u32(if self.speaks == Speaks::Extended {
            0x6e8a_278c
        } else {
            0x668e_33ef
        });
        bytes.put_u16(u16::from(done));
        bytes.put_u16(kind);
        bytes.put_u64(seen.cookie);
        if self.speaks == Speaks::Extended {
            bytes.put_u64(seen.offset);
            bytes.put_u64(length);
        } else {
            bytes.put_u32(length as u32);
        }
        bytes.put_slice(payload);
        // The client may have hung up on what came before.
        let _ = self.stream.write_all(&bytes).await;
    }

    pub(super) async fn chunk(&mut self, seen: &Seen, done: bool, kind: u16, payload: &[u8]) {
        self.chunk_announcing(seen, done, kind, payload.len() as u64, payload)
            .await;
    }

    pub(super) async fn simple(&mut self, cookie: u64, error: u32, payload: &[u8]) {
        let mut bytes = Vec::new();
        bytes.put_u32(0x6744_6698);
        bytes.put_u32(error);
        bytes.put_u64(cookie);
        bytes.put_slice(payload);
        let _ = self.stream.write_all(&bytes).await;
    }

    /// Keeps the connection open without a word, until the client closes it.
    pub(super) async fn stall(mut self) {
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest).await;
    }
}

pub(super) fn export_info(size: u64, flags: u16) -> Vec<u8> {
    [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

pub(super) fn block_sizes(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    [
        &[0, 3][..],
        &min.to_be_bytes(),
        &preferred.to_be_bytes(),
        &max.to_be_bytes(),
    ]
    .concat()
}

pub(super) fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], bytes].concat()
}

pub(super) fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

pub(super) fn error(code: u32, message: &str) -> Vec<u8> {
    [
        &code.to_be_bytes()[..],
        &(message.len() as u16).to_be_bytes(),
        message.as_bytes(),
    ]
    .concat()
}

pub(super) fn status(context: u32, descriptors: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = context.to_be_bytes().to_vec();
    for &(length, flags) in descriptors {
        bytes.put_u32(length);
        bytes.put_u32(flags);
    }
    bytes
}

pub(super) fn status_ext(context: u32, count: u32, descriptors: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = [context.to_be_bytes(), count.to_be_bytes()].concat();
    for &(length, flags) in descriptors {
        bytes.put_u64(length);
        bytes.put_u64(flags);
    }
    bytes
}

pub(super) fn pair(speaks: Speaks) -> (UnixStream, Server) {
    let (client, server) = UnixStream::pair().unwrap();
    (
        client,
        Server {
            stream: server,
            speaks,
        },
    )
}

/// A client connected to a server that has been honest so far.
pub(super) async fn connected(speaks: Speaks) -> (Connection, Server) {
    let (stream, mut server) = pair(speaks);
    let context = (speaks != Speaks::Simple).then_some(CONTEXT);
    let (connection, ()) = tokio::join!(
        Connection::connect(stream, "x", context),
        server.negotiate()
    );
    (connection.unwrap(), server)
}

/// Nothing in these tests waits for anything but the other end.
pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), future)
        .await
        .expect("it hangs")
}
