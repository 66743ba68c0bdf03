//! Native code in the place of a sandbox process, confined as one. Its order's settings say what it does.

#[path = "../../../worker/src/confine/tests/native.rs"]
#[allow(dead_code, reason = "the rest is for the tests there")]
mod native;

use crate::channel::{
    Answer, Call, Confinement, MAX_MESSAGE, Order, Outcome, Payload, Run, Socket, take_over,
};
use crate::contract::{Encoding, ErrorCode, Interface, LogLevel, RawRange};
use fleecebox_worker::confine::enter;
use native::{calls, fill_page_tables, parent, system_call};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

/// Is set where this program is to take a sandbox process's place.
pub(super) const STAND_IN: &str = "FLEECEBOX_STAND_IN";

/// Memory that is asked for beside the runtime's, in bytes.
const WORK: u64 = 64 << 20;

/// Not a test: what takes the place.
#[test]
#[ignore = "is run by the tests of jobs, in the place of a sandbox process"]
fn stand_in() {
    if std::env::var_os(STAND_IN).is_some() {
        let done = take_the_place();
        std::process::exit(i32::from(done.is_none()));
    }
}

fn take_the_place() -> Option<()> {
    let (stream, mut confined) = enter().ok()?;
    let payload = Payload::adopt(take_over(&stream).ok()?.into_iter().next()?).ok()?;
    let mut raw = stream.try_clone().ok()?;
    let calls = calls(payload.as_fd().as_raw_fd().unsigned_abs().into());
    let parents_memory = format!("/proc/{}/mem", parent());
    let mut socket = Socket::new(stream);
    confined.hold(payload.size()).ok()?;
    let missing = confined.missing().to_vec();
    socket.send(&Confinement { missing }).ok()?;
    let run = match socket.receive().ok()? {
        Order::Compile { .. } => {
            confined.compile().ok()?;
            // What it says of a component is a claim like any other.
            let exports =
                ["backup", "restore"].map(|name| format!("fleecebox:provider/{name}@0.1.0"));
            let interface = Interface {
                imports: vec![],
                exports: exports.into(),
            };
            let length = payload.give(b"no machine code at all").ok()?;
            let compiled = Outcome::Compiled { length, interface };
            return socket.send(&Call::Done(compiled)).ok();
        }
        Order::Fit(_) => return socket.send(&Call::Done(Outcome::Fits)).ok(),
        Order::Run(run) => run,
        Order::OpenImage(_) => return None,
    };
    confined.load(WORK, 0).ok()?;
    confined.run().ok()?;
    let escape = run.context.settings.split('"').nth(1)?.to_owned();
    if let Some((_, number, arguments)) = calls.iter().find(|(name, ..)| *name == escape) {
        let _ = system_call(*number, *arguments);
        return None;
    }
    misbehave(
        &escape,
        &run,
        &mut socket,
        &mut raw,
        &payload,
        &parents_memory,
    )
}

/// Asks until it is told that the job was cancelled, sees that every later call fails the same way, and returns so.
fn until_cancelled(ask: &mut impl FnMut(&Call) -> Option<Answer>) -> Option<()> {
    let cancelled = Answer::Error(ErrorCode::Cancelled);
    while ask(&Call::NextRegions { limit: 1 })? != cancelled {}
    let range = RawRange {
        offset: 0,
        length: 65536,
    };
    let (stream, offset, length) = (0, 0, 4096);
    let (name, encoding) = ("late".to_owned(), Encoding::Identity);
    for late in [
        Call::NextRegions { limit: 0 },
        Call::Discard(range),
        Call::Read { offset, length },
        Call::Put(range, encoding),
        Call::Create { name, encoding },
        Call::Write { stream, length },
        Call::Splice { stream, range },
        Call::Claim { stream, range },
        Call::Finish { stream },
    ] {
        if ask(&late)? != cancelled {
            return None;
        }
    }
    let (level, message) = (LogLevel::Info, "cancelled".to_owned());
    for (silent, answer) in [
        (Call::DropStream { stream }, Answer::Unit),
        (Call::Log { level, message }, Answer::Unit),
        (
            Call::Attachment {
                name: "late".into(),
            },
            Answer::Nothing,
        ),
    ] {
        if ask(&silent)? != answer {
            return None;
        }
    }
    // Nobody answers this.
    ask(&Call::Done(Outcome::GuestError(ErrorCode::Cancelled)));
    Some(())
}

