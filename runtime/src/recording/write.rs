//! Writing a recording beside a job that must not notice it.

use super::{Header, Line, MAX_RECORDING, Payload, carried_by_answer, carried_by_call};
use crate::channel::{Answer, Call, ImageRead, Order};
use crate::contract::{ErrorCode, with_causes};
use crate::sandbox::{self, Listener, Witness};
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Most bytes that wait for the file: one that takes them slower than the job makes them loses the rest, not the job's
/// memory.
const MAX_WAITING: u64 = 32 << 20;

/// How long a finished job waits for the file to take the rest.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// A recording under way. Clones write to the same one.
#[derive(Debug, Clone)]
pub struct Recorder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bytes: bool,
    waiting: Arc<AtomicU64>,
    state: Mutex<Writing>,
}

#[derive(Debug)]
struct Writing {
    /// None once the recording has ended.
    queue: Option<Sender<Vec<u8>>>,
    /// What came of the writing thread.
    ended: Receiver<io::Result<()>>,
    length: u64,
    processes: u32,
    cut: Option<String>,
}

impl Recorder {
    /// Begins a recording in an empty file.
    ///
    /// # Errors
    /// When the file does not take its first line, or no thread can be started.
    pub fn start(mut file: File, header: &Header) -> io::Result<Self> {
        let first = encoded(header);
        file.write_all(&first)?;
        let (queue, lines) = mpsc::channel::<Vec<u8>>();
        let (say_ended, ended) = mpsc::channel();
        let waiting = Arc::new(AtomicU64::new(0));
        let taken = Arc::clone(&waiting);
        thread::Builder::new()
            .name("recording".into())
            .spawn(move || {
                let mut file = BufWriter::new(file);
                let mut write = || {
                    for line in &lines {
                        file.write_all(&line)?;
                        taken.fetch_sub(line.len() as u64, Ordering::Relaxed);
                    }
                    file.flush()
                };
                // Nobody may be waiting for it any more.
                let _ = say_ended.send(write());
            })?;
        let state = Mutex::new(Writing {
            queue: Some(queue),
            ended,
            length: first.len() as u64,
            processes: 0,
            cut: None,
        });
        Ok(Self(Arc::new(Shared {
            bytes: header.bytes,
            waiting,
            state,
        })))
    }

    /// Ends the recording. An error says, in one line, why it does not hold everything.
    pub fn finish(&self) -> Result<(), String> {
        let mut state = self.0.state();
        state.queue = None;
        match state.ended.recv_timeout(LAST_WRITES) {
            Ok(Ok(())) => match state.cut.take() {
                Some(why) => Err(why),
                None => Ok(()),
            },
            Ok(Err(error)) => Err(format!("its file failed: {}", with_causes(&error))),
            Err(_) => Err("its file takes no more bytes".into()),
        }
    }
}

impl Witness for Recorder {
    fn begin(&self, order: &Order) -> Option<Box<dyn Listener>> {
        if matches!(order, Order::Compile { .. } | Order::Fit(_)) {
            return None;
        }
        let mut state = self.0.state();
        let track = Track {
            recorder: self.clone(),
            process: state.processes,
        };
        state.processes += 1;
        let event = Line {
            process: Some(track.process),
            order: Some(order.clone()),
            ..Line::default()
        };
        self.0.write(&mut state, &event);
        Some(Box::new(track))
    }
}

/// One process's part of a recording.
#[derive(Debug)]
struct Track {
    recorder: Recorder,
    process: u32,
}

impl Listener for Track {
    fn called(&self, call: &Call, payload: sandbox::Bytes<'_>) -> Option<ErrorCode> {
        self.write(Line {
            call: Some(call.clone()),
            payload: self.payload(carried_by_call(call), payload),
            ..Line::default()
        });
        None
    }

    fn answered(&self, answer: &Answer, payload: sandbox::Bytes<'_>) {
        self.write(Line {
            answer: Some(answer.clone()),
            payload: self.payload(carried_by_answer(answer), payload),
            ..Line::default()
        });
    }

    fn asked(&self, read: ImageRead) {
        self.write(Line {
            ask: Some(read),
            ..Line::default()
        });
    }
}

impl Track {
    fn payload(&self, carried: Option<u32>, bytes: sandbox::Bytes<'_>) -> Option<Payload> {
        let length = carried?;
        // A payload that cannot be read ends the run by itself.
        let bytes = bytes(length).unwrap_or_default();
        Some(Payload::of(bytes, self.recorder.0.bytes))
    }

