//! Frames that a sandbox process sends to its job.
//!
//! What must hold: no panic; a frame that was cut anywhere gives the same messages; what the bounds let pass is small
//! enough for what comes after.

#![no_main]

use arbitrary::Arbitrary;
use fleecebox::channel::{AsyncSocket, Bounds, Call, OpenImage, Order, Run};
use fleecebox::contract::{
    BitmapMode, Context, GuestLimits, MAX_NAME, MAX_REGIONS, VolumeInfo, World,
};
use fleecebox_fuzz::runtime;
use libfuzzer_sys::fuzz_target;
use std::os::unix::net::UnixStream;
use tokio::io::AsyncWriteExt;

const MOST: u32 = 4096;

#[derive(Debug, Arbitrary)]
struct Case {
    kind: Kind,
    frames: Vec<Frame>,
    /// Where the stream of bytes is cut in two writes.
    cut: u16,
}

#[derive(Debug, Arbitrary, Clone, Copy)]
enum Kind {
    Compile,
    Run {
        blind: bool,
        reader: bool,
        discarder: bool,
    },
    OpenImage,
}

#[derive(Debug, Arbitrary)]
struct Frame {
    length: Option<u32>,
    body: Vec<u8>,
}

fuzz_target!(|case: Case| {
    let mut bytes = Vec::new();
    for frame in &case.frames {
        let length = frame.length.unwrap_or(frame.body.len() as u32);
        bytes.extend(length.to_le_bytes());
        bytes.extend(&frame.body);
    }
    let whole = runtime::run(receive(&bytes, bytes.len()));
    let cut = usize::from(case.cut) % (bytes.len() + 1);
    let in_two = runtime::run(receive(&bytes, cut));
    assert_eq!(format!("{whole:?}"), format!("{in_two:?}"));

    let bounds = Bounds::new(&order(case.kind));
    for call in whole {
        if bounds.check(&call).is_ok() {
            check(case.kind, &call);
        }
    }
});

/// What arrives before the first error.
async fn receive(bytes: &[u8], cut: usize) -> Vec<Call> {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets can be made");
    theirs
        .set_nonblocking(true)
        .expect("a socket can be made not to block");
    let mut theirs = tokio::net::UnixStream::from_std(theirs).expect("the runtime takes a socket");
    let mut socket = AsyncSocket::new(ours).expect("the runtime takes a socket");
    let (first, second) = bytes.split_at(cut);
    let send = async move {
        let _ = theirs.write_all(first).await;
        tokio::task::yield_now().await;
        let _ = theirs.write_all(second).await;
    };
    let hear = async move {
        let mut calls = Vec::new();
        while let Ok(call) = socket.receive::<Call>().await {
            calls.push(call);
        }
        calls
    };
    tokio::join!(send, hear).1
}

/// What the bounds promise to those who act on a call.
fn check(kind: Kind, call: &Call) {
    match call {
        Call::NextRegions { limit } => assert!(*limit <= MAX_REGIONS),
        Call::Read { length, .. } => {
            assert!(*length <= MOST);
            let Kind::Run { blind, reader, .. } = kind else {
                panic!("a volume is read by a run only");
            };
            assert!(reader && !blind);
        }
        Call::Discard(_) => {
            assert!(matches!(
                kind,
                Kind::Run {
                    discarder: true,
                    ..
                }
            ));
        }
        Call::Write { length, .. } => assert!(*length <= MOST),
        Call::ObjectSize { name } => {
            assert!(matches!(kind, Kind::OpenImage) && name.len() <= MAX_NAME);
        }
        Call::ObjectRead { name, length, .. } => {
            assert!(matches!(kind, Kind::OpenImage) && name.len() <= MAX_NAME && *length <= MOST);
        }
        Call::Create { name, .. } | Call::Attachment { name } => assert!(name.len() <= MAX_NAME),
        _ => {}
    }
}

fn order(kind: Kind) -> Order {
    let limits = GuestLimits {
        memory: 1,
        cpu_ms: 1,
    };
    let context = Context {
        id: "job".into(),
        settings: String::new(),
    };
    match kind {
        Kind::Compile => Order::Compile { length: 1 },
        Kind::OpenImage => Order::OpenImage(OpenImage {
            wasi: Default::default(),
            limits,
            context,
            receipt: Vec::new(),
            max_read: MOST,
            still: Default::default(),
        }),
        Kind::Run {
            blind,
            reader,
            discarder,
        } => Order::Run(Run {
            world: if blind {
                World::BlindProvider
            } else {
                World::Provider
            },
            wasi: Default::default(),
            limits,
            context,
            volume: VolumeInfo {
                name: "disk".into(),
                size: 1 << 20,
                block_size: 65536,
                mode: BitmapMode::None,
            },
            reader,
            discarder,
            base: None,
            max_read: MOST,
            max_write: MOST,
        }),
    }
}
