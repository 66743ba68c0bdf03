//! Whole jobs with an escaped sandbox: native code in the place of a sandbox process, which is confined as one and has
//! every byte of the channel to itself. Whatever it says and whatever it asks of the kernel, it gains nothing beyond
//! what the contract gives to any provider.

#[path = "../../qemu/src/tests/daemon.rs"]
#[allow(dead_code, reason = "the rest of it is for the tests there")]
mod daemon;
mod stand_in;

use super::backup::{BackupError, BackupPlaces, BackupRequest, Summary, backup};
use super::selection::Selection;
use super::signals::Signals;
use super::subject::{Folders, VmAccess};
use super::volume_run::VolumeError;
use crate::archive::Archive;
use crate::channel::{Answer, Call, Order, Outcome};
use crate::config::{Provider, Vm};
use crate::conformance::trace::{Cut, Trace};
use crate::contract::ErrorCode;
use crate::event::{Event, Events};
use crate::grants::account::Account;
use crate::grants::run::RunError;
use crate::qemu;
use crate::qemu::watchdog::HIDDEN_ARGUMENT as WATCHDOG;
use crate::sandbox::{self, Cache, Listener, Program, Witness};
use cap_std::ambient_authority;
use cap_std::fs::Dir;
use daemon::{Daemon, SIZE, state};
use stand_in::STAND_IN;
use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// No message of a sandbox takes the job more than this; the slowest of them ends by its wall-clock limit.
const LIMIT: Duration = Duration::from_secs(30);

struct Host {
    daemon: Daemon,
    folder: tempfile::TempDir,
    archive: Arc<Archive>,
    program: Program,
}

