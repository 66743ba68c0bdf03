//! An escaped sandbox: each attempt runs in a process of its own that went through the very steps of a sandbox
//! process, and reports how the kernel took it.

use super::{Confined, enter};
use crate::channel::{
    Call, Confinement, MAX_MESSAGE, Order, Outcome, Payload, Run, Socket, take_over,
};
use crate::contract::{Encoding, Interface, LogLevel, RawRange};
use nix::libc;
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

/// Tells the re-executed test what to attempt.
const ATTEMPT: &str = "FLEECEBOX_ATTEMPT";

/// The target of attempts at other processes.
const TARGET: &str = "FLEECEBOX_TARGET";

/// Of the memory file, in bytes.
const SIZE: u64 = 1 << 20;

/// Memory that the order grants, in bytes.
const WORK: usize = 64 << 20;

fn attempt(name: &str, target: &str) -> (ExitStatus, String) {
    let (_here, there) = UnixStream::pair().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sandbox::confine::tests::escaped"])
        .args(["--include-ignored", "--nocapture", "--test-threads=1"])
        .env_remove("RUST_BACKTRACE")
        .env(ATTEMPT, name)
        .env(TARGET, target)
        .stdin(OwnedFd::from(there))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status, said)
}

/// What an attempt came to, and what this kernel does not offer.
fn outcome(name: &str, target: &str) -> (String, String) {
    let (status, said) = attempt(name, target);
    assert!(status.success(), "{name}: {status}, {said}");
    let (missing, outcome) = said.trim().split_once('|').expect("both are said");
    (missing.to_owned(), outcome.to_owned())
}

/// The attempts after the first step: what Landlock, the user and the limits hold by themselves.
fn reach(attempt: &str, target: &str) -> Option<io::Result<()>> {
    let abstract_name = || SocketAddr::from_abstract_name(target);
    Some(match attempt {
        "read a file" => std::fs::read("/etc/passwd").map(drop),
        "list a folder" => std::fs::read_dir("/").map(drop),
        "make a file" => std::fs::write(target, "here").map(drop),
        "truncate a file" => {
            let path = CString::new(target).unwrap();
            system_call(
                libc::SYS_truncate,
                [path.as_ptr().addr() as u64, 0, 0, 0, 0, 0],
            )
        }
        "run a program" => Command::new("/bin/true").status().map(drop),
        "listen" => TcpListener::bind("127.0.0.1:0").map(drop),
        "connect to a port" => TcpStream::connect(target).map(drop),
        "connect to a name" => abstract_name()
            .and_then(|name| UnixStream::connect_addr(&name))
            .map(drop),
        "signal the parent by any means" => system_call(libc::SYS_kill, [parent(), 0, 0, 0, 0, 0]),
        _ => return None,
    })
}

