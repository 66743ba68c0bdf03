//! A stream of bytes as the server of an NBD connection: handshake and replies.
//!
//! What must hold: no panic, no hang, and whatever is answered with success has exactly the form that was asked for.

#![no_main]

use arbitrary::Arbitrary;
use fleecebox::extent::Extent;
use fleecebox::nbd::Connection;
use fleecebox_fuzz::runtime;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const CONTEXT: &str = "base:allocation";
const CONTEXT_ID: u32 = 7;
/// Reads are tried on at most this much, so that an execution stays short.
const LONGEST_READ: u64 = 1 << 16;

#[derive(Debug, Arbitrary)]
struct Case {
    handshake: Handshake,
    with_context: bool,
    requests: [Request; 4],
    replies: Vec<Reply>,
}

#[derive(Debug, Arbitrary)]
enum Handshake {
    /// The replies come after these bytes, whatever they are.
    Bytes(Vec<u8>),
    /// Every option is answered with these.
    Options(Vec<OptionReply>),
    /// An honest one, so that the fuzzer gets past it.
    Honest {
        headers: Headers,
        size: u64,
        flags: u16,
        blocks: Option<(u8, u8, u32)>,
    },
}

#[derive(Debug, Arbitrary, PartialEq, Clone, Copy)]
enum Headers {
    Simple,
    Structured,
    Extended,
}

#[derive(Debug, Arbitrary)]
struct OptionReply {
    option: u8,
    kind: u32,
    length: Option<u32>,
    data: Vec<u8>,
}

#[derive(Debug, Arbitrary, Clone, Copy)]
struct Request {
    kind: RequestKind,
    offset: u64,
    length: u64,
}

#[derive(Debug, Arbitrary, Clone, Copy)]
enum RequestKind {
    Read,
    Status,
    Trim,
}

#[derive(Debug, Arbitrary)]
enum Reply {
    Bytes(Vec<u8>),
    Simple {
        cookie: u8,
        error: u32,
        payload: Vec<u8>,
    },
    Chunk {
        cookie: u8,
        done: bool,
        kind: u16,
        length: Option<u64>,
        payload: Vec<u8>,
    },
    Data {
        cookie: u8,
        done: bool,
        offset: u64,
        length: u16,
    },
    Hole {
        cookie: u8,
        done: bool,
        offset: u64,
        length: u32,
    },
    Status {
        cookie: u8,
        done: bool,
        context: bool,
        runs: Vec<(u32, u32)>,
    },
    LongStatus {
        cookie: u8,
        done: bool,
        count: Option<u32>,
        runs: Vec<(u64, u64)>,
    },
}

fuzz_target!(|case: Case| {
    runtime::run(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets can be made");
        let (mut hear, mut say) = theirs.into_split();
        let bytes = case.bytes();
        let server = async {
            // The client may hang up at any byte.
            let _ = say.write_all(&bytes).await;
            drop(say);
            let mut heard = Vec::new();
            let _ = hear.read_to_end(&mut heard).await;
        };
        tokio::join!(client(&case, ours), server);
    });
});

async fn client(case: &Case, stream: UnixStream) {
    let context = case.with_context.then_some(CONTEXT);
    let Ok(connection) = Connection::connect(stream, "disk", context).await else {
        return;
    };
    let [a, b, c, d] = case.requests.map(|request| ask(&connection, request));
    tokio::join!(a, b, c, d);
    connection.disconnect().await;
}

async fn ask(connection: &Connection, request: Request) {
    let info = connection.info();
    assert!(info.min_block.is_power_of_two() && info.max_block.is_multiple_of(info.min_block));
    let block = u64::from(info.min_block);
    let offset = request.offset % info.size.max(1) / block * block;
    let length = (request.length % LONGEST_READ).next_multiple_of(block);
    let end = offset.saturating_add(length.max(1)).min(info.size);
    let Some(extent) = Extent::between(offset, end) else {
        return;
    };
    match request.kind {
        RequestKind::Read => {
            if let Ok(bytes) = connection.read(extent, Vec::new()).await {
                assert_eq!(bytes.len() as u64, extent.len());
            }
        }
        RequestKind::Status => {
            let Some(rest) = Extent::between(offset, info.size) else {
                return;
            };
            let Ok(runs) = connection.block_status(rest).await else {
                return;
            };
            let mut at = rest.start();
            let mut before = None;
            for run in runs {
                assert_eq!(run.extent.start(), at);
                assert_ne!(before.replace(run.flags), Some(run.flags));
                at = run.extent.end();
            }
            assert_eq!(at, rest.end());
        }
        RequestKind::Trim => drop(connection.trim(extent).await),
    }
}

