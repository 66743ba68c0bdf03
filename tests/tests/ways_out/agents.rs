//! Guest agents that die, lie, stall or flood, as the product meets them: a guest is not trusted, and what it says costs
//! at most its own backup. The machine has no guest; the test itself is the agent.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Emulator, Fleecebox, Outcome, QemuState, Random, Site, compare, eventually,
};
use serde_json::{Value, json};

const SIZE_MIB: u64 = 2;
const LIMIT: Duration = Duration::from_secs(60);
/// Longest that a job may wait for what an agent owes it, the slowness of the machine included.
const PATIENCE: Duration = Duration::from_secs(50);

/// What an agent does with one command, instead of what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vice {
    /// Closes the connection instead of an answer, having done it.
    Dies,
    /// Answers with this line, having done it.
    Says(&'static str),
    /// Sends so many bytes without an end of line, and does nothing.
    Floods(usize),
    /// Sends so many lines that are no answer, and does nothing.
    Chatters(usize),
    /// Does it and never answers.
    IsSilent,
}

/// An agent of a guest whose file systems are frozen or not.
struct FakeAgent {
    socket: PathBuf,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    frozen: AtomicBool,
    /// Commands in their order, but for `guest-sync-delimited`.
    seen: Mutex<Vec<String>>,
    /// At which command it misbehaves, how, and how often still.
    vice: Mutex<Option<(&'static str, Vice, usize)>>,
}

impl FakeAgent {
    fn listen(socket: &Path) -> Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let state = Arc::new(State::default());
        let for_thread = Arc::clone(&state);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // One at a time, as QEMU's socket does.
                let _ = serve(client, &for_thread);
            }
        });
        Ok(Self {
            socket: socket.into(),
            state,
        })
    }

    fn misbehaves(&self, at: &'static str, vice: Vice, times: usize) {
        *lock(&self.state.vice) = Some((at, vice, times));
        lock(&self.state.seen).clear();
    }

    fn seen(&self) -> Vec<String> {
        lock(&self.state.seen).clone()
    }

    fn is_frozen(&self) -> bool {
        self.state.frozen.load(Ordering::SeqCst)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut client: UnixStream, state: &State) -> Result<()> {
    let mut commands = BufReader::new(client.try_clone()?);
    let mut line = Vec::new();
    while commands.read_until(b'\n', &mut line)? > 0 {
        let start = line
            .iter()
            .rposition(|&byte| byte == 0xff)
            .map_or(0, |at| at + 1);
        let command: Value = serde_json::from_slice(&line[start..])?;
        line.clear();
        let name = command["execute"].as_str().context("no command")?;
        let was = state.frozen.load(Ordering::SeqCst);
        let answer = match name {
            "guest-sync-delimited" => {
                client.write_all(b"\xff")?;
                command["arguments"]["id"].clone()
            }
            "guest-fsfreeze-freeze" => json!(2),
            "guest-fsfreeze-thaw" => json!(if was { 2 } else { 0 }),
            "guest-fsfreeze-status" => json!(if was { "frozen" } else { "thawed" }),
            other => anyhow::bail!("the product gave {other}"),
        };
        if name != "guest-sync-delimited" {
            lock(&state.seen).push(name.into());
        }
        let vice = match &mut *lock(&state.vice) {
            Some((at, vice, times)) if *at == name && *times > 0 => {
                *times -= 1;
                Some(*vice)
            }
            _ => None,
        };
        if !matches!(vice, Some(Vice::Floods(_) | Vice::Chatters(_))) {
            match name {
                "guest-fsfreeze-freeze" => state.frozen.store(true, Ordering::SeqCst),
                "guest-fsfreeze-thaw" => state.frozen.store(false, Ordering::SeqCst),
                _ => {}
            }
        }
        match vice {
            None => client.write_all(format!("{}\n", json!({"return": answer})).as_bytes())?,
            Some(Vice::Dies) => return Ok(()),
            Some(Vice::Says(line)) => client.write_all(format!("{line}\n").as_bytes())?,
            Some(Vice::Floods(bytes)) => {
                for _ in 0..bytes / 4096 {
                    client.write_all(&[b'x'; 4096])?;
                }
            }
            Some(Vice::Chatters(lines)) => {
                for _ in 0..lines {
                    client.write_all(b"{\"event\": \"nothing\"}\n")?;
                }
            }
            Some(Vice::IsSilent) => {}
        }
    }
    Ok(())
}