/// Says what no stub says, or says it when and as often as it likes.
fn misbehave(
    escape: &str,
    run: &Run,
    socket: &mut Socket,
    raw: &mut UnixStream,
    payload: &Payload,
    parents_memory: &str,
) -> Option<()> {
    let whole = RawRange {
        offset: 0,
        length: run.volume.size,
    };
    let receipt = Call::Done(Outcome::Receipt(b"all is well".to_vec()));
    let mut ask = |call: &Call| -> Option<Answer> {
        socket.send(call).ok()?;
        socket.receive().ok()
    };
    match escape {
        "reads what it was not granted" => drop(ask(&Call::Read {
            offset: 0,
            length: 1,
        })),
        "reads more than it may" => drop(ask(&Call::Read {
            offset: 0,
            length: u32::MAX,
        })),
        "writes more than there is" => drop(ask(&Call::Write {
            stream: 0,
            length: u32::MAX,
        })),
        "asks for stored objects" => drop(ask(&Call::ObjectRead {
            name: "raw0".into(),
            offset: 0,
            length: 1,
        })),
        "ends another order" => drop(ask(&Call::Done(Outcome::Opened))),
        "names what is too long" => drop(ask(&Call::Create {
            name: "x".repeat(100_000),
            encoding: Encoding::Zstd,
        })),
        "announces four gigabytes" => drop(raw.write_all(&u32::MAX.to_le_bytes())),
        "talks rubbish" => drop(raw.write_all(&[&[16, 0, 0, 0][..], &[0xff; 16]].concat())),
        "says half a word" => {
            let half = (MAX_MESSAGE as u32).to_le_bytes();
            raw.write_all(&half).ok()?;
            // The job waits for the rest and never says a word.
            let _ = raw.read(&mut [0]);
        }
        "never listens" => loop {
            socket.send(&Call::NextRegions { limit: 4096 }).ok()?;
        },
        "talks without end" => loop {
            let message = "\u{1b}[2J".repeat(800);
            let level = LogLevel::Error;
            ask(&Call::Log { level, message })?;
        },
        "returns when it is cancelled" => return until_cancelled(&mut ask),
        "asks on after a cancel" => loop {
            ask(&Call::NextRegions { limit: 1 })?;
        },
        "ends at once" => return Some(()),
        "says that all is done" => return socket.send(&receipt).ok(),
        "uses what is not its own" => {
            // Streams that nobody opened, names that reach out, ranges that are nowhere.
            for stream in [0, 1, u32::MAX] {
                ask(&Call::Splice {
                    stream,
                    range: whole,
                })?;
                ask(&Call::Claim {
                    stream,
                    range: whole,
                })?;
                ask(&Call::Write { stream, length: 9 })?;
                ask(&Call::DropStream { stream })?;
                ask(&Call::Finish { stream })?;
            }
            for name in ["../../../escaped", "/tmp/escaped", "a/b", "", "."] {
                let name = name.to_owned();
                let encoding = Encoding::Identity;
                ask(&Call::Create { name, encoding })?;
            }
            let range = RawRange {
                offset: u64::MAX,
                length: u64::MAX,
            };
            ask(&Call::Put(range, Encoding::Zstd))?;
            ask(&Call::Discard(whole))?;
            return socket.send(&receipt).ok();
        }
        "scribbles on what was given" => {
            let name = "scribbled".to_owned();
            let encoding = Encoding::Identity;
            ask(&Call::Create { name, encoding })?;
            for turn in 0..200_u8 {
                payload.give(&[turn; 4096]).ok()?;
                let length = 4096;
                ask(&Call::Write { stream: 0, length })?;
                payload.give(&[!turn; 4096]).ok()?;
            }
            let range = whole;
            ask(&Call::Claim { stream: 0, range })?;
            ask(&Call::Finish { stream: 0 })?;
            return socket.send(&receipt).ok();
        }
        "fills page tables" => {
            fill_page_tables()?;
        }
        "opens what it can name" => {
            let opened = std::fs::File::open(parents_memory).is_ok()
                || std::fs::File::open("/proc/self/mem").is_ok()
                || std::fs::File::open("/etc/passwd").is_ok();
            let message = format!("opened: {opened}");
            let level = LogLevel::Info;
            ask(&Call::Log { level, message })?;
            return socket.send(&receipt).ok();
        }
        "does only what it was granted" => {
            ask(&Call::Read {
                offset: 0,
                length: 4096,
            })?;
            for piece in (0..run.volume.size).step_by(1 << 20) {
                let range = RawRange {
                    offset: piece,
                    length: 1 << 20,
                };
                ask(&Call::Put(range, Encoding::Zstd))?;
            }
            return socket.send(&receipt).ok();
        }
        _ => return None,
    }
    // Whatever it was, the job has ended it by now; if not, it goes on as if nothing had been.
    ask(&Call::NextRegions { limit: 1 })?;
    socket.send(&receipt).ok()
}
