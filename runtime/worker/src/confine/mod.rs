//! What a sandbox process gives up, and what the kernel holds it to from then on.
//!
//! In this order, each step as soon as nothing that comes after needs what it takes away:
//! 1. [`enter`], first of all and on the only thread: inherited descriptors, privileges, files and the network.
//! 2. [`Confined::hold`], once both threads run and the files have come: new threads, processes and descriptors, and
//!    every system call that is not listed. Only then does the job process send an order.
//! 3. [`Confined::compile`], or [`Confined::load`] and, before the provider's code runs, [`Confined::run`]: memory
//!    beyond the order's limits, and what of the listed system calls only the step before needed.
//!
//! Each promise is kept twice where the kernel has two ways: a call that seccomp ends the process for would reach
//! nothing either. What the kernel does not have is a [`Gap`], which the job process is told.
//!
//! The job process puts it into a control group besides (`fleecebox-sandbox`).

mod filter;
mod reach;
#[cfg(test)]
mod tests;
mod user;

use filter::Stage;
use fleecebox_channel::{COMPILE_CPU_SECONDS, COMPILE_MEMORY, Gap, room};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// A process that has been through [`enter`].
#[derive(Debug)]
pub struct Confined {
    missing: Vec<Gap>,
}

/// Closes every descriptor but the socket and standard error, gives up every privilege, and ties the process's life to
/// the thread that started it. Returns the socket, which came as standard input.
pub fn enter() -> Result<(UnixStream, Confined), io::Error> {
    // The first use finds out where the kernel keeps its clock; on some kernels that takes a file in /proc.
    let _ = clock_gettime(ClockId::ThreadCPUTime);
    close_inherited()?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let null: OwnedFd = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into();
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;

    rustix::thread::set_no_new_privs(true)?;
    let mut missing = Vec::new();
    missing.extend(user::drop_privileges()?);
    // After the change of user, which resets both. A core dump would write the guest's disk data to wherever the
    // system keeps such files, and a limit of 0 does not bind a system that has them piped into a program (core(5)).
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    limit(Resource::Core, 0)?;
    missing.extend(reach::nothing());
    Ok((UnixStream::from(socket), Confined { missing }))
}

impl Confined {
    /// Ends the time in which the process could still get anything: `payload` is the size of the memory file in bytes.
    pub fn hold(&mut self, payload: u64) -> Result<(), io::Error> {
        limit(Resource::Nproc, 0)?;
        limit(Resource::Nofile, DESCRIPTORS)?;
        // Holds for memory files too (shmem is a file system), and so cannot be 0.
        limit(Resource::Fsize, payload)?;
        if filter::apply(Stage::Loading).is_err() {
            self.missing.push(Gap::SystemCalls);
        }
        Ok(())
    }

    /// What this system does not offer.
    pub fn missing(&self) -> &[Gap] {
        &self.missing
    }

    /// Bounds what compiling may take: a component can be written so that it takes forever.
    pub fn compile(&self) -> Result<(), io::Error> {
        // One second later the kernel would end the process by another signal, which says less.
        limit_softly(Resource::Cpu, COMPILE_CPU_SECONDS, COMPILE_CPU_SECONDS + 1)?;
        limit(Resource::Data, COMPILE_MEMORY)?;
        self.narrow(Stage::Compiling)
    }

    /// Bounds the whole process, wasmtime included, to what the guest may have and room for the host's own needs.
    pub fn load(&self, guest_memory: u64, compiled: u64) -> Result<(), io::Error> {
        limit(Resource::Data, guest_memory.saturating_add(room(compiled)))
    }

    /// From here on no machine code can be added to the process.
    pub fn run(&self) -> Result<(), io::Error> {
        self.narrow(Stage::Running)
    }

    fn narrow(&self, stage: Stage) -> Result<(), io::Error> {
        if self.missing.contains(&Gap::SystemCalls) {
            return Ok(());
        }
        filter::apply(stage).map_err(io::Error::other)
    }
}

/// Descriptors have numbers below this, and 0 is taken: there are no new ones. Not 0, because poll(2) refuses to watch
/// more descriptors than this.
const DESCRIPTORS: u64 = 1;

fn limit(resource: Resource, most: u64) -> Result<(), io::Error> {
    limit_softly(resource, most, most)
}

/// Sets both limits, and keeps those that whoever started us has set lower: they cannot be raised without privileges.
fn limit_softly(resource: Resource, soft: u64, hard: u64) -> Result<(), io::Error> {
    let inherited = getrlimit(resource);
    let lower = |most: u64, inherited: Option<u64>| Some(most.min(inherited.unwrap_or(most)));
    let limit = Rlimit {
        current: lower(soft, inherited.current),
        maximum: lower(hard, inherited.maximum),
    };
    Ok(setrlimit(resource, limit)?)
}

/// Closes what the job process got from whoever started it and did not mark as its own alone.
///
/// Called while nothing else in this process has opened anything, so no owner is left behind.
fn close_inherited() -> Result<(), io::Error> {
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
