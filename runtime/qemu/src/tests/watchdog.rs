//! The watchdog as a process of its own: this test program again, running one test.

use super::agent::{next_command, sync_answer};
use super::monitor::serve;
use crate::Address;
use crate::watchdog::{self, Watchdog};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio::time::timeout;

const AGENT: &str = "FLEECEBOX_TEST_AGENT";
const QMP: &str = "FLEECEBOX_TEST_QMP";

#[test]
#[ignore = "the other tests run it as their watchdog process"]
fn be_the_watchdog() {
    let path = |name| std::env::var_os(name).map(|path| Address::Socket(path.into()));
    let agent = path(AGENT).expect("only to be run by the other tests");
    let code = watchdog::serve(Some(agent), path(QMP), async || true);
    assert_eq!(code, std::process::ExitCode::SUCCESS);
}

async fn spawn(agent: &Path) -> Watchdog {
    let mut command = Command::new("/proc/self/exe");
    command.args([
        "--exact",
        "tests::watchdog::be_the_watchdog",
        "--ignored",
        "--nocapture",
    ]);
    command
        .env(AGENT, agent)
        .env(QMP, agent.with_extension("qmp"));
    Watchdog::start(command).await.unwrap()
}

/// The commands that the guest sees until it is thawed, other than those that tell nothing.
async fn thawed(listener: UnixListener) -> bool {
    let (mut guest, _) = listener.accept().await.unwrap();
    let mut thawed = false;
    while let Some(command) = next_command(&mut guest).await {
        let answer = match command["execute"].as_str().unwrap() {
            "guest-sync-delimited" => sync_answer(&command),
            "guest-fsfreeze-thaw" => {
                thawed = true;
                b"{\"return\": 1}\n".to_vec()
            }
            _ => b"{\"return\": \"thawed\"}\n".to_vec(),
        };
        guest.write_all(&answer).await.unwrap();
    }
    thawed
}

#[tokio::test]
async fn a_job_that_dies_with_the_guest_frozen_is_thawed_for_through_every_signal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut watchdog = spawn(&path).await;
    watchdog.arm_thaw().await.unwrap();
    let process = Pid::from_raw(watchdog.process().unwrap() as i32).unwrap();
    assert_eq!(
        rustix::process::getsid(Some(process)).unwrap(),
        process,
        "it leads a session of its own"
    );
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        kill_process(process, signal).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(watchdog);
    assert!(
        timeout(Duration::from_secs(20), thawed(listener))
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn a_disarmed_watchdog_ends_and_touches_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut watchdog = spawn(&path).await;
    watchdog.arm_thaw().await.unwrap();
    watchdog.disarm().await.unwrap();
    assert!(
        timeout(Duration::from_millis(200), listener.accept())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_vm_that_its_job_stopped_is_continued_before_it_is_thawed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let agent = UnixListener::bind(&path).unwrap();
    let qmp = UnixListener::bind(path.with_extension("qmp")).unwrap();
    let mut watchdog = spawn(&path).await;
    watchdog.arm_cont().await.unwrap();
    watchdog.arm_thaw().await.unwrap();
    drop(watchdog);

    let (commands, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let (client, _) = timeout(Duration::from_secs(20), qmp.accept())
        .await
        .unwrap()
        .unwrap();
    let early = timeout(Duration::from_millis(100), agent.accept()).await;
    assert!(early.is_err(), "without CPUs no agent answers");
    tokio::spawn(serve(client, move |command| {
        commands.send(command["execute"].clone()).unwrap();
        r#"{"return": {}, "id": ID}"#.into()
    }));
    assert!(
        timeout(Duration::from_secs(20), thawed(agent))
            .await
            .unwrap()
    );
    assert_eq!(seen.recv().await.unwrap(), "cont");
}

#[tokio::test]
async fn a_watchdog_whose_vm_is_gone_ends() {
    let folder = tempfile::tempdir().unwrap();
    let mut watchdog = spawn(&folder.path().join("gone.sock")).await;
    watchdog.arm_thaw().await.unwrap();
    let process = Pid::from_raw(watchdog.process().unwrap() as i32).unwrap();
    drop(watchdog);
    for _ in 0..200 {
        if rustix::process::test_kill_process(process).is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it is still there");
}
