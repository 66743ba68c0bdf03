//! What the kernel holds a real sandbox process to while a provider runs in it, and what is said where it cannot.

use super::*;
use rustix::process::Signal;
use seccompiler::{SeccompAction, SeccompFilter};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;

/// A provider that has called the job and waits for the answer.
async fn waiting(bench: &Bench) -> Process {
    let guest = provider(
        "(call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1)) unreachable",
    );
    let mut process = bench.start(guest, Order::Run(run_order())).await;
    assert!(matches!(process.next().await.unwrap(), Call::Log { .. }));
    process
}

/// The lines `name: value` or `name  soft hard unit` of a file about a process.
fn about(process: &Process, file: &str) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(format!("/proc/{}/{file}", process.id())).unwrap();
    let lines = text.lines().filter_map(|line| match file {
        "limits" => line.split_at_checked(26),
        _ => line.split_once(':'),
    });
    lines
        .map(|(name, value)| {
            let value: Vec<_> = value.split_whitespace().collect();
            (name.trim().to_owned(), value.join(" "))
        })
        .collect()
}

#[tokio::test]
async fn a_provider_runs_without_privileges_and_with_nothing_to_gain() {
    let bench = bench();
    let process = waiting(&bench).await;
    let status = about(&process, "status");
    assert_eq!(status["NoNewPrivs"], "1");
    // Filters: what is refused, what loading needs, what a run needs.
    assert_eq!(
        (&*status["Seccomp"], &*status["Seccomp_filters"]),
        ("2", "3")
    );
    assert_eq!(status["Threads"], "2");
    for sets in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status[sets], "0000000000000000", "{sets}");
    }
    if rustix::process::geteuid().is_root() {
        let user = (0x7000_0000 + process.id()).to_string();
        let all = [&*user; 4].join(" ");
        assert_eq!((&status["Uid"], &status["Gid"]), (&all, &all));
        assert_eq!(status["Groups"], "");
    }
    for thread in std::fs::read_dir(format!("/proc/{}/task", process.id())).unwrap() {
        let path = thread.unwrap().path().join("status");
        let status = std::fs::read_to_string(path).unwrap();
        assert!(status.contains("\nSeccomp_filters:\t3\n"), "{status}");
    }
}

#[tokio::test]
async fn a_provider_runs_within_limits_that_leave_no_room() {
    let bench = bench();
    let process = waiting(&bench).await;
    let limits = about(&process, "limits");
    let both = |value: u64| format!("{value} {value}");
    let is = |name: &str, value: u64| {
        let limit = &limits[name];
        assert!(limit.starts_with(&both(value)), "{name}: {limit}");
    };
    is("Max processes", 0);
    is("Max open files", 1);
    is("Max core file size", 0);
    is("Max file size", Payload::TRANSFER_SIZE);
    let data: u64 = limits["Max data size"]
        .split_once(' ')
        .unwrap()
        .0
        .parse()
        .unwrap();
    assert!((64 << 20..512 << 20).contains(&data), "{data}");
}

#[tokio::test]
async fn a_sandbox_that_makes_a_forbidden_system_call_is_reported_as_broken_out_of() {
    let bench = bench();
    let mut process = waiting(&bench).await;
    // As the kernel does it. That it does is shown where `confine` is.
    signal(process.id(), Signal::SYS);
    let error = process.next().await.unwrap_err();
    assert!(
        matches!(&error, Error::Died { status, .. } if status.signal() == Some(31)),
        "{error:?}"
    );
    let said = error.to_string();
    assert!(
        said.contains("SIGSYS") && said.contains("broken out"),
        "{said}"
    );
}

/// Runs `job` on a thread that the kernel answers `calls` with `errno`, and everything that it starts: an older or
/// stricter system.
fn on_a_system_without<T: Send>(
    calls: &[i64],
    errno: rustix::io::Errno,
    job: impl AsyncFnOnce() -> T + Send,
) -> T {
    let filter = SeccompFilter::new(
        calls.iter().map(|&call| (call, vec![])).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.raw_os_error().unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            seccompiler::apply_filter(&program).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(job())
        });
        thread.join().unwrap()
    })
}