struct Scene {
    site: Site,
    vm: Emulator,
    agent: FakeAgent,
    before: QemuState,
}

impl Scene {
    fn new() -> Result<Self> {
        let site = Site::new()?;
        let vm = Emulator::running(|folder| {
            let file = folder.join("a.raw");
            Random::new(1).fill_file(&file, SIZE_MIB)?;
            let blockdev = json!({"driver": "raw", "node-name": "na",
                "file": {"driver": "file", "filename": file}});
            let words = ["-device", "virtio-blk-pci,id=va,drive=na", "-blockdev"];
            let mut words: Vec<String> = words.map(Into::into).to_vec();
            words.rotate_left(2);
            words.insert(1, blockdev.to_string());
            Ok(words)
        })?;
        Ok(Self {
            agent: FakeAgent::listen(&site.path("agent.sock"))?,
            before: QemuState::read(vm.monitors())?,
            site,
            vm,
        })
    }

    fn command(&self) -> Result<Fleecebox> {
        let order = self
            .site
            .order_for(&self.vm.monitors().product, "chunked")?;
        let command = self.site.backup_command(&order);
        Ok(command.arg("--agent").arg(&self.agent.socket))
    }

    /// Backs up while the agent misbehaves so many times at that command.
    fn backup(&self, at: &'static str, vice: Vice, times: usize) -> Result<Outcome> {
        self.agent.misbehaves(at, vice, times);
        let outcome = self.command()?.run()?;
        println!(
            "{vice:?} at {at}: {:?} in {:?}",
            outcome.code(),
            outcome.took
        );
        ensure!(outcome.took < PATIENCE, "it took {:?}", outcome.took);
        Ok(outcome)
    }

    /// Nothing is left, nothing stands still, and the next backup is right.
    fn recovers(&self) -> Result<()> {
        ensure!(!self.agent.is_frozen(), "the guest is frozen");
        ensure!(self.vm.status()? == "running");
        QemuState::read(self.vm.monitors())?.assert_restored(&self.before, |_| true);
        self.site.check_no_fleecing_images()?;
        *lock(&self.agent.state.vice) = None;
        let outcome = self.command()?.run()?.assert_success();
        self.holds(&outcome)
    }

    fn holds(&self, outcome: &Outcome) -> Result<()> {
        let backup = Backup::told_by(outcome)?;
        let restored = self.site.restore(&self.site.archive(), &backup.id)?;
        compare::same_bytes(&restored.join("va.raw"), &self.vm.path("a.raw"))
    }
}

#[test]
fn an_agent_that_answers_a_freeze_with_rubbish_is_thawed_and_there_is_no_backup() -> Result<()> {
    let scene = Scene::new()?;
    for says in [
        r#"{"return": "two"}"#,
        r#"{"return": [2]}"#,
        r#"{"return": -1}"#,
        r#"{"return": 1e300}"#,
        "{}",
        "null",
        r#"{"error": {"class": "GenericError", "desc": "no\u001b[2J\nno"}}"#,
        "not JSON at all",
    ] {
        let outcome = scene.backup("guest-fsfreeze-freeze", Vice::Says(says), 1)?;
        assert_eq!(outcome.code(), Some(1), "{says}: {}", outcome.stderr);
        let last = outcome.stderr.lines().last().unwrap_or_default();
        ensure!(
            last.contains("cannot freeze the guest's file systems"),
            "{last}"
        );
        ensure!(!last.contains('\u{1b}'), "{last:?}");
        ensure!(
            scene.agent.seen().contains(&"guest-fsfreeze-thaw".into()),
            "{says}: {:?}",
            scene.agent.seen()
        );
        ensure!(scene.site.list(&scene.site.archive())?.is_empty());
    }
    scene.recovers()
}

#[test]
fn an_agent_that_floods_is_cut_off_and_thawed() -> Result<()> {
    let scene = Scene::new()?;
    for vice in [Vice::Floods(8 << 20), Vice::Chatters(40_000)] {
        let outcome = scene.backup("guest-fsfreeze-freeze", vice, 1)?;
        assert_eq!(outcome.code(), Some(1), "{vice:?}: {}", outcome.stderr);
        ensure!(scene.site.list(&scene.site.archive())?.is_empty());
        ensure!(!scene.agent.is_frozen(), "{vice:?}: the guest is frozen");
    }
    // The point in time was taken before the guest lost its manners: it is thawed by asking again.
    for vice in [Vice::Floods(8 << 20), Vice::Chatters(40_000)] {
        let outcome = scene.backup("guest-fsfreeze-thaw", vice, 1)?;
        scene.holds(&outcome.assert_success())?;
        ensure!(!scene.agent.is_frozen(), "{vice:?}: the guest is frozen");
    }
    scene.recovers()
}

