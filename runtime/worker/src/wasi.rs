//! The parts of WASI that a provider may be granted: clocks, randomness, and output that goes to the job's log.
//!
//! Not wasmtime-wasi, whose waits and streams are work of a runtime with threads and descriptors of its own: a sandbox
//! process may make neither, and it answers one call at a time. Everything else of WASI is not there: no files, no
//! sockets, no HTTP, no arguments, no environment, and an input that has ended.
//!
//! As with the contract's own stubs, handles hold nothing but a number.

use super::bindings::wasi::{cli, clocks, io, random};
use super::stubs::{Host, Lost, Refused};
use super::surroundings::Surroundings;
use fleecebox_contract::{LogLevel, MAX_TEXT, Wasi};
use io::streams::StreamError;
use std::collections::BTreeSet;
use std::time::Duration;
use wasmtime::component::{HasSelf, Linker, Resource};

/// Timers at once. wasmtime-wasi's own limit on handles is a million, and nothing honest waits for more than a few.
const MAX_TIMERS: usize = 64;

/// Bytes that a stream takes in one call; WASI says that 4096 is the least (wasi:io/streams, blocking-write-and-flush).
const MAX_OUTPUT: usize = 4096;

/// Random bytes in one call. Keys and seeds have some 32.
const MAX_RANDOM: u64 = 64 << 10;

const STDOUT: u32 = 1;
const STDERR: u32 = 2;

/// A pollable that is always ready. Others are numbers of timers, counted from 1.
const READY: u32 = 0;

/// The guest passed something that WASI forbids, or more than there is.
#[derive(Debug, thiserror::Error)]
enum Misuse {
    #[error("it has more than {MAX_TIMERS} timers at once")]
    Timers,
    #[error("it polls nothing, which would never end")]
    PollsNothing,
    #[error("it wrote {0} bytes at once where a stream takes {MAX_OUTPUT}")]
    Output(u64),
    #[error("it asked for {0} random bytes at once, more than {MAX_RANDOM}")]
    Random(u64),
    #[error("it ended itself (wasi:cli/exit)")]
    Exit,
    #[error("the system has no random bytes")]
    NoRandomness,
}

impl Misuse {
    fn trap<T>(self) -> wasmtime::Result<T> {
        Err(wasmtime::Error::new(self))
    }
}

