//! A sandbox process from its entry to its exit.

use super::confine::{self, Confined};
use super::stubs::Lost;
use super::surroundings::{passing_time, standing_time};
use super::{engine, limits, orders};
use fleecebox_channel::{Confinement, Order, Payload, Socket, take_over};
use fleecebox_contract::with_causes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;
use wasmtime::Engine;

/// Does what the job process on the other end of standard input orders, once, and ends.
///
/// Prints nothing but a reason why it could not do so, to standard error, which the job process reads.
pub fn serve() -> ExitCode {
    match serve_one() {
        Ok(()) => ExitCode::SUCCESS,
        Err(unable) => {
            eprintln!("{}", with_causes(&unable));
            ExitCode::FAILURE
        }
    }
}

/// Why a sandbox process could not do as it was told.
#[derive(Debug, thiserror::Error)]
enum Unable {
    #[error("the process could not be confined")]
    Confine(#[source] std::io::Error),
    #[error("the process got no files")]
    Files(#[source] rustix::io::Errno),
    #[error("the process got {0} files, which do not belong to its order")]
    WrongFiles(usize),
    #[error("wasmtime could not be set up: {0:#}")]
    Engine(wasmtime::Error),
    #[error("the guest's thread could not be started")]
    Thread(#[source] std::io::Error),
    #[error("what a guest's waits go by could not be made")]
    Time(#[source] std::io::Error),
    #[error("the guest's thread panicked")]
    Panicked,
    #[error(transparent)]
    Lost(#[from] Lost),
}

fn serve_one() -> Result<(), Unable> {
    let (stream, confined) = confine::enter().map_err(Unable::Confine)?;
    let files = take_over(&stream).map_err(Unable::Files)?;
    let watched = stream
        .as_fd()
        .try_clone_to_owned()
        .map_err(Unable::Confine)?;
    let engine = engine::engine().map_err(Unable::Engine)?;
    let ticked = engine.clone();
    let main = thread::current();
    let guest = thread::Builder::new()
        .name("guest".into())
        .stack_size(engine::THREAD_STACK)
        .spawn(move || {
            let done = obey(&engine, confined, stream, files);
            main.unpark();
            done
        })
        .map_err(Unable::Thread)?;
    while !guest.is_finished() {
        thread::park_timeout(limits::TICK);
        ticked.increment_epoch();
        if is_hung_up(&watched) && !guest.is_finished() {
            // Nobody waits for what the guest still computes.
            return Err(Lost::Socket(fleecebox_channel::SocketError::Closed).into());
        }
    }
    guest.join().map_err(|_| Unable::Panicked)?
}

/// The one order, on the one thread that guest code runs on. The job process gives it only once this process is held.
fn obey(
    engine: &Engine,
    mut confined: Confined,
    stream: UnixStream,
    files: Vec<OwnedFd>,
) -> Result<(), Unable> {
    let count = files.len();
    let mut files = files.into_iter();
    let (Some(payload), compiled) = (files.next(), files.next()) else {
        return Err(Unable::WrongFiles(count));
    };
    let payload = Payload::adopt(payload).map_err(Lost::Payload)?;
    confined.hold(payload.size()).map_err(Unable::Confine)?;
    let mut socket = Socket::new(stream);
    let missing = confined.missing().to_vec();
    let confinement = Confinement { missing };
    socket.send(&confinement).map_err(Lost::Socket)?;
    let order = socket.receive().map_err(Lost::Socket)?;
    Ok(match (order, compiled) {
        (Order::Compile { length }, None) => orders::compile(&confined, socket, &payload, length),
        (Order::Fit(fit), Some(file)) => orders::fit(engine, &confined, (socket, file), &fit),
        (Order::Run(run), Some(file)) => {
            let time = passing_time().map_err(Unable::Time)?;
            time.block_on(orders::run(engine, &confined, (socket, payload, file), run))
        }
        (Order::OpenImage(open), Some(file)) => {
            let time = standing_time().map_err(Unable::Time)?;
            let files = (socket, payload, file);
            time.block_on(orders::open_image(engine, &confined, files, open))
        }
        _ => return Err(Unable::WrongFiles(count)),
    }?)
}

/// Whether the job process has closed its end. It may end without a signal reaching us: the signal that the kernel
/// sends when a parent dies follows the thread that started us, and can be lost before we ask for it.
fn is_hung_up(socket: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut watched, Some(&now)), Ok(1))
}
