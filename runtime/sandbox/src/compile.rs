//! From a component's bytes to machine code and the names of what it imports and exports.

use super::cache::{Cache, CacheError, Key, Refusal};
use super::spawn::{Error, Process, Program};
use super::usage::Usage;
use bytes::Bytes;
use fleecebox_channel::{
    COMPILE_CPU_SECONDS, COMPILE_MEMORY, Call, Failure, Gap, Order, Outcome, Payload,
};
use fleecebox_contract::{Interface, MAX_COMPONENT};
use rustix::process::Signal;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::timeout;

/// How long compiling may take. The CPU time is limited inside the process; this is for a machine that is very busy.
const COMPILE_TIME: Duration = Duration::from_secs(600);

/// A component that has been compiled. That it may run is another question: [`fleecebox_contract::world_of`].
#[derive(Debug, Clone)]
pub struct Compiled {
    /// SHA-256 of the component's bytes.
    pub sha256: [u8; 32],
    /// Of the component, in bytes.
    pub size: u64,
    /// What it imports and exports.
    pub interface: Interface,
    /// Its machine code, open for reading only. For [`Process::start`].
    pub file: Arc<File>,
    /// In what the process that compiled it just now was less confined than it could be.
    pub missing: Vec<Gap>,
    /// What the process that compiled it just now has used.
    pub usage: Option<Usage>,
}

/// Why there is no compiled component.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// It is larger than [`MAX_COMPONENT`].
    #[error("the component has {size} bytes, more than the {MAX_COMPONENT} that are allowed")]
    TooLarge {
        /// In bytes.
        size: u64,
    },
    /// It is a core WebAssembly module.
    #[error("the file is a core WebAssembly module, not a component")]
    CoreModule,
    /// The compiler refused it.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// It takes too long.
    #[error("the component was not compiled within {} s", COMPILE_TIME.as_secs())]
    TimedOut,
    /// It takes too much of the processor.
    #[error(
        "the component takes more than {COMPILE_CPU_SECONDS} s of processor time to compile, which no honest one does"
    )]
    ProcessorTime,
    /// It takes too much memory.
    #[error(
        "the component takes more than {} MiB of memory to compile, which no honest one does",
        COMPILE_MEMORY >> 20
    )]
    Memory,
    /// The sandbox process failed.
    #[error("the component could not be compiled")]
    Process(#[from] Error),
    /// The sandbox process answered with something else.
    #[error("the sandbox process that was to compile the component broke the protocol")]
    Unexpected,
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The thread that uses the cache panicked.
    #[error("the cache's thread panicked")]
    Panicked(#[from] JoinError),
}

/// Compiles `component` in a sandbox process, or takes it from the cache where it was compiled before.
pub async fn compile(
    program: &Program,
    component: Bytes,
    cache: &Cache,
) -> Result<Compiled, CompileError> {
    let size = component.len() as u64;
    if size > MAX_COMPONENT {
        return Err(CompileError::TooLarge { size });
    }
    // The first eight bytes: magic, version, and layer 0 for a module (core specification, binary format, modules).
    if component.starts_with(b"\0asm\x01\0\0\0") {
        return Err(CompileError::CoreModule);
    }
    let bytes = component.clone();
    let key = spawn_blocking(move || Key::of(&bytes)).await?;
    let mut turn = None;
    let mut found = look_up(cache, key).await?;
    if found.is_none() {
        turn = Some(cache.turn().await?);
        // Another may have compiled it meanwhile.
        found = look_up(cache, key).await?;
    }
    let mut missing = Vec::new();
    let mut usage = None;
    let (interface, file) = match found {
        Some(entry) => entry,
        None => {
            let compiling = in_a_sandbox(program, &component, &mut missing, &mut usage);
            let compiled = timeout(COMPILE_TIME, compiling)
                .await
                .unwrap_or(Err(CompileError::TimedOut));
            if let Some(refusal) = compiled.as_ref().err().and_then(CompileError::refusal) {
                let held = cache.clone();
                spawn_blocking(move || held.refuse(&key, refusal)).await??;
            }
            let (interface, code) = compiled?;
            let held = cache.clone();
            spawn_blocking(move || held.keep(&key, interface, &code)).await??
        }
    };
    drop(turn);
    Ok(Compiled {
        sha256: key.sha256(),
        size,
        interface,
        file: Arc::new(file),
        missing,
        usage,
    })
}

impl CompileError {
    /// What is worth remembering of it.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused(failure) => Some(Refusal::Refused(failure.clone())),
            Self::ProcessorTime => Some(Refusal::ProcessorTime),
            Self::Memory => Some(Refusal::Memory),
            _ => None,
        }
    }
}

impl From<Refusal> for CompileError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Refused(failure) => Self::Refused(failure),
            Refusal::ProcessorTime => Self::ProcessorTime,
            Refusal::Memory => Self::Memory,
        }
    }
}

/// What the cache holds of a component; an error where that is a refusal.
async fn look_up(cache: &Cache, key: Key) -> Result<Option<(Interface, File)>, CompileError> {
    let held = cache.clone();
    let looked_up = spawn_blocking(move || match held.find(&key)? {
        Some(found) => Ok(Ok(Some(found))),
        None => Ok(match held.refusal(&key)? {
            Some(refusal) => Err(refusal),
            None => Ok(None),
        }),
    });
    let found: Result<_, CacheError> = looked_up.await?;
    Ok(found??)
}

async fn in_a_sandbox(
    program: &Program,
    component: &[u8],
    missing: &mut Vec<Gap>,
    usage: &mut Option<Usage>,
) -> Result<(Interface, Vec<u8>), CompileError> {
    let payload = Payload::create(Payload::COMPILE_SIZE).map_err(Error::Payload)?;
    let length = payload.give(component).map_err(Error::Payload)?;
    let mut process = Process::begin(program, &Order::Compile { length }, payload, None).await?;
    missing.extend_from_slice(process.missing());
    match process.next().await.map_err(too_much)? {
        Call::Done(Outcome::Compiled { length, interface }) => {
            let code = process.payload().take(length).map_err(Error::Payload)?;
            *usage = process.kill().await;
            Ok((interface, code))
        }
        Call::Done(Outcome::Failed(failure)) => Err(failure.into()),
        _ => Err(CompileError::Unexpected),
    }
}

/// What the end of a process says that is bounded by `confine`: the kernel's signal at the limit on processor time, and
/// the abort of a program that gets no memory.
fn too_much(error: Error) -> CompileError {
    match &error {
        Error::Memory { .. } => CompileError::Memory,
        Error::Died { status, words } => match status.signal() {
            Some(signal) if signal == Signal::XCPU.as_raw() => CompileError::ProcessorTime,
            Some(signal)
                if signal == Signal::ABORT.as_raw() && words.contains("memory allocation") =>
            {
                CompileError::Memory
            }
            _ => error.into(),
        },
        _ => error.into(),
    }
}
