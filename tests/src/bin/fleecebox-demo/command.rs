//! Running programs in sight of the reader: the command as it could be typed, then what it says as it says it.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::screen::Screen;

/// Far beyond what any of them takes, so that a hang is an error.
const LIMIT: Duration = Duration::from_secs(180);

/// The programs, and the folder that they run in.
#[derive(Debug)]
pub(crate) struct Programs {
    /// The product, built beside this program.
    fleecebox: PathBuf,
    /// Holds all that the demonstration makes.
    pub(crate) folder: PathBuf,
}

/// How a program ended and what it printed.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Its exit status.
    pub(crate) status: ExitStatus,
    /// Standard output and standard error, line by line, as they came.
    pub(crate) lines: Vec<String>,
}

impl Outcome {
    /// Whether a line holds `text`.
    pub(crate) fn says(&self, text: &str) -> bool {
        self.lines.iter().any(|line| line.contains(text))
    }
}

/// A program that has been started.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    output: Receiver<String>,
}

impl Programs {
    /// Finds `fleecebox` beside this program.
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        let fleecebox = std::env::current_exe()?.with_file_name("fleecebox");
        if !fleecebox.is_file() {
            bail!(
                "{} is not there; `make demo` builds it",
                fleecebox.display()
            );
        }
        Ok(Self {
            fleecebox,
            folder: folder.into(),
        })
    }

    /// Shows and starts `fleecebox`.
    pub(crate) fn start(&self, screen: &mut Screen, arguments: &[&str]) -> Result<Running> {
        screen.command(&format!("fleecebox {}", arguments.join(" ")));
        Running::start(self.command(self.fleecebox.as_os_str(), arguments))
    }

    /// Shows and runs `fleecebox`.
    pub(crate) fn fleecebox(&self, screen: &mut Screen, arguments: &[&str]) -> Result<Outcome> {
        self.start(screen, arguments)?
            .finish(|line| screen.printed(line))
    }

    /// Runs `fleecebox` without showing it, for what only the demonstration wants to know.
    pub(crate) fn quietly(&self, arguments: &[&str]) -> Result<Outcome> {
        Running::start(self.command(self.fleecebox.as_os_str(), arguments))?.finish(|_| {})
    }

    /// Shows and runs another program, and shows the last line of what it printed.
    pub(crate) fn tool(
        &self,
        screen: &mut Screen,
        name: &str,
        arguments: &[&str],
    ) -> Result<Outcome> {
        screen.command(&format!("{name} {}", arguments.join(" ")));
        let outcome = Running::start(self.command(OsStr::new(name), arguments))?.finish(|_| {})?;
        match outcome.status.success() {
            true => outcome.lines.last(),
            false => None,
        }
        .map_or(&outcome.lines[..], std::slice::from_ref)
        .iter()
        .for_each(|line| screen.printed(line));
        Ok(outcome)
    }

    fn command(&self, program: &OsStr, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        // Debian keeps e2fsck where a user's PATH does not look.
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(arguments)
            .current_dir(&self.folder)
            .env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command
    }
}

impl Running {
    fn start(mut command: Command) -> Result<Self> {
        // One pipe for both, so that lines come in the order in which they were printed.
        let (reader, writer) = std::io::pipe()?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let (lines, output) = channel();
        std::thread::spawn(move || {
            // An error of a pipe is its end, and so is that nobody listens.
            let mut texts = BufReader::new(reader).lines().map_while(Result::ok);
            while texts.next().is_some_and(|text| lines.send(text).is_ok()) {}
        });
        Ok(Self { child, output })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Its exit status, if it has ended.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Kills it, and no other process, with SIGKILL.
    pub(crate) fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill()?)
    }

    /// Shows what it prints until it and all that hold its output have ended.
    pub(crate) fn finish(mut self, mut show: impl FnMut(&str)) -> Result<Outcome> {
        let deadline = Instant::now() + LIMIT;
        let mut lines = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(line) => {
                    show(&line);
                    lines.push(line);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    bail!("a command did not end within {LIMIT:?}");
                }
            }
        }
        let status = self.child.wait()?;
        Ok(Outcome { status, lines })
    }
}
