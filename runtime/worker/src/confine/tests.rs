//! An escaped sandbox: each attempt runs in a process of its own that went through the very steps of a sandbox
//! process, and reports how the kernel took it.

#[allow(dead_code, reason = "the rest is for the tests of jobs")]
mod native;

use super::{Confined, enter};
use fleecebox_channel::Payload;
use native::{calls, own, parent, system_call};
use nix::libc;
use std::ffi::CString;
use std::io;
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
        .args(["--exact", "confine::tests::escaped"])
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
