//! The system calls that are left to a sandbox process. Any other ends it at once with `SIGSYS`.
//!
//! Found by tracing runs and compilations, and by reading what the C library does on rarer ways. None opens, names or
//! makes anything: what a broken sandbox can still do is speak on its socket, use the memory file and its own memory,
//! wait, and end.

use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

/// How far the process has come. Filters add up: a later one can only take away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It awaits its order, and then reads machine code.
    Loading,
    /// It compiles: hostile bytes go through the compiler.
    Compiling,
    /// It runs a provider.
    Running,
}

/// At every stage, with any arguments.
const ALWAYS: &[libc::c_long] = &[
    // The socket. With neither sendmsg nor recvmsg no descriptor comes or goes.
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    // The memory file, and before a run the file with its machine code.
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    // The end of the socket and the files when the order is done.
    libc::SYS_close,
    // The allocator and the guest's memories; see below for mmap and mprotect.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // The ticking thread sleeps and looks whether the job process has hung up; both threads wait for each other, and a
    // guest that sleeps waits for nobody.
    libc::SYS_futex,
    libc::SYS_ppoll,
    // Goes on with a wait that a stop signal interrupted.
    libc::SYS_restart_syscall,
    // The CPU time that is charged; on some machines every clock.
    libc::SYS_clock_gettime,
    // Seeds of hash maps.
    libc::SYS_getrandom,
    // wasmtime turns faults of guest code into traps, each thread on a stack of its own.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    // A fault of anything else is to end the process as that fault, and not as a forbidden call.
    libc::SYS_rt_sigaction,
    libc::SYS_getpid,
    libc::SYS_gettid,
    // The end.
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Refused by the other filter.
    REFUSED,
];

/// Answered with an error instead of death. glibc's allocator asks /proc/sys/vm/overcommit_memory when it gives back
/// much memory, and does without where it cannot.
const REFUSED: libc::c_long = libc::SYS_openat;

/// Writing to a page and executing it exclude each other.
const EXECUTABLE: libc::c_int = libc::PROT_READ | libc::PROT_EXEC;

/// Applies the filter of `stage` to all threads.
pub(super) fn apply(stage: Stage) -> Result<(), Error> {
    if stage == Stage::Loading {
        let refused = program(
            vec![(REFUSED, vec![])],
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EACCES as u32),
        )?;
        apply_filter_all_threads(&refused)?;
    }
    let allowed = program(
        allowed(stage)?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
    )?;
    apply_filter_all_threads(&allowed)
}

/// A system call, and the rules of which one must apply to it; with none it is allowed.
type Call = (libc::c_long, Vec<SeccompRule>);

fn allowed(stage: Stage) -> Result<Vec<Call>, BackendError> {
    let mut calls: Vec<Call> = ALWAYS.iter().map(|&call| (call, vec![])).collect();
    // Memory of no file, and no code. Private, because the limit on data (RLIMIT_DATA) counts neither shared memory nor
    // what grows as a stack does.
    let sharing = libc::MAP_SHARED | libc::MAP_PRIVATE;
    let uncounted = sharing | libc::MAP_GROWSDOWN;
    let anonymous = [
        masked(2, libc::PROT_EXEC, 0)?,
        masked(
            3,
            libc::MAP_ANONYMOUS | uncounted,
            libc::MAP_ANONYMOUS | libc::MAP_PRIVATE,
        )?,
    ];
    let mut map = vec![rule(anonymous)?];
    if stage == Stage::Loading {
        // The file with the machine code, to be looked at.
        map.push(rule([
            equal(2, libc::PROT_READ as u64)?,
            masked(3, sharing, libc::MAP_PRIVATE)?,
        ])?);
    }
    calls.push((libc::SYS_mmap, map));
    let mut protect = vec![rule([masked(2, libc::PROT_EXEC, 0)?])?];
    if stage != Stage::Running {
        protect.push(rule([equal(2, EXECUTABLE as u64)?])?);
        // Before new code runs, for processors that do not see it by themselves.
        calls.push((libc::SYS_membarrier, vec![]));
    }
    calls.push((libc::SYS_mprotect, protect));
    // Last words on standard error.
    calls.push((libc::SYS_write, vec![rule([equal(0, 2)?])?]));
    // abort(3), for itself alone.
    let aborts = [
        equal(0, std::process::id().into())?,
        equal(2, libc::SIGABRT as u64)?,
    ];
    calls.push((libc::SYS_tgkill, vec![rule(aborts)?]));
    // std asks whether a descriptor is open before it closes it, where it is built with assertions.
    calls.push((
        libc::SYS_fcntl,
        vec![rule([equal(1, libc::F_GETFD as u64)?])?],
    ));
    if stage == Stage::Loading {
        // The sizes of the files.
        calls.push((libc::SYS_fstat, vec![]));
        // The order's limits, on this process.
        calls.push((libc::SYS_prlimit64, vec![rule([equal(0, 0)?])?]));
        // The next filter.
        let no_new_privs = equal(0, libc::PR_SET_NO_NEW_PRIVS as u64)?;
        calls.push((libc::SYS_prctl, vec![rule([no_new_privs])?]));
        let set_filter = equal(0, libc::SECCOMP_SET_MODE_FILTER.into())?;
        calls.push((libc::SYS_seccomp, vec![rule([set_filter])?]));
    }
    Ok(calls)
}

fn program(
    calls: Vec<Call>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(calls.into_iter().collect(), others, these, architecture)?.try_into()
}

/// All of `conditions` at once.
fn rule(
    conditions: impl IntoIterator<Item = SeccompCondition>,
) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into_iter().collect())
}

fn equal(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(
    argument: u8,
    mask: libc::c_int,
    value: libc::c_int,
) -> Result<SeccompCondition, BackendError> {
    // Flags are positive.
    SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(mask as u64),
        value as u64,
    )
}
