//! What native code of a hostile author tries by itself.

use nix::libc;
use std::io;

/// The system calls of a process that runs code of its own choice at the last step.
pub(crate) fn calls(payload: u64) -> Vec<(&'static str, libc::c_long, [u64; 6])> {
    let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let shared = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    let grows = private | libc::MAP_GROWSDOWN as u64;
    let write = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let (read, execute) = (libc::PROT_READ as u64, libc::PROT_EXEC as u64);
    let none = u64::MAX;
    vec![
        ("socket", libc::SYS_socket, [1, 1, 0, 0, 0, 0]),
        ("socketpair", libc::SYS_socketpair, [1, 1, 0, 0, 0, 0]),
        ("connect", libc::SYS_connect, [payload, 0, 0, 0, 0, 0]),
        ("sendmsg", libc::SYS_sendmsg, [payload, 0, 0, 0, 0, 0]),
        ("recvmsg", libc::SYS_recvmsg, [payload, 0, 0, 0, 0, 0]),
        ("execve", libc::SYS_execve, [0; 6]),
        ("execveat", libc::SYS_execveat, [none, 0, 0, 0, 0, 0]),
        (
            "fork",
            libc::SYS_clone,
            [libc::SIGCHLD as u64, 0, 0, 0, 0, 0],
        ),
        ("clone3", libc::SYS_clone3, [0; 6]),
        ("kill the parent", libc::SYS_kill, [parent(), 0, 0, 0, 0, 0]),
        (
            "signal the parent",
            libc::SYS_tgkill,
            [parent(), parent(), 6, 0, 0, 0],
        ),
        (
            "signal itself otherwise",
            libc::SYS_tgkill,
            [own(), own(), 9, 0, 0, 0],
        ),
        ("ptrace", libc::SYS_ptrace, [16, parent(), 0, 0, 0, 0]),
        (
            "read another's memory",
            libc::SYS_process_vm_readv,
            [parent(), 0, 0, 0, 0, 0],
        ),
        (
            "pidfd_open",
            libc::SYS_pidfd_open,
            [parent(), 0, 0, 0, 0, 0],
        ),
        (
            "new code",
            libc::SYS_mmap,
            [0, 4096, read | execute, private, none, 0],
        ),
        (
            "memory that is not counted, as it is shared",
            libc::SYS_mmap,
            [0, 4096, write, shared, none, 0],
        ),
        (
            "memory that is not counted, as it grows like a stack",
            libc::SYS_mmap,
            [0, 4096, write, grows, none, 0],
        ),
        (
            "map the memory file",
            libc::SYS_mmap,
            [0, 4096, read, 1, payload, 0],
        ),
        (
            "make code of nothing",
            libc::SYS_mprotect,
            [0, 0, read | execute, 0, 0, 0],
        ),
        ("openat2", libc::SYS_openat2, [none, 0, 0, 0, 0, 0]),
        ("stat", libc::SYS_statx, [none, 0, 0, 0, 0, 0]),
        ("dup", libc::SYS_dup, [payload, 0, 0, 0, 0, 0]),
        (
            "duplicate by fcntl",
            libc::SYS_fcntl,
            [payload, 0, 0, 0, 0, 0],
        ),
        (
            "write to another descriptor",
            libc::SYS_write,
            [payload, 0, 0, 0, 0, 0],
        ),
        ("ioctl", libc::SYS_ioctl, [payload, 0, 0, 0, 0, 0]),
        ("memfd_create", libc::SYS_memfd_create, [0; 6]),
        (
            "prctl",
            libc::SYS_prctl,
            [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0],
        ),
        ("seccomp", libc::SYS_seccomp, [1, 0, 0, 0, 0, 0]),
        ("prlimit64", libc::SYS_prlimit64, [0, 0, 0, 0, 0, 0]),
        ("setresuid", libc::SYS_setresuid, [0; 6]),
        ("unshare", libc::SYS_unshare, [0; 6]),
        ("mount", libc::SYS_mount, [0; 6]),
        ("bpf", libc::SYS_bpf, [0; 6]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [0; 6]),
        ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
        ("keyctl", libc::SYS_keyctl, [0; 6]),
        ("shmget", libc::SYS_shmget, [0; 6]),
    ]
}

/// A system call such as code of a hostile author makes.
pub(crate) fn system_call(number: libc::c_long, arguments: [u64; 6]) -> io::Result<()> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: No argument is an address that the kernel writes to, and what the call maps is new.
    #[allow(unsafe_code)]
    let returned = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match returned {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Takes 800 MiB without a byte of data: to read a page takes none of it, but for each 2 MiB one that says where it is.
pub(crate) fn fill_page_tables() -> Option<()> {
    const SPAN: usize = 400 << 30;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: The mapping is new, and only read, and only within its length.
    #[allow(unsafe_code)]
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), SPAN, libc::PROT_READ, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return None;
        }
        for at in (0..SPAN).step_by(2 << 20) {
            start.cast::<u8>().add(at).read_volatile();
        }
    }
    Some(())
}

pub(crate) fn parent() -> u64 {
    std::os::unix::process::parent_id().into()
}

pub(crate) fn own() -> u64 {
    std::process::id().into()
}
