//! Providers that lie, and jobs that are killed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fleecebox_tests::{At, Fault, Stage, What};
use rustix::process::Signal;

use crate::command::Running;
use crate::processes::{self, Process};
use crate::story::Story;

/// The hostile providers, by the names of their components.
pub(crate) const NAMES: [&str; 3] = ["skips-a-block", "imports-a-socket", "claims-without-bytes"];

/// How often a job may be quicker than the demonstration, before that is strange.
const TRIES: u32 = 5;
const WAIT: Duration = Duration::from_secs(60);

impl Story {
    /// Each hostile provider in turn, in the very namespace of the honest one.
    pub(crate) fn attacks(&mut self) -> Result<()> {
        self.attack(
            "A provider that skips a block and says ok",
            "skips-a-block stores every block that changed but one, and returns success. The host keeps its own map \
             of what is in the archive:",
            NAMES[0],
            "no finished object",
        )?;
        self.attack(
            "A provider that wants the network",
            "imports-a-socket does honest work, but its component also imports a way to the network. What is not \
             granted is refused by name, before a line of it has run:",
            NAMES[1],
            "it imports `wasi:sockets/",
        )?;
        self.attack(
            "A provider that claims what it does not have",
            "claims-without-bytes says that it holds every block in a format of its own, stores nothing, and has \
             excuses when the host asks for the bytes back in a fresh instance, which the host always does:",
            NAMES[2],
            "cannot give it back",
        )
    }

    fn attack(&mut self, heading: &str, text: &str, provider: &str, refusal: &str) -> Result<()> {
        self.screen.chapter(heading);
        self.screen.say(text);
        self.scene.wait_for_changes()?;
        let (state, listed) = (self.scene.state()?, self.listed()?);
        let backup = [
            "backup",
            "web",
            "--provider",
            provider,
            "--config",
            "demo.toml",
        ];
        let outcome = self.programs.fleecebox(&mut self.screen, &backup)?;
        self.screen.gap();
        self.scene.drop_references()?;
        let refused = matches!(outcome.status.code(), Some(1 | 2)) && outcome.says(refusal);
        let status = outcome.status.code().unwrap_or_default();
        self.screen.check(
            refused,
            &format!("Refused, and it is said why; exit status {status}."),
        );
        let count = listed.len();
        self.screen.check(
            self.listed()? == listed,
            &format!("No backup appeared: the archive lists the same {count} as before."),
        );
        let differences = self.scene.state()?.differences(&state, |_| false);
        for difference in &differences {
            self.screen.fact(difference);
        }
        let held = self.scene.held()?;
        self.screen.check(
            differences.is_empty() && held == self.empty,
            &format!("QEMU is as before: {held}, the same bitmaps, as if nothing had been tried."),
        );
        self.check_guest()
    }

    /// Kills a job while its sandbox runs, with everything set up in QEMU.
    pub(crate) fn killed_half_way(&mut self) -> Result<()> {
        self.screen.chapter("A job that is killed half-way");
        self.screen.say(
            "kill -9 hits the job while its provider runs. Its own code can tidy up nothing then:",
        );
        for _ in 0..TRIES {
            self.scene.wait_for_changes()?;
            let backup = ["backup", "web", "--config", "demo.toml"];
            let mut running = self.programs.start(&mut self.screen, &backup)?;
            if let Some(during) = self.stop_half_way(&mut running)? {
                return self.kill_there(running, &during);
            }
            let screen = &mut self.screen;
            let outcome = running.finish(|line| screen.printed(line))?;
            if !outcome.status.success() {
                bail!("the backup failed ({})", outcome.status);
            }
            self.made += 1;
            self.scene.drop_references()?;
            self.screen.gap();
            self.screen
                .fact("It was done before it could be killed. Once more:");
        }
        bail!("no job could be killed half-way")
    }