#[test]
fn an_agent_that_dies_between_freeze_and_thaw_is_thawed_when_it_is_back() -> Result<()> {
    let scene = Scene::new()?;
    for at in ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"] {
        let started = Instant::now();
        let outcome = scene.backup(at, Vice::Dies, 1)?;
        assert_eq!(outcome.code(), Some(1), "{at}: {}", outcome.stderr);
        eventually("the watchdog to thaw the guest", LIMIT, || {
            Ok((!scene.agent.is_frozen()).then_some(()))
        })
        .with_context(|| format!("{at}: {}", outcome.stderr))?;
        println!(
            "dead at {at}: thawed {:?} after the start",
            started.elapsed()
        );
        ensure!(scene.site.list(&scene.site.archive())?.is_empty());
    }
    scene.recovers()
}

#[test]
fn an_agent_that_claims_to_be_frozen_still_is_asked_until_it_thaws() -> Result<()> {
    let scene = Scene::new()?;
    // It answers, and stays frozen for some more questions.
    let lie = Vice::Says(r#"{"return": "frozen"}"#);
    let outcome = scene
        .backup("guest-fsfreeze-status", lie, 5)?
        .assert_success();
    let seen = scene.agent.seen();
    let thaws = seen
        .iter()
        .filter(|name| *name == "guest-fsfreeze-thaw")
        .count();
    ensure!(thaws >= 6, "{seen:?}");
    scene.holds(&outcome)?;
    // A thaw that is never answered has happened all the same, as the next question shows.
    let outcome = scene
        .backup("guest-fsfreeze-thaw", Vice::IsSilent, 1)?
        .assert_success();
    scene.holds(&outcome)?;
    scene.recovers()
}

#[test]
fn a_guest_that_need_not_be_frozen_is_backed_up_without_its_agent_and_it_is_said() -> Result<()> {
    let scene = Scene::new()?;
    let refusal = Vice::Says(
        r#"{"error": {"class": "CommandNotFound", "desc": "Command guest-fsfreeze-freeze has been disabled"}}"#,
    );
    for vice in [refusal, Vice::Dies] {
        let required = scene.backup("guest-fsfreeze-freeze", vice, 1)?;
        assert_eq!(required.code(), Some(1), "{vice:?}: {}", required.stderr);
    }
    let freeze = |when: &str| Ok::<_, anyhow::Error>(scene.command()?.arg("--freeze").arg(when));
    scene.agent.misbehaves("guest-fsfreeze-freeze", refusal, 1);
    let without = freeze("if-available")?.run()?.assert_success();
    ensure!(
        without.stderr.contains("are not frozen"),
        "{}",
        without.stderr
    );
    ensure!(
        without.stderr.contains("has been disabled"),
        "{}",
        without.stderr
    );
    scene.holds(&without)?;

    let with = freeze("if-available")?.run()?.assert_success();
    ensure!(
        with.stderr.contains("froze 2 file systems"),
        "{}",
        with.stderr
    );
    ensure!(scene.agent.seen().contains(&"guest-fsfreeze-freeze".into()));

    scene
        .agent
        .misbehaves("guest-fsfreeze-freeze", Vice::IsSilent, 0);
    let never = freeze("never")?.run()?.assert_success();
    ensure!(
        never.stderr.contains("`freeze` is `never`"),
        "{}",
        never.stderr
    );
    ensure!(scene.agent.seen().is_empty(), "{:?}", scene.agent.seen());

    let order = scene
        .site
        .order_for(&scene.vm.monitors().product, "chunked")?;
    let command = scene.site.backup_command(&order).arg("--agent");
    let nobody = command.arg(scene.site.path("nobody.sock"));
    let quiet = nobody.clone().arg("--quiet");
    quiet.run()?.assert_refused(2, "nobody.sock");
    let nobody = nobody
        .arg("--freeze")
        .arg("if-available")
        .run()?
        .assert_success();
    ensure!(
        nobody.stderr.contains("are not frozen"),
        "{}",
        nobody.stderr
    );
    scene.recovers()
}