/// What the guest's use of WASI leaves in its store.
#[derive(Debug)]
pub(super) struct State {
    surroundings: Surroundings,
    /// When each timer is due, by the monotonic clock; a place without one is free.
    timers: Vec<Option<Duration>>,
    /// What was written since the last end of a line.
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl State {
    pub(super) fn new(surroundings: Surroundings) -> Self {
        Self {
            surroundings,
            timers: Vec::new(),
            stdout: Vec::new(),
            stderr: Vec::new(),
        }
    }

    fn timer(&mut self, due: Duration) -> wasmtime::Result<u32> {
        let free = self.timers.iter().position(Option::is_none);
        let index = match free {
            Some(index) => index,
            None if self.timers.len() < MAX_TIMERS => {
                self.timers.push(None);
                self.timers.len() - 1
            }
            None => return Misuse::Timers.trap(),
        };
        self.timers[index] = Some(due);
        // There are few.
        Ok(index as u32 + 1)
    }

    fn now(&self) -> Duration {
        self.surroundings.elapsed()
    }

    /// When a pollable is ready.
    fn due(&self, pollable: u32) -> Duration {
        let index = (pollable as usize).checked_sub(1);
        let timer = index.and_then(|index| self.timers.get(index).copied());
        timer.flatten().unwrap_or(Duration::ZERO)
    }

    fn random(&mut self, bytes: &mut [u8]) -> wasmtime::Result<()> {
        let drawn = self.surroundings.random(bytes);
        drawn.or_else(|_| Misuse::NoRandomness.trap())
    }

    fn random_bytes(&mut self, length: u64) -> wasmtime::Result<Vec<u8>> {
        if length > MAX_RANDOM {
            return Misuse::Random(length).trap();
        }
        let mut bytes = vec![0; length as usize];
        self.random(&mut bytes)?;
        Ok(bytes)
    }

    fn random_number(&mut self) -> wasmtime::Result<u64> {
        let mut bytes = [0; 8];
        self.random(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Links the interfaces of `granted` and no others.
pub(super) fn add_to_linker(
    linker: &mut Linker<Host>,
    granted: &BTreeSet<Wasi>,
) -> wasmtime::Result<()> {
    type Own = HasSelf<Host>;
    if granted.contains(&Wasi::Clocks) {
        clocks::wall_clock::add_to_linker::<_, Own>(linker, |host| host)?;
        clocks::monotonic_clock::add_to_linker::<_, Own>(linker, |host| host)?;
    }
    if granted.contains(&Wasi::Random) {
        random::random::add_to_linker::<_, Own>(linker, |host| host)?;
        random::insecure::add_to_linker::<_, Own>(linker, |host| host)?;
        random::insecure_seed::add_to_linker::<_, Own>(linker, |host| host)?;
    }
    if granted.contains(&Wasi::Output) {
        io::error::add_to_linker::<_, Own>(linker, |host| host)?;
        io::streams::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::environment::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::exit::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::stdin::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::stdout::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::stderr::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::terminal_input::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::terminal_output::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::terminal_stdin::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::terminal_stdout::add_to_linker::<_, Own>(linker, |host| host)?;
        cli::terminal_stderr::add_to_linker::<_, Own>(linker, |host| host)?;
    }
    if granted.contains(&Wasi::Clocks) || granted.contains(&Wasi::Output) {
        io::poll::add_to_linker::<_, Own>(linker, |host| host)?;
    }
    Ok(())
}

impl Host {
    /// Logs what was written without an end of its line.
    pub(super) fn flush_output(&mut self) -> Result<(), Lost> {
        for stream in [STDOUT, STDERR] {
            let line = std::mem::take(self.line(stream));
            if !line.is_empty() {
                self.output_line(stream, &line)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, stream: u32) -> &mut Vec<u8> {
        match stream {
            STDERR => &mut self.wasi.stderr,
            _ => &mut self.wasi.stdout,
        }
    }

    fn output_line(&mut self, stream: u32, line: &[u8]) -> Result<(), Lost> {
        let level = match stream {
            STDERR => LogLevel::Warn,
            _ => LogLevel::Info,
        };
        let text = String::from_utf8_lossy(line);
        match self.log(level, text.trim_end_matches('\r').to_owned()) {
            Ok(()) => Ok(()),
            Err(Refused::Guest(_)) => Err(Lost::WrongAnswer),
            Err(Refused::Ended(error)) => Err(error.downcast().unwrap_or(Lost::WrongAnswer)),
        }
    }

    /// Whole lines become messages of the log; one that does not end becomes several.
    fn output(&mut self, stream: u32, bytes: &[u8]) -> wasmtime::Result<()> {
        if bytes.len() > MAX_OUTPUT {
            return Misuse::Output(bytes.len() as u64).trap();
        }
        for &byte in bytes {
            let line = self.line(stream);
            if byte != b'\n' {
                line.push(byte);
                if line.len() < MAX_TEXT {
                    continue;
                }
            }
            let whole = std::mem::take(line);
            self.output_line(stream, &whole)
                .map_err(wasmtime::Error::new)?;
        }
        Ok(())
    }
}

fn nanoseconds(time: Duration) -> u64 {
    // 584 years, which one that sleeps in an image may have passed.
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl clocks::wall_clock::Host for Host {
    fn now(&mut self) -> wasmtime::Result<clocks::wall_clock::Datetime> {
        let now = self.wasi.surroundings.wall();
        Ok(clocks::wall_clock::Datetime {
            seconds: now.as_secs(),
            nanoseconds: now.subsec_nanos(),
        })
    }

    fn resolution(&mut self) -> wasmtime::Result<clocks::wall_clock::Datetime> {
        Ok(clocks::wall_clock::Datetime {
            seconds: 0,
            nanoseconds: 1,
        })
    }
}

impl clocks::monotonic_clock::Host for Host {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(nanoseconds(self.wasi.now()))
    }

    fn resolution(&mut self) -> wasmtime::Result<u64> {
        Ok(1)
    }

    fn subscribe_instant(&mut self, when: u64) -> wasmtime::Result<Resource<io::poll::Pollable>> {
        let timer = self.wasi.timer(Duration::from_nanos(when))?;
        Ok(Resource::new_own(timer))
    }

    fn subscribe_duration(&mut self, when: u64) -> wasmtime::Result<Resource<io::poll::Pollable>> {
        let due = self.wasi.now().saturating_add(Duration::from_nanos(when));
        Ok(Resource::new_own(self.wasi.timer(due)?))
    }
}

impl random::random::Host for Host {
    fn get_random_bytes(&mut self, length: u64) -> wasmtime::Result<Vec<u8>> {
        self.wasi.random_bytes(length)
    }

    fn get_random_u64(&mut self) -> wasmtime::Result<u64> {
        self.wasi.random_number()
    }
}

impl random::insecure::Host for Host {
    fn get_insecure_random_bytes(&mut self, length: u64) -> wasmtime::Result<Vec<u8>> {
        self.wasi.random_bytes(length)
    }

    fn get_insecure_random_u64(&mut self) -> wasmtime::Result<u64> {
        self.wasi.random_number()
    }
}

impl random::insecure_seed::Host for Host {
    fn insecure_seed(&mut self) -> wasmtime::Result<(u64, u64)> {
        Ok((self.wasi.random_number()?, self.wasi.random_number()?))
    }
}

impl io::poll::Host for Host {
    fn poll(&mut self, pollables: Vec<Resource<io::poll::Pollable>>) -> wasmtime::Result<Vec<u32>> {
        let due = |it: &Resource<io::poll::Pollable>| self.wasi.due(it.rep());
        let Some(first) = pollables.iter().map(due).min() else {
            return Misuse::PollsNothing.trap();
        };
        self.wasi.surroundings.sleep_until(first);
        let now = self.wasi.now();
        let ready = (0..)
            .zip(&pollables)
            .filter(|(_, it)| self.wasi.due(it.rep()) <= now);
        Ok(ready.map(|(index, _)| index).collect())
    }
}

impl io::poll::HostPollable for Host {
    fn ready(&mut self, pollable: Resource<io::poll::Pollable>) -> wasmtime::Result<bool> {
        Ok(self.wasi.due(pollable.rep()) <= self.wasi.now())
    }

    fn block(&mut self, pollable: Resource<io::poll::Pollable>) -> wasmtime::Result<()> {
        let due = self.wasi.due(pollable.rep());
        self.wasi.surroundings.sleep_until(due);
        Ok(())
    }

    fn drop(&mut self, pollable: Resource<io::poll::Pollable>) -> wasmtime::Result<()> {
        let index = (pollable.rep() as usize).checked_sub(1);
        if let Some(timer) = index.and_then(|index| self.wasi.timers.get_mut(index)) {
            *timer = None;
        }
        Ok(())
    }
}

impl io::error::Host for Host {}

/// No operation fails with one.
impl io::error::HostError for Host {
    fn to_debug_string(&mut self, _: Resource<io::error::Error>) -> wasmtime::Result<String> {
        Ok(String::new())
    }

    fn drop(&mut self, _: Resource<io::error::Error>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl io::streams::Host for Host {}

/// Standard input, which has ended.
impl io::streams::HostInputStream for Host {
    fn read(
        &mut self,
        _: Resource<io::streams::InputStream>,
        _: u64,
    ) -> wasmtime::Result<Result<Vec<u8>, StreamError>> {
        Ok(Err(StreamError::Closed))
    }

    fn blocking_read(
        &mut self,
        _: Resource<io::streams::InputStream>,
        _: u64,
    ) -> wasmtime::Result<Result<Vec<u8>, StreamError>> {
        Ok(Err(StreamError::Closed))
    }

    fn skip(
        &mut self,
        _: Resource<io::streams::InputStream>,
        _: u64,
    ) -> wasmtime::Result<Result<u64, StreamError>> {
        Ok(Err(StreamError::Closed))
    }

    fn blocking_skip(
        &mut self,
        _: Resource<io::streams::InputStream>,
        _: u64,
    ) -> wasmtime::Result<Result<u64, StreamError>> {
        Ok(Err(StreamError::Closed))
    }

    fn subscribe(
        &mut self,
        _: Resource<io::streams::InputStream>,
    ) -> wasmtime::Result<Resource<io::poll::Pollable>> {
        Ok(Resource::new_own(READY))
    }

    fn drop(&mut self, _: Resource<io::streams::InputStream>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl io::streams::HostOutputStream for Host {
    fn check_write(
        &mut self,
        _: Resource<io::streams::OutputStream>,
    ) -> wasmtime::Result<Result<u64, StreamError>> {
        Ok(Ok(MAX_OUTPUT as u64))
    }

    fn write(
        &mut self,
        stream: Resource<io::streams::OutputStream>,
        bytes: Vec<u8>,
    ) -> wasmtime::Result<Result<(), StreamError>> {
        self.output(stream.rep(), &bytes).map(Ok)
    }

    fn blocking_write_and_flush(
        &mut self,
        stream: Resource<io::streams::OutputStream>,
        bytes: Vec<u8>,
    ) -> wasmtime::Result<Result<(), StreamError>> {
        self.output(stream.rep(), &bytes).map(Ok)
    }

    /// A line goes to the log once it has ended: half of one is no message.
    fn flush(
        &mut self,
        _: Resource<io::streams::OutputStream>,
    ) -> wasmtime::Result<Result<(), StreamError>> {
        Ok(Ok(()))
    }

    fn blocking_flush(
        &mut self,
        _: Resource<io::streams::OutputStream>,
    ) -> wasmtime::Result<Result<(), StreamError>> {
        Ok(Ok(()))
    }

    fn subscribe(
        &mut self,
        _: Resource<io::streams::OutputStream>,
    ) -> wasmtime::Result<Resource<io::poll::Pollable>> {
        Ok(Resource::new_own(READY))
    }

    fn write_zeroes(
        &mut self,
        stream: Resource<io::streams::OutputStream>,
        length: u64,
    ) -> wasmtime::Result<Result<(), StreamError>> {
        match usize::try_from(length) {
            Ok(length) if length <= MAX_OUTPUT => {
                self.output(stream.rep(), &vec![0; length]).map(Ok)
            }
            _ => Misuse::Output(length).trap(),
        }
    }

    fn blocking_write_zeroes_and_flush(
        &mut self,
        stream: Resource<io::streams::OutputStream>,
        length: u64,
    ) -> wasmtime::Result<Result<(), StreamError>> {
        self.write_zeroes(stream, length)
    }

    fn splice(
        &mut self,
        _: Resource<io::streams::OutputStream>,
        _: Resource<io::streams::InputStream>,
        _: u64,
    ) -> wasmtime::Result<Result<u64, StreamError>> {
        Ok(Err(StreamError::Closed))
    }

    fn blocking_splice(
        &mut self,
        _: Resource<io::streams::OutputStream>,
        _: Resource<io::streams::InputStream>,
        _: u64,
    ) -> wasmtime::Result<Result<u64, StreamError>> {
        Ok(Err(StreamError::Closed))
    }

    fn drop(&mut self, _: Resource<io::streams::OutputStream>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl cli::environment::Host for Host {
    fn get_environment(&mut self) -> wasmtime::Result<Vec<(String, String)>> {
        Ok(Vec::new())
    }

    fn get_arguments(&mut self) -> wasmtime::Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn initial_cwd(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(None)
    }
}

impl cli::exit::Host for Host {
    fn exit(&mut self, _: Result<(), ()>) -> wasmtime::Result<()> {
        Misuse::Exit.trap()
    }
}

impl cli::stdin::Host for Host {
    fn get_stdin(&mut self) -> wasmtime::Result<Resource<io::streams::InputStream>> {
        Ok(Resource::new_own(0))
    }
}

impl cli::stdout::Host for Host {
    fn get_stdout(&mut self) -> wasmtime::Result<Resource<io::streams::OutputStream>> {
        Ok(Resource::new_own(STDOUT))
    }
}

impl cli::stderr::Host for Host {
    fn get_stderr(&mut self) -> wasmtime::Result<Resource<io::streams::OutputStream>> {
        Ok(Resource::new_own(STDERR))
    }
}

impl cli::terminal_input::Host for Host {}

impl cli::terminal_input::HostTerminalInput for Host {
    fn drop(&mut self, _: Resource<cli::terminal_input::TerminalInput>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl cli::terminal_output::Host for Host {}

impl cli::terminal_output::HostTerminalOutput for Host {
    fn drop(&mut self, _: Resource<cli::terminal_output::TerminalOutput>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl cli::terminal_stdin::Host for Host {
    fn get_terminal_stdin(
        &mut self,
    ) -> wasmtime::Result<Option<Resource<cli::terminal_stdin::TerminalInput>>> {
        Ok(None)
    }
}

impl cli::terminal_stdout::Host for Host {
    fn get_terminal_stdout(
        &mut self,
    ) -> wasmtime::Result<Option<Resource<cli::terminal_stdout::TerminalOutput>>> {
        Ok(None)
    }
}

impl cli::terminal_stderr::Host for Host {
    fn get_terminal_stderr(
        &mut self,
    ) -> wasmtime::Result<Option<Resource<cli::terminal_stderr::TerminalOutput>>> {
        Ok(None)
    }
}
