//! What a sandbox process gives up before it looks at a single byte from outside.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Closes every descriptor but the socket and standard error, cuts the way to more rights, and ties the process's
/// life to the thread that started it. Returns the socket, which came as standard input.
pub(super) fn confine() -> Result<UnixStream, std::io::Error> {
    close_inherited()?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::thread::set_no_new_privs(true)?;
    // A core dump would write the guest's disk data to wherever the system keeps such files.
    limit(Resource::Core, 0)?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    let null: OwnedFd = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into();
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(UnixStream::from(socket))
}

/// Bounds what compiling may take: a component can be written so that it takes forever.
pub(super) fn confine_compiling() -> Result<(), Errno> {
    limit(Resource::Cpu, COMPILE_CPU_SECONDS)?;
    limit(Resource::Data, COMPILE_MEMORY)
}

/// Bounds the whole process, wasmtime included, to what the guest may have and room for the host's own needs.
pub(super) fn confine_running(guest_memory: u64, compiled: u64) -> Result<(), Errno> {
    limit(
        Resource::Data,
        guest_memory
            .saturating_add(compiled.saturating_mul(2))
            .saturating_add(HOST_MEMORY),
    )
}

/// Ten times what the largest known components need: a whole JavaScript engine takes 20 s.
const COMPILE_CPU_SECONDS: u64 = 200;

/// In bytes. A whole JavaScript engine needs some 500 MiB.
const COMPILE_MEMORY: u64 = 2 << 30;

/// In bytes: stacks, the allocator's own, and the copies of what is being transferred.
const HOST_MEMORY: u64 = 256 << 20;

fn limit(resource: Resource, most: u64) -> Result<(), Errno> {
    setrlimit(
        resource,
        Rlimit {
            current: Some(most),
            maximum: Some(most),
        },
    )
}

/// Closes what the job process got from whoever started it and did not mark as its own alone.
///
/// Called while nothing else in this process has opened anything, so no owner is left behind.
fn close_inherited() -> Result<(), std::io::Error> {
    let mut inherited = Vec::<RawFd>::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        if let Some(fd) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            inherited.push(fd);
        }
    }
    for fd in inherited.into_iter().filter(|fd| *fd > 2) {
        // The listing's own descriptor is among them and closed by now.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}
