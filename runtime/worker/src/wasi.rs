//! The parts of WASI that a provider may be granted: clocks, randomness, and output that goes to the job's log.
//!
//! wasmtime-wasi answers the calls. Here is which of its interfaces are linked, what bounds them, and where output goes;
//! `surroundings` has what clocks show and where randomness comes from. Everything else of WASI is not there: no files, no
//! sockets, no HTTP, no arguments, no environment, and an input that has ended.
//!
//! Only its asynchronous bindings are used, and none that spawns anything: the others would make a runtime with threads
//! and descriptors of its own, which ends a sandbox process.

use super::stubs::{Host, Job, Lost, Refused};
use super::surroundings::Surroundings;
use bytes::Bytes;
use fleecebox_contract::{LogLevel, MAX_TEXT, Wasi};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::AsyncWrite;
use wasmtime::component::{HasData, Linker, ResourceTable, ResourceTableError};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream, WasiCli, WasiCliView};
use wasmtime_wasi::clocks::{WasiClocks, WasiClocksView};
use wasmtime_wasi::p2::bindings::{cli, clocks, io, random};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamError, StreamResult};
use wasmtime_wasi::random::{WasiRandom, WasiRandomView};
use wasmtime_wasi::{I32Exit, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView, async_trait};

/// What wasmtime-wasi keeps for a guest at once: a stream is one, and a timer two. Its own limit is a million, and nothing
/// honest waits for more than a few.
const MAX_HANDLES: usize = 256;

/// Bytes that a stream takes in one call; WASI says that 4096 is the least (wasi:io/streams, blocking-write-and-flush).
const MAX_OUTPUT: usize = 4096;

/// Random bytes in one call. Keys and seeds have some 32.
const MAX_RANDOM: u64 = 64 << 10;

/// What the guest's use of WASI leaves in its store.
pub(super) struct State {
    context: WasiCtx,
    handles: ResourceTable,
    streams: [Lines; 2],
}

impl State {
    /// Must be called where [`Surroundings::put_into`] may be.
    pub(super) fn new(surroundings: Surroundings, job: &Job) -> Self {
        let streams = [LogLevel::Info, LogLevel::Warn].map(|level| Lines::new(job, level));
        let [stdout, stderr] = streams.clone();
        let mut context = WasiCtxBuilder::new();
        surroundings.put_into(&mut context);
        let context = context
            .stdout(stdout)
            .stderr(stderr)
            .max_random_size(MAX_RANDOM)
            .build();
        let mut handles = ResourceTable::new();
        handles.set_max_capacity(MAX_HANDLES);
        Self {
            context,
            handles,
            streams,
        }
    }

    /// Logs what was written without an end of its line.
    pub(super) fn flush_output(&self) -> Result<(), Lost> {
        self.streams.iter().try_for_each(Lines::end)
    }
}

impl WasiView for Host {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi.context,
            table: &mut self.wasi.handles,
        }
    }
}

/// The part of a store that wasi:io needs.
struct Handles;

impl HasData for Handles {
    type Data<'a> = &'a mut ResourceTable;
}

fn handles(host: &mut Host) -> &mut ResourceTable {
    &mut host.wasi.handles
}

/// Links the interfaces of `granted` and no others.
pub(super) fn add_to_linker(
    linker: &mut Linker<Host>,
    granted: &BTreeSet<Wasi>,
) -> wasmtime::Result<()> {
    if granted.contains(&Wasi::Clocks) {
        clocks::wall_clock::add_to_linker::<_, WasiClocks>(linker, Host::clocks)?;
        clocks::monotonic_clock::add_to_linker::<_, WasiClocks>(linker, Host::clocks)?;
    }
    if granted.contains(&Wasi::Random) {
        random::random::add_to_linker::<_, WasiRandom>(linker, Host::random)?;
        random::insecure::add_to_linker::<_, WasiRandom>(linker, Host::random)?;
        random::insecure_seed::add_to_linker::<_, WasiRandom>(linker, Host::random)?;
    }
    if granted.contains(&Wasi::Output) {
        io::error::add_to_linker::<_, Handles>(linker, handles)?;
        io::streams::add_to_linker::<_, Handles>(linker, handles)?;
        cli::environment::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::exit::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::stdin::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::stdout::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::stderr::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::terminal_input::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::terminal_output::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::terminal_stdin::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::terminal_stdout::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
        cli::terminal_stderr::add_to_linker::<_, WasiCli>(linker, Host::cli)?;
    }
    if granted.contains(&Wasi::Clocks) || granted.contains(&Wasi::Output) {
        io::poll::add_to_linker::<_, Handles>(linker, handles)?;
    }
    Ok(())
}

/// What a guest did that ended it, where wasmtime-wasi's own error does not say so to somebody who reads a log.
pub(super) fn misuse(error: &wasmtime::Error) -> Option<String> {
    if let Some(I32Exit(status)) = error.downcast_ref() {
        return Some(format!(
            "it ended itself (wasi:cli/exit) with status {status}"
        ));
    }
    match error.downcast_ref() {
        Some(ResourceTableError::Full) => Some(format!(
            "it has more timers and streams at once than {MAX_HANDLES} handles are enough for"
        )),
        _ => None,
    }
}

/// An output whose lines become messages of the job's log; one that does not end becomes several.
#[derive(Clone)]
struct Lines {
    job: Job,
    level: LogLevel,
    /// What was written since the last end of a line, by whichever handle.
    line: Arc<Mutex<Vec<u8>>>,
}

impl Lines {
    fn new(job: &Job, level: LogLevel) -> Self {
        Self {
            job: job.clone(),
            level,
            line: Arc::default(),
        }
    }

    fn line(&self) -> MutexGuard<'_, Vec<u8>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: &[u8]) -> Result<(), Lost> {
        let mut line = self.line();
        for &byte in bytes {
            if byte != b'\n' {
                line.push(byte);
                if line.len() < MAX_TEXT {
                    continue;
                }
            }
            self.log(&std::mem::take(&mut *line))?;
        }
        Ok(())
    }

    fn end(&self) -> Result<(), Lost> {
        match std::mem::take(&mut *self.line()) {
            line if line.is_empty() => Ok(()),
            line => self.log(&line),
        }
    }

    fn log(&self, line: &[u8]) -> Result<(), Lost> {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end_matches('\r').to_owned();
        match self.job.log(self.level, text) {
            Ok(()) => Ok(()),
            Err(Refused::Guest(_)) => Err(Lost::WrongAnswer),
            Err(Refused::Ended(error)) => Err(error.downcast().unwrap_or(Lost::WrongAnswer)),
        }
    }
}

impl IsTerminal for Lines {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Lines {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    /// For guests of WASI 0.3, of which nothing is linked.
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(tokio::io::sink())
    }
}

#[async_trait]
impl Pollable for Lines {
    async fn ready(&mut self) {}
}

impl OutputStream for Lines {
    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(MAX_OUTPUT)
    }

    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        if bytes.len() > MAX_OUTPUT {
            let length = bytes.len();
            return Err(StreamError::trap(&format!(
                "it wrote {length} bytes at once where a stream takes {MAX_OUTPUT}"
            )));
        }
        self.add(&bytes)
            .map_err(|lost| StreamError::Trap(wasmtime::Error::new(lost)))
    }

    /// A line goes to the log once it has ended: half of one is no message.
    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }
}