impl Case {
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut headers = Headers::Structured;
        match &self.handshake {
            Handshake::Bytes(bytes) => out.extend(bytes),
            Handshake::Options(replies) => {
                out.extend(b"NBDMAGICIHAVEOPT\0\x03");
                for reply in replies {
                    let length = reply.length.unwrap_or(reply.data.len() as u32);
                    option(
                        &mut out,
                        reply.option.into(),
                        reply.kind,
                        length,
                        &reply.data,
                    );
                }
            }
            Handshake::Honest {
                headers: speaks,
                size,
                flags,
                blocks,
            } => {
                headers = *speaks;
                self.honest(&mut out, *size, *flags, *blocks, headers);
            }
        }
        for reply in &self.replies {
            reply.render(&mut out, headers);
        }
        out
    }

    fn honest(
        &self,
        out: &mut Vec<u8>,
        size: u64,
        flags: u16,
        blocks: Option<(u8, u8, u32)>,
        headers: Headers,
    ) {
        const ACK: u32 = 1;
        const INFO: u32 = 3;
        const META_CONTEXT: u32 = 4;
        const UNSUPPORTED: u32 = 0x8000_0001;
        out.extend(b"NBDMAGICIHAVEOPT\0\x03");
        let extended = headers == Headers::Extended;
        option(out, 11, if extended { ACK } else { UNSUPPORTED }, 0, &[]);
        if !extended {
            let structured = headers == Headers::Structured;
            option(out, 8, if structured { ACK } else { UNSUPPORTED }, 0, &[]);
        }
        if self.with_context {
            let context = [&CONTEXT_ID.to_be_bytes()[..], CONTEXT.as_bytes()].concat();
            option(out, 10, META_CONTEXT, context.len() as u32, &context);
            option(out, 10, ACK, 0, &[]);
        }
        let export = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
        option(out, 7, INFO, export.len() as u32, &export);
        if let Some((min, preferred, max)) = blocks {
            let power = |exponent: u8| 1u32 << (exponent % 18);
            let sizes = [power(min), power(preferred), max].map(u32::to_be_bytes);
            let sizes = [&[0, 3][..], &sizes.concat()].concat();
            option(out, 7, INFO, sizes.len() as u32, &sizes);
        }
        option(out, 7, ACK, 0, &[]);
    }
}

fn option(out: &mut Vec<u8>, option: u32, kind: u32, length: u32, data: &[u8]) {
    out.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
    for number in [option, kind, length] {
        out.extend(number.to_be_bytes());
    }
    out.extend(data);
}

impl Reply {
    fn render(&self, out: &mut Vec<u8>, headers: Headers) {
        match self {
            Self::Bytes(bytes) => out.extend(bytes),
            Self::Simple {
                cookie,
                error,
                payload,
            } => {
                out.extend(0x6744_6698_u32.to_be_bytes());
                out.extend(error.to_be_bytes());
                out.extend(u64::from(cookie % 8).to_be_bytes());
                out.extend(payload);
            }
            Self::Chunk {
                cookie,
                done,
                kind,
                length,
                payload,
            } => {
                let length = length.unwrap_or(payload.len() as u64);
                chunk(out, headers, *cookie, *done, *kind, length, payload);
            }
            Self::Data {
                cookie,
                done,
                offset,
                length,
            } => {
                let mut payload = offset.to_be_bytes().to_vec();
                payload.resize(8 + usize::from(*length), 0x5a);
                let announced = payload.len() as u64;
                chunk(out, headers, *cookie, *done, 1, announced, &payload);
            }
            Self::Hole {
                cookie,
                done,
                offset,
                length,
            } => {
                let payload = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
                chunk(out, headers, *cookie, *done, 2, 12, &payload);
            }
            Self::Status {
                cookie,
                done,
                context,
                runs,
            } => {
                let id = if *context { CONTEXT_ID } else { 0 };
                let mut payload = id.to_be_bytes().to_vec();
                for run in runs {
                    payload.extend([run.0.to_be_bytes(), run.1.to_be_bytes()].concat());
                }
                let announced = payload.len() as u64;
                chunk(out, headers, *cookie, *done, 5, announced, &payload);
            }
            Self::LongStatus {
                cookie,
                done,
                count,
                runs,
            } => {
                let count = count.unwrap_or(runs.len() as u32);
                let mut payload = [CONTEXT_ID.to_be_bytes(), count.to_be_bytes()].concat();
                for run in runs {
                    payload.extend([run.0.to_be_bytes(), run.1.to_be_bytes()].concat());
                }
                let announced = payload.len() as u64;
                chunk(out, headers, *cookie, *done, 6, announced, &payload);
            }
        }
    }
}

/// A client counts its cookies from 0, and this one makes few requests.
fn chunk(
    out: &mut Vec<u8>,
    headers: Headers,
    cookie: u8,
    done: bool,
    kind: u16,
    length: u64,
    payload: &[u8],
) {
    let extended = headers == Headers::Extended;
    let magic: u32 = if extended { 0x6e8a_278c } else { 0x668e_33ef };
    out.extend(magic.to_be_bytes());
    out.extend(u16::from(done).to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u64::from(cookie % 8).to_be_bytes());
    if extended {
        out.extend(0u64.to_be_bytes());
        out.extend(length.to_be_bytes());
    } else {
        out.extend((length as u32).to_be_bytes());
    }
    out.extend(payload);
}
