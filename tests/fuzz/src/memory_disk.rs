//! A disk in memory behind an NBD server, as QEMU's fleecing export shows one.
//!
//! What is trimmed reads as rubbish from then on, and every read or trim may be made to fail: so bytes that are used
//! after they were given back cannot go unnoticed.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

const RUBBISH: u8 = 0xdd;
const EIO: u32 = 5;

/// Has flags, can trim, can multi-conn (`NBD_FLAG_*`).
const FLAGS: u16 = 1 | 1 << 5 | 1 << 8;
const UNSUPPORTED: u32 = 0x8000_0001;
const ACK: u32 = 1;
const INFO: u32 = 3;
const GO: u32 = 7;

const READ: u16 = 0;
const DISCONNECT: u16 = 2;
const TRIM: u16 = 4;

/// The bytes, and how many requests they still serve.
pub struct MemoryDisk {
    state: Mutex<State>,
}

struct State {
    bytes: Vec<u8>,
    requests_left: Option<u32>,
}

impl MemoryDisk {
    /// Serves without an error, or as many requests as said.
    pub fn new(bytes: Vec<u8>, requests: Option<u32>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                bytes,
                requests_left: requests,
            }),
        })
    }

    /// Listens on `path`. Everybody is cut off when what is returned is dropped.
    pub fn serve(self: &Arc<Self>, path: &Path) -> io::Result<JoinSet<()>> {
        let listener = UnixListener::bind(path)?;
        let disk = Arc::clone(self);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let disk = Arc::clone(&disk);
                clients.spawn(async move {
                    // A client may go at any time.
                    let _ = disk.client(stream).await;
                });
            }
        });
        Ok(tasks)
    }

    async fn client(&self, mut stream: UnixStream) -> io::Result<()> {
        self.handshake(&mut stream).await?;
        loop {
            let mut request = [0; 28];
            stream.read_exact(&mut request).await?;
            let field = |from: usize, to: usize| {
                request[from..to]
                    .iter()
                    .fold(0u64, |n, &byte| n << 8 | u64::from(byte))
            };
            let (command, offset, length) = (field(6, 8) as u16, field(16, 24), field(24, 28));
            if command == DISCONNECT {
                return Ok(());
            }
            let (error, payload) = match self.act(command, offset as usize, length as usize) {
                Ok(payload) => (0, payload),
                Err(code) => (code, Vec::new()),
            };
            let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
            reply.extend(error.to_be_bytes());
            reply.extend(&request[8..16]);
            reply.extend(payload);
            stream.write_all(&reply).await?;
        }
    }

    async fn handshake(&self, stream: &mut UnixStream) -> io::Result<()> {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").await?;
        stream.read_u32().await?;
        loop {
            stream.read_u64().await?;
            let option = stream.read_u32().await?;
            let mut data = vec![0; stream.read_u32().await? as usize];
            stream.read_exact(&mut data).await?;
            if option != GO {
                stream.write_all(&reply(option, UNSUPPORTED, &[])).await?;
                continue;
            }
            let size = self.state().bytes.len() as u64;
            let info = [&[0, 0][..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat();
            stream.write_all(&reply(option, INFO, &info)).await?;
            return stream.write_all(&reply(option, ACK, &[])).await;
        }
    }

    fn act(&self, command: u16, offset: usize, length: usize) -> Result<Vec<u8>, u32> {
        let mut state = self.state();
        if let Some(left) = &mut state.requests_left {
            *left = left.checked_sub(1).ok_or(EIO)?;
        }
        // The product never asks beyond the end; if it did, this panics.
        let bytes = &mut state.bytes[offset..offset + length];
        match command {
            READ => Ok(bytes.to_vec()),
            TRIM => {
                bytes.fill(RUBBISH);
                Ok(Vec::new())
            }
            other => panic!("nobody asks for command {other}"),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for number in [option, kind, data.len() as u32] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}