#[test]
fn what_the_system_does_not_offer_is_said_and_the_rest_still_holds() {
    use nix::libc::{SYS_landlock_create_ruleset, SYS_seccomp, SYS_setresuid};
    use rustix::io::Errno;
    let landlock = vec![Gap::Files, Gap::Tcp, Gap::Scopes];
    let user = match rustix::process::geteuid().is_root() {
        true => vec![Gap::User],
        false => vec![],
    };
    for (call, errno, gaps) in [
        (SYS_landlock_create_ruleset, Errno::NOSYS, landlock.clone()),
        (SYS_landlock_create_ruleset, Errno::OPNOTSUPP, landlock),
        (SYS_seccomp, Errno::NOSYS, vec![Gap::SystemCalls]),
        (SYS_setresuid, Errno::INVAL, user),
    ] {
        let (missing, status, died) = on_a_system_without(&[call], errno, async || {
            let bench = bench();
            let mut process = waiting(&bench).await;
            let found = (process.missing().to_vec(), about(&process, "status"));
            process.answer(&Answer::Unit).unwrap();
            let outcome = process.next().await.unwrap();
            (found.0, found.1, outcome)
        });
        // Compared with what this machine misses anyway.
        let here = on_a_system_without(&[], errno, async || {
            let bench = bench();
            waiting(&bench).await.missing().to_vec()
        });
        for gap in [
            Gap::Files,
            Gap::Tcp,
            Gap::Scopes,
            Gap::SystemCalls,
            Gap::User,
            Gap::Group,
        ] {
            let expected = gaps.contains(&gap) || here.contains(&gap);
            assert_eq!(missing.contains(&gap), expected, "{gap}");
        }
        assert_eq!(status["NoNewPrivs"], "1");
        assert_eq!(status["CapEff"], "0000000000000000");
        assert!(
            matches!(died, Call::Done(Outcome::Failed(Failure::Trapped(_)))),
            "{died:?}"
        );
    }
}

#[test]
fn where_confinement_is_required_a_gap_is_an_error_that_names_it() {
    use nix::libc::SYS_landlock_create_ruleset;
    let refused = on_a_system_without(
        &[SYS_landlock_create_ruleset],
        rustix::io::Errno::NOSYS,
        async || {
            let mut bench = bench();
            bench.program = bench.program.require_confinement(true);
            let component = provider(OK_EMPTY).into();
            compile(&bench.program, component, &bench.cache).await
        },
    );
    let Err(CompileError::Process(error @ Error::Unconfined { .. })) = refused else {
        panic!("{refused:?}");
    };
    let said = error.to_string();
    assert!(said.contains("Landlock") && !said.contains('\n'), "{said}");
}

#[tokio::test]
async fn processes_of_one_job_are_in_one_control_group_and_those_of_two_are_not() {
    let bench = bench();
    let first = waiting(&bench).await;
    if first.missing().contains(&Gap::Group) {
        return report::not_shown(&format!("this system has no {}", Gap::Group));
    }
    let groups = |process: &Process| {
        let text = std::fs::read_to_string(format!("/proc/{}/cgroup", process.id())).unwrap();
        let own = text.lines().find(|line| line.contains("/fleecebox-"));
        own.unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    assert_ne!(groups(&first), groups(&waiting(&bench).await));
    let job = Bench {
        program: bench
            .program
            .clone()
            .within(Budget::new(64 << 20, Duration::from_secs(60))),
        ..bench
    };
    let (one, other) = (waiting(&job).await, waiting(&job).await);
    let group = groups(&one);
    assert_eq!(group, groups(&other));
    let (_, path) = group.rsplit_once(':').unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut folders: Vec<_> = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup"))
        .map(|line| format!("{}{path}", line.split(' ').nth(4).unwrap()))
        .collect();
    folders.retain(|folder| std::path::Path::new(folder).exists());
    // One hierarchy may be mounted at several places of the machine.
    let identity = |folder: &String| {
        let metadata = std::fs::metadata(folder).unwrap();
        (metadata.dev(), metadata.ino())
    };
    let found: BTreeSet<_> = folders.iter().map(identity).collect();
    assert_eq!(found.len(), 1, "{folders:?}");
    drop((one, other, job));
    let left = |folder: &&String| std::path::Path::new(folder).exists();
    assert_eq!(folders.iter().find(left), None);
}

#[test]
fn where_no_control_group_can_be_made_it_is_said_and_an_error_where_it_is_required() {
    #[cfg(target_arch = "x86_64")]
    use nix::libc::SYS_mkdir;
    use nix::libc::SYS_mkdirat;
    let calls = [
        #[cfg(target_arch = "x86_64")]
        SYS_mkdir,
        SYS_mkdirat,
    ];
    let bench = bench();
    let component = provider(OK_EMPTY);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let compiled = runtime.block_on(bench.compile(component));
    let strict = bench.program.clone().require_confinement(true);
    let (missing, refused) = on_a_system_without(&calls, rustix::io::Errno::ROFS, async || {
        let order = Order::Run(run_order());
        let process = Process::start(&bench.program, &order, &compiled.file).await;
        let refused = Process::start(&strict, &order, &compiled.file).await;
        (process.unwrap().missing().to_vec(), refused.unwrap_err())
    });
    assert!(missing.contains(&Gap::Group), "{missing:?}");
    let said = refused.to_string();
    assert!(
        said.contains("control groups") && said.contains("Delegate=yes") && !said.contains('\n'),
        "{said}"
    );
}