impl Host {
    async fn new() -> Self {
        let daemon = Daemon::start().await;
        let disk = std::fs::File::options()
            .write(true)
            .open(daemon.at("raw0.img"))
            .unwrap();
        for at in (0..SIZE).step_by(4096) {
            disk.write_all_at(&[(at >> 12) as u8 | 1; 4096], at)
                .unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["archive", "state", "fleecing", "cache"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let archive = Archive::create(open(&folder.path().join("archive"))).unwrap();
        // A sandbox process is started without an environment and with an argument of its own. No watchdog: the jobs
        // are of this process, which does not die.
        let program = folder.path().join("stand-in");
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = {WATCHDOG} ] && exit\n{STAND_IN}=1 exec '{}' --exact job::tests::stand_in::stand_in --ignored \
             --nocapture --test-threads=1\n",
            std::env::current_exe().unwrap().display(),
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self {
            daemon,
            archive: Arc::new(archive),
            program: Program::at(program),
            folder,
        }
    }

    /// One job, and what it told.
    async fn run(&self, escape: &str, more: &str) -> (Result<Summary, BackupError>, Vec<Event>) {
        self.signalled(escape, more, &Signals::default(), &self.program)
            .await
    }

    async fn signalled(
        &self,
        escape: &str,
        more: &str,
        signals: &Signals,
        program: &Program,
    ) -> (Result<Summary, BackupError>, Vec<Event>) {
        let provider: Provider = toml::from_str(&format!(
            "component = 'none'\n{more}\n[settings]\nescape = \"{escape}\"\n"
        ))
        .unwrap();
        let vm: Vm = toml::from_str("disks = ['raw0']").unwrap();
        let place = |name: &str| {
            let path = self.folder.path().join(name);
            (open(&path), path)
        };
        let request = BackupRequest {
            vm: VmAccess {
                name: "web".into(),
                config: vm,
                monitor: qemu::Address::Socket(self.daemon.at("qmp.sock")),
                extra: Vec::new(),
            },
            provider_name: "escaped".into(),
            account: Arc::new(Account::new(provider.limits.clone())),
            provider,
            component: b"\0asm\x0d\0\x01\0".to_vec().into(),
            namespace: "tenant".parse().unwrap(),
            attachments: Default::default(),
            selection: Selection::default(),
            full: true,
        };
        let places = BackupPlaces {
            archive: Arc::clone(&self.archive),
            folders: Folders {
                state: place("state"),
                fleecing: place("fleecing"),
            },
            cache: Cache::new(place("cache").0),
            program: program.clone(),
        };
        let (events, mut told) = Events::channel();
        let job = backup(request, places, &events, signals);
        let done = tokio::time::timeout(LIMIT, job).await;
        let mut heard = Vec::new();
        while let Ok(event) = told.try_recv() {
            heard.push(event);
        }
        match done {
            Ok(done) => (done, heard),
            Err(_) => panic!("{escape}: the job does not end: {heard:?}"),
        }
    }

    /// A job that fails and leaves nothing: not in QEMU, not in the archive, not in any folder.
    async fn fails(&self, escape: &str, more: &str) -> (VolumeError, Vec<Event>) {
        let state_now = async || state(&self.daemon.monitor().await).await;
        let before = state_now().await;
        let (done, told) = self.run(escape, more).await;
        let error = match done {
            Err(BackupError::Volume { source, .. }) => source,
            other => panic!("{escape}: {other:?}"),
        };
        assert_eq!(state_now().await, before, "{escape}");
        let namespace = self.folder.path().join("archive/namespaces/tenant");
        for empty in [
            namespace.join("backups"),
            self.folder.path().join("fleecing"),
        ] {
            assert_eq!(names(&empty), BTreeSet::new(), "{escape}");
        }
        let expected = ["archive", "cache", "fleecing", "stand-in", "state"];
        assert_eq!(names(self.folder.path()), expected.map(String::from).into());
        (error, told)
    }
}

fn open(path: &Path) -> Dir {
    Dir::open_ambient_dir(path, ambient_authority()).unwrap()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The error with its causes.
fn said(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_sandbox_that_says_what_no_sandbox_says_is_ended_and_gains_nothing() {
    let host = Host::new().await;
    for escape in [
        "reads more than it may",
        "writes more than there is",
        "asks for stored objects",
        "ends another order",
        "names what is too long",
    ] {
        let (error, _) = host.fails(escape, "").await;
        let broken = matches!(
            &error,
            VolumeError::Run(RunError::Sandbox(sandbox::Error::Broken(_)))
        );
        assert!(broken, "{escape}: {error:?}");
    }
    let (error, _) = host
        .fails("reads what it was not granted", "[grant]\nread = false")
        .await;
    assert!(said(&error).contains("holds no handle for"), "{error:?}");
    for escape in ["announces four gigabytes", "talks rubbish"] {
        let (error, _) = host.fails(escape, "").await;
        let broken = matches!(
            &error,
            VolumeError::Run(RunError::Sandbox(sandbox::Error::Socket(_)))
        );
        assert!(broken, "{escape}: {error:?}");
    }
    let (error, _) = host.fails("ends at once", "").await;
    let died = matches!(
        &error,
        VolumeError::Run(RunError::Sandbox(sandbox::Error::Died { .. }))
    );
    assert!(died, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_sandbox_cannot_hold_a_job_up_for_longer_than_its_time() {
    let host = Host::new().await;
    for escape in ["says half a word", "never listens", "talks without end"] {
        let began = Instant::now();
        let (error, told) = host.fails(escape, "[limits]\nwall-seconds = 1").await;
        let stopped = matches!(&error, VolumeError::Run(RunError::WallTime { seconds: 1 }));
        assert!(stopped, "{escape}: {error:?}");
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "{escape}: {:?}",
            began.elapsed()
        );
        // What it logged is bounded too.
        assert!(told.len() < 20_000, "{escape}: {} events", told.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_sandbox_that_takes_no_answer_makes_no_progress() {
    let host = Host::new().await;
    let least = "[limits]\nprogress-per-minute = 1048576";
    let (error, _) = host.fails("never listens", least).await;
    let stopped = matches!(
        &error,
        VolumeError::Run(RunError::Trickles { covered: 0, .. })
    );
    assert!(stopped, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_escaped_sandbox_claims_is_not_believed() {
    let host = Host::new().await;
    for escape in ["says that all is done", "uses what is not its own"] {
        let (error, _) = host.fails(escape, "").await;
        let uncovered = matches!(
            &error,
            VolumeError::Run(RunError::Uncovered { bytes: SIZE, .. })
        );
        assert!(uncovered, "{escape}: {error:?}");
    }
    // Its claims are asked for again in a fresh process, which has nothing to say.
    let (done, _) = host.run("scribbles on what was given", "").await;
    assert!(matches!(&done, Err(BackupError::Proof { .. })), "{done:?}");
    assert_eq!(
        names(&host.folder.path().join("archive/namespaces/tenant/backups")),
        BTreeSet::new()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_ends_an_escaped_sandbox_at_the_first_forbidden_call() {
    let host = Host::new().await;
    for call in [
        "execve",
        "socket",
        "sendmsg",
        "fork",
        "ptrace",
        "kill the parent",
        "read another's memory",
        "map the memory file",
        "new code",
        "make code of nothing",
        "openat2",
    ] {
        let (error, _) = host.fails(call, "").await;
        let text = said(&error);
        assert!(
            text.contains("SIGSYS") && text.contains("broken out"),
            "{call}: {text}"
        );
    }
    let (error, told) = host.fails("opens what it can name", "").await;
    assert!(
        matches!(error, VolumeError::Run(RunError::Uncovered { .. })),
        "{error:?}"
    );
    let nothing =
        |event: &Event| matches!(event, Event::Provider { text, .. } if text == "opened: false");
    assert!(told.iter().any(nothing), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_no_limit_of_a_process_counts_is_held_by_the_kernel_all_the_same() {
    let host = Host::new().await;
    let limits = "[limits]\nmemory = 16777216";
    let (error, told) = host.fails("fills page tables", limits).await;
    let unheld = |event: &&Event| matches!(event, Event::Warning { text } if text.contains("control groups"));
    if let Some(unheld) = told.iter().find(unheld) {
        return crate::report::not_shown(&format!("this system has none: {unheld:?}"));
    }
    let ended = matches!(
        &error,
        VolumeError::Run(RunError::Sandbox(sandbox::Error::Memory { limit }))
            if (272 << 20..280 << 20).contains(limit)
    );
    assert!(ended, "{error:?}");
    let text = said(&error);
    assert!(
        text.contains("needs more memory than its limit allows"),
        "{text}"
    );
}

/// The other side of it: the channel is all that an escape has, and all that there is to have.
#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_sandbox_that_does_only_what_it_was_granted_is_a_provider() {
    let host = Host::new().await;
    let (done, told) = host.run("does only what it was granted", "").await;
    let summary = done.unwrap_or_else(|error| panic!("{error:?}: {told:?}"));
    assert_eq!(summary.manifest.record.volumes.len(), 1);
}

/// Breaks where the job is in the midst of reading the VM's disks.
#[derive(Debug)]
struct Breaks;

impl Witness for Breaks {
    fn begin(&self, order: &Order) -> Option<Box<dyn Listener>> {
        assert!(!matches!(order, Order::Run(_)), "planted");
        None
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_panics_takes_its_snapshot_down_before_it_ends() {
    let host = Host::new().await;
    let state_now = async || state(&host.daemon.monitor().await).await;
    let before = state_now().await;
    let program = host.program.clone().watched_by(Breaks);
    let signals = Signals::default();
    let (done, _) = host.signalled("none", "", &signals, &program).await;
    let Err(BackupError::Panicked(text)) = done else {
        panic!("{done:?}");
    };
    assert_eq!(text, "planted");
    assert_eq!(state_now().await, before);
}

/// A job that is cancelled in the midst of its run's fourth call, what was asked and answered, how long after the cancel
/// the VM's snapshot was gone, and how long after it the job ended.
async fn cancelled(host: &Host, escape: &str, twice: bool) -> (Trace, Duration, Duration) {
    let signals = Signals::default();
    let (after, cancel) = (3, signals.end.clone());
    let trace = Trace::with_cut(Cut { after, cancel });
    let program = host.program.clone().watched_by(trace.clone());
    let fleecing = host.folder.path().join("fleecing");
    let (end, at_once) = (signals.end.clone(), signals.at_once.clone());
    let watch = async move {
        end.cancelled().await;
        let began = Instant::now();
        if twice {
            // What it then leaves is the next run's.
            at_once.cancel();
            return (began, Duration::ZERO);
        }
        while !names(&fleecing).is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (began, began.elapsed())
    };
    let job = async {
        let (done, _) = host.signalled(escape, "", &signals, &program).await;
        let cancelled = matches!(done, Err(BackupError::Cancelled { .. }));
        assert!(cancelled, "{escape}: {done:?}");
        Instant::now()
    };
    let ((began, gone), ended) = tokio::join!(watch, job);
    (trace, gone, ended - began)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_a_cancelled_run_is_answered_so_until_it_returns() {
    let host = Host::new().await;
    let (trace, ..) = cancelled(&host, "returns when it is cancelled", false).await;
    let all = trace.conversations();
    let [run] = &all[..] else {
        panic!("{all:?}");
    };
    let told = Some(Answer::Error(ErrorCode::Cancelled));
    let late = run.exchanges.iter().skip_while(|it| it.answer != told);
    let late: Vec<_> = late.collect();
    // The first that it is told so, nine others that can fail, three that cannot, and its return.
    assert_eq!(late.len(), 14, "{late:?}");
    let returned = Call::Done(Outcome::GuestError(ErrorCode::Cancelled));
    assert_eq!(late[13].call, returned);
}

/// On a machine that is busy with other things a teardown can take a second by itself.
const TRIES: usize = 5;

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_that_goes_on_is_ended_after_a_second_for_which_the_vm_does_not_wait() {
    let host = Host::new().await;
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let (_, gone, ended) = cancelled(&host, "asks on after a cancel", false).await;
        // The cancel was seen here a little later than by the job.
        assert!(ended >= Duration::from_millis(500), "{ended:?}");
        if gone < Duration::from_secs(1) {
            return;
        }
        seen.push((gone, ended));
    }
    panic!("the snapshot was kept for as long as the run: {seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_leaves_a_cancelled_run_no_time() {
    let host = Host::new().await;
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let (.., ended) = cancelled(&host, "asks on after a cancel", true).await;
        if ended < Duration::from_secs(1) {
            return;
        }
        seen.push(ended);
    }
    panic!("it was waited for: {seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_compressed_at_the_archives_level_and_at_most_at_the_providers() {
    let stored = async |level: i64, limits: &str| {
        let mut host = Host::new().await;
        write_words(&host.daemon.at("raw0.img"));
        let archive = Archive::open(open(&host.folder.path().join("archive"))).unwrap();
        host.archive = Arc::new(archive.compressing(level.try_into().unwrap()));
        let (done, _) = host.run("does only what it was granted", limits).await;
        done.unwrap().manifest.stats.stored_bytes
    };
    let most = "[limits]\nzstd-level = 2";
    let (fast, hard) = (stored(2, "").await, stored(19, "").await);
    assert!(hard < fast, "{hard} {fast}");
    assert_eq!(stored(19, most).await, fast);
    assert_eq!(stored(1, most).await, stored(1, "").await);
}

/// Begins a disk with a few words in an order that is no order, in which a higher level finds more. The rest is as it was.
fn write_words(disk: &Path) {
    let mut state = 1_u32;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        [&b"alpha "[..], b"beta ", b"gamma ", b"delta\n"][(state >> 30) as usize]
    });
    let text: Vec<u8> = words.flatten().copied().take(2 << 20).collect();
    let disk = std::fs::File::options().write(true).open(disk).unwrap();
    disk.write_all_at(&text, 0).unwrap();
}