    fn write(&self, event: Line) {
        let shared = &self.recorder.0;
        let event = Line {
            process: Some(self.process),
            ..event
        };
        shared.write(&mut shared.state(), &event);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, Writing> {
        // Nothing in it is ever half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, state: &mut Writing, event: &Line) {
        let Some(queue) = &state.queue else { return };
        let mut line = encoded(event);
        let length = line.len() as u64;
        let cut = if state.length + length > MAX_RECORDING {
            Some(format!(
                "the recording has reached its limit of {MAX_RECORDING} bytes"
            ))
        } else if self.waiting.load(Ordering::Relaxed) + length > MAX_WAITING {
            Some("its file took the bytes slower than the job made them".to_owned())
        } else {
            None
        };
        if let Some(why) = &cut {
            line = encoded(&Line {
                cut: Some(why.clone()),
                ..Line::default()
            });
        }
        state.length += line.len() as u64;
        self.waiting.fetch_add(line.len() as u64, Ordering::Relaxed);
        let taken = queue.send(line).is_ok();
        if !taken || cut.is_some() {
            // A file that has failed is told of at the end.
            state.queue = None;
            state.cut = cut;
        }
    }
}

fn encoded(line: &impl Serialize) -> Vec<u8> {
    // All keys are strings and no value refuses to be written.
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::Recording;
    use super::*;
    use crate::channel::OpenImage;
    use crate::contract::{Context, GuestLimits};
    use std::io::{Read, Seek};

    fn header(bytes: bool) -> Header {
        Header::new("mirror".into(), "00".repeat(32), bytes)
    }

    fn order() -> Order {
        Order::OpenImage(OpenImage {
            wasi: Default::default(),
            limits: GuestLimits {
                memory: 1 << 20,
                cpu_ms: 1000,
            },
            context: Context {
                id: "id".into(),
                settings: String::new(),
            },
            receipt: b"receipt".to_vec(),
            max_read: 1 << 20,
            still: Default::default(),
        })
    }

    fn text(file: &mut File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn bytes_are_only_in_a_recording_that_was_asked_to_hold_them() {
        let secret = b"secret-of-the-disk";
        for kept in [false, true] {
            let mut file = tempfile::tempfile().unwrap();
            let recorder = Recorder::start(file.try_clone().unwrap(), &header(kept)).unwrap();
            let track = recorder.begin(&order()).unwrap();
            let call = Call::ObjectRead {
                name: "object".into(),
                offset: 0,
                length: secret.len() as u32,
            };
            track.called(&call, &|_| panic!("carries no bytes"));
            let length = secret.len() as u32;
            track.answered(&Answer::Bytes { length }, &|_| Some(secret.to_vec()));
            recorder.finish().unwrap();
            let text = text(&mut file);
            assert_eq!(text.contains(&hex::encode(secret)), kept, "{text}");
            assert!(text.contains("object"));
            let read = Recording::read(&mut text.as_bytes()).unwrap();
            assert_eq!((read.header.bytes, read.processes.len()), (kept, 1));
        }
    }

    #[test]
    fn a_file_that_fails_is_told_of_at_the_end_and_harms_nothing() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(Recorder::start(full, &header(false)).is_err());

        // One that fails later: this pipe's reader goes away.
        let (reader, writer) = std::io::pipe().unwrap();
        let recorder =
            Recorder::start(std::os::fd::OwnedFd::from(writer).into(), &header(false)).unwrap();
        drop(reader);
        let track = recorder.begin(&order()).unwrap();
        for _ in 0..1000 {
            track.answered(&Answer::Unit, &|_| None);
        }
        assert!(recorder.finish().unwrap_err().contains("file failed"));
    }

    #[test]
    fn a_file_that_hangs_costs_a_bounded_memory_and_no_call() {
        // Nobody reads, so that the pipe is full soon.
        let (_reader, writer) = std::io::pipe().unwrap();
        let file = std::os::fd::OwnedFd::from(writer).into();
        let recorder = Recorder::start(file, &header(true)).unwrap();
        let track = recorder.begin(&order()).unwrap();
        let length = 1 << 20;
        for _ in 0..100 {
            track.answered(&Answer::Bytes { length }, &|_| Some(vec![1; 1 << 20]));
        }
        assert!(recorder.0.waiting.load(Ordering::Relaxed) <= MAX_WAITING + (1 << 10));
        assert!(recorder.0.state().cut.as_ref().unwrap().contains("slower"));
    }
}