/// The system calls of a process that runs code of its own choice at the last step.
fn calls(payload: u64) -> Vec<(&'static str, libc::c_long, [u64; 6])> {
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

/// Not a test: what [`attempt`] runs in a process of its own.
#[test]
#[ignore = "is run by the other tests, in a process of its own"]
fn escaped() {
    let Ok(attempt) = std::env::var(ATTEMPT) else {
        return;
    };
    let target = std::env::var(TARGET).unwrap();
    let (_socket, confined) = enter().unwrap();
    // On a second thread, as in a sandbox process.
    let second = std::thread::spawn(move || go_on(confined, &attempt, &target));
    let _ = second.join();
    // The test runner's own report would go to a descriptor that is not left.
    std::process::exit(101);
}

fn go_on(mut confined: Confined, attempt: &str, target: &str) -> ! {
    let say = |confined: &Confined, outcome: io::Result<()>| -> ! {
        let outcome = outcome.map_err(|error| error.raw_os_error());
        eprintln!("{:?}|{outcome:?}", confined.missing());
        std::process::exit(0)
    };
    if let Some(outcome) = reach(attempt, target) {
        say(&confined, outcome);
    }
    let payload = Payload::create(SIZE).unwrap();
    let fd = payload.as_fd().as_raw_fd().unsigned_abs().into();
    // Made before the filter, since asking for the parent's number is forbidden too.
    let calls = calls(fd);
    confined.hold(SIZE).unwrap();
    let late = |attempt: &str| {
        let call = calls.iter().find(|(name, ..)| *name == attempt);
        let &(_, number, arguments) = call.expect("there is such an attempt");
        system_call(number, arguments)
    };
    if let Some(early) = attempt.strip_prefix("before the run: ") {
        say(&confined, late(early));
    }
    confined.load(WORK as u64, 0).unwrap();
    confined.run().unwrap();
    match attempt {
        "work" => {
            work(&payload);
            say(&confined, Ok(()))
        }
        "use too much memory" => {
            let much = WORK * 10;
            let outcome = Vec::<u8>::new().try_reserve_exact(much);
            say(
                &confined,
                outcome
                    .map_err(|_| libc::ENOMEM)
                    .map_err(io::Error::from_raw_os_error),
            )
        }
        "open a file" => say(&confined, std::fs::File::open("/dev/null").map(drop)),
        "abort" => std::process::abort(),
        "panic" => panic!("last words"),
        _ => say(&confined, late(attempt)),
    }
}

/// What a run does, and what the C library does meanwhile on its rarer ways.
fn work(payload: &Payload) {
    payload.give(&vec![7; SIZE as usize]).unwrap();
    let mut grown = payload.take(SIZE).unwrap();
    // Moved by the kernel as it grows.
    while grown.len() < WORK / 2 {
        grown.extend_from_within(..);
    }
    // Blocks of the allocator's own heap, most of which it gives back at the end.
    let blocks: Vec<_> = (0..300).map(|_| vec![1u8; 100 << 10]).collect();
    drop(blocks);
    let seeded: std::collections::HashSet<u64> = (0..100).collect();
    assert_eq!((seeded.len(), grown[grown.len() - 1]), (100, 7));
    std::thread::sleep(std::time::Duration::ZERO);
}

/// Takes 800 MiB without a byte of data: to read a page takes none of it, but for each 2 MiB one that says where it is.
fn fill_page_tables() -> Option<()> {
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

fn parent() -> u64 {
    std::os::unix::process::parent_id().into()
}

fn own() -> u64 {
    std::process::id().into()
}

/// A system call such as code of a hostile author makes.
fn system_call(number: libc::c_long, arguments: [u64; 6]) -> io::Result<()> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: No argument is an address that the kernel writes to, and what the call maps is new.
    #[allow(unsafe_code)]
    let returned = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match returned {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn refused(error: libc::c_int) -> String {
    format!("Err(Some({error}))")
}

#[test]
fn no_file_can_be_reached() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    // Anybody may, but for Landlock.
    let everybody = |path: &std::path::Path| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    };
    everybody(folder.path());
    let file = folder.path().join("file");
    std::fs::write(&file, "content").unwrap();
    everybody(&file);
    let new = folder.path().join("new");
    for (attempt, target) in [
        ("read a file", &file),
        ("list a folder", &file),
        ("make a file", &new),
        ("truncate a file", &file),
        ("run a program", &file),
    ] {
        let (missing, outcome) = outcome(attempt, target.to_str().unwrap());
        if missing.contains("Files") {
            return crate::report::not_shown(&format!("this kernel offers no {missing}"));
        }
        assert_eq!(outcome, refused(libc::EACCES), "{attempt}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"content");
    assert!(!new.exists());
}

#[test]
fn no_port_can_be_reached() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    for attempt in ["listen", "connect to a port"] {
        let (missing, outcome) = outcome(attempt, &address);
        if missing.contains("Tcp") {
            return crate::report::not_shown(&format!("this kernel offers no {missing}"));
        }
        assert_eq!(outcome, refused(libc::EACCES), "{attempt}");
    }
}

#[test]
fn no_process_can_be_reached_by_a_signal_or_a_name() {
    let name = format!("fleecebox-test-{}", own());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    for attempt in ["signal the parent by any means", "connect to a name"] {
        let (missing, outcome) = outcome(attempt, &name);
        if missing.contains("Scopes") {
            return crate::report::not_shown(&format!("this kernel offers no {missing}"));
        }
        assert_eq!(outcome, refused(libc::EPERM), "{attempt}");
    }
}

#[test]
fn a_system_call_that_is_not_listed_ends_the_process() {
    for (name, ..) in calls(0) {
        let (status, said) = attempt(name, "");
        assert_eq!(
            status.signal(),
            Some(libc::SIGSYS),
            "{name}: {status}, {said}"
        );
        assert!(!status.core_dumped(), "{name}");
    }
}

#[test]
fn opening_a_file_is_refused_without_an_end() {
    // Of the many ways only the one that the C library goes.
    assert_eq!(outcome("open a file", "").1, refused(libc::EACCES));
}

#[test]
fn machine_code_is_taken_in_before_the_run_and_not_in_it() {
    assert_eq!(
        outcome("before the run: make code of nothing", "").1,
        "Ok(())"
    );
    let (status, _) = attempt("before the run: new code", "");
    assert_eq!(status.signal(), Some(libc::SIGSYS));
}

#[test]
fn memory_past_the_limit_is_refused() {
    assert_eq!(outcome("use too much memory", "").1, refused(libc::ENOMEM));
}

#[test]
fn what_a_run_needs_works() {
    assert_eq!(outcome("work", "").1, "Ok(())");
}

#[test]
fn a_crash_is_seen_as_what_it_is_and_says_so() {
    let (status, said) = attempt("abort", "");
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{said}");
    assert!(!status.core_dumped());
    let (status, said) = attempt("panic", "");
    assert_eq!(status.signal(), None, "{said}");
    assert!(said.contains("last words"), "{said}");
}

/// What [`ATTEMPT`] says to whoever is to take a sandbox process's place.
const STAND_IN: &str = "stand-in";

/// Not a test either: native code in the place of a sandbox process, confined as one, for the tests of whole jobs
/// (`job::tests`). Its order's settings say what it does.
#[test]
#[ignore = "is run by the tests of jobs, in the place of a sandbox process"]
fn stand_in() {
    if std::env::var(ATTEMPT).as_deref() == Ok(STAND_IN) {
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
    confined.load(WORK as u64, 0).ok()?;
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
    let mut ask = |call: &Call| -> Option<crate::channel::Answer> {
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