    /// Stops the job when a sandbox runs and QEMU exports the snapshot, so that what is shown is what the kill meets.
    /// Gives what QEMU holds for it then, or nothing if it was quicker.
    fn stop_half_way(&self, running: &mut Running) -> Result<Option<Vec<String>>> {
        let deadline = Instant::now() + WAIT;
        while running.ended()?.is_none() && Instant::now() < deadline {
            if sandboxes(running).is_empty() || self.scene.held()?.exports == self.empty.exports {
                continue;
            }
            processes::signal(running.pid(), Signal::STOP);
            let during = self.scene.held()?;
            if !sandboxes(running).is_empty() && during.exports != self.empty.exports {
                return Ok(Some(during.beyond(&self.empty)));
            }
            processes::signal(running.pid(), Signal::CONT);
        }
        Ok(None)
    }

    fn kill_there(&mut self, mut running: Running, during: &[String]) -> Result<()> {
        let listed = self.listed()?;
        let sandboxes = sandboxes(&running);
        let pid = running.pid();
        running.kill()?;
        let screen = &mut self.screen;
        running.finish(|line| screen.printed(line))?;
        self.screen.command(&format!("kill -9 {pid}"));
        self.screen.gap();
        let ended = sandboxes
            .iter()
            .all(|sandbox| processes::ends(sandbox.pid, WAIT));
        self.screen.check(
            ended,
            "Its sandbox process, in which the provider ran, ended with it.",
        );
        self.scene.drop_references()?;
        let deadline = Instant::now() + WAIT;
        let mut left = self.scene.held()?.beyond(&self.empty);
        while !left.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            left = self.scene.held()?.beyond(&self.empty);
        }
        self.screen.check(
            left.is_empty(),
            "Its watchdog took out of QEMU all that the job had set up in it:",
        );
        for thing in during {
            self.screen.item(thing);
        }
        self.screen.check(
            self.listed()? == listed,
            "The archive lists no backup of this job.",
        );
        self.check_guest()
    }

    /// Kills a job between the freeze and the point in time.
    pub(crate) fn killed_while_frozen(&mut self) -> Result<()> {
        self.screen
            .chapter("A job that is killed while the guest is frozen");
        self.screen.say(
            "The worst moment: the guest's file systems are frozen, and who should thaw them is killed. Our relay holds \
             the job's transaction back, so that the moment can be met:",
        );
        self.scene.wait_for_changes()?;
        self.scene.proxy().inject(Fault {
            at: At::Named("transaction", self.transactions() + 1),
            stage: Stage::BeforeQemu,
            what: What::Hold,
        });
        let backup = ["backup", "web", "--config", "demo.toml"];
        let mut running = self.programs.start(&mut self.screen, &backup)?;
        let held = self.scene.proxy().wait_held(WAIT)?;
        let guest = self.scene.guest().context("only a guest can be frozen")?;
        // What was under way is still reported.
        let _ = guest.wait_for_writes_within(Duration::from_millis(500));
        let still = guest
            .wait_for_writes_within(Duration::from_secs(2))
            .is_err();
        let pid = running.pid();
        running.kill()?;
        let killed = Instant::now();
        held.cut();
        let writes = guest.wait_for_writes_within(WAIT).is_ok();
        let seconds = killed.elapsed().as_secs_f64();
        let screen = &mut self.screen;
        running.finish(|line| screen.printed(line))?;
        self.screen.command(&format!("kill -9 {pid}"));
        self.screen.gap();
        self.screen.check(
            still,
            "Until then the guest was frozen: no write came for two seconds.",
        );
        self.screen.check(
            writes,
            &format!(
                "The job's watchdog, a process of its own, thawed it: {seconds:.1} s after the kill the guest had done \
                 further 50 writes on each disk."
            ),
        );
        self.scene.drop_references()?;
        self.check_guest()
    }

    /// How many the relay has seen.
    fn transactions(&self) -> usize {
        let commands = self.scene.proxy().commands();
        commands
            .iter()
            .filter(|name| *name == "transaction")
            .count()
    }
}

/// The processes in which the job's provider runs.
fn sandboxes(job: &Running) -> Vec<Process> {
    let mut below = processes::below(job.pid());
    below.retain(|process| process.command_line.contains("sandbox-process"));
    below
}
