//! Running the product.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::eventually;

/// No job of a test takes longer, so that a hang is a failure and not the end of the test run.
const RUN_LIMIT: Duration = Duration::from_secs(300);
/// For the processes of a job that ended, to end themselves.
const FAMILY_LIMIT: Duration = Duration::from_secs(5);
/// In the environment of each run, to find processes that left the run's process group.
const MARK: &str = "FLEECEBOX_TEST_RUN";
/// How `/proc/PID/limits` calls a limit that Linux keeps and inherits but never applies (RLIMIT_LOCKS, getrlimit(2)):
/// it marks processes of a run that also cleared their environment, as sandboxes and watchdogs do.
const MARK_LIMIT: &str = "Max file locks";
/// What a Rust program prints when it breaks instead of failing.
const SIGNS_OF_A_CRASH: [&str; 3] = ["panicked at", "stack backtrace:", "RUST_BACKTRACE"];

/// A command line of the product.
#[derive(Clone, Debug)]
pub struct Fleecebox {
    program: Option<PathBuf>,
    arguments: Vec<OsString>,
    folder: Option<PathBuf>,
    environment: Vec<(OsString, OsString)>,
    without_capabilities: Option<&'static str>,
    processor_seconds: Option<u64>,
    wrapper: Vec<OsString>,
}

impl Fleecebox {
    /// `fleecebox` with these arguments, in the test's own folder and environment.
    pub fn new<A: Into<OsString>>(arguments: impl IntoIterator<Item = A>) -> Self {
        let arguments = arguments.into_iter().map(Into::into).collect();
        Self {
            program: None,
            arguments,
            folder: None,
            environment: Vec::new(),
            without_capabilities: None,
            processor_seconds: None,
            wrapper: Vec::new(),
        }
    }

    /// Is started by this program, which is given its command line, as `nice` would be.
    #[must_use]
    pub fn started_by<A: Into<OsString>>(mut self, wrapper: impl IntoIterator<Item = A>) -> Self {
        self.wrapper = wrapper.into_iter().map(Into::into).collect();
        self
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Runs in this folder.
    #[must_use]
    pub fn in_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Root, too, is bound by permission bits in it: without the capabilities to pass over them.
    #[must_use]
    pub fn bound_by_permissions(mut self) -> Self {
        if rustix::process::geteuid().is_root() {
            self.without_capabilities = Some("-dac_override,-dac_read_search");
        }
        self
    }

    /// Each of its processes may use the processor for so many seconds (RLIMIT_CPU, getrlimit(2)).
    #[must_use]
    pub fn limited_to(mut self, processor_seconds: u64) -> Self {
        self.processor_seconds = Some(processor_seconds);
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be started or takes longer than five minutes.
    ///
    /// # Panics
    /// As [`Running::finish`].
    pub fn run(&self) -> Result<Outcome> {
        self.start()?.finish()
    }

    /// Starts it.
    ///
    /// # Errors
    /// When the binary is not built.
    pub fn start(&self) -> Result<Running> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{}-{run}", std::process::id());
        let binary = match &self.program {
            Some(program) => program.clone(),
            None => target_folder()?.join("release/fleecebox"),
        };
        if !binary.is_file() {
            bail!(
                "{} is missing: build the product before its tests",
                binary.display()
            );
        }
        // Each of these becomes the next by an exec: the limit is in place before the product's first instruction.
        let mut command = Command::new("prlimit");
        command.arg(format!("--locks={0}:{0}", mark_number(run)));
        if let Some(seconds) = self.processor_seconds {
            command.arg(format!("--cpu={seconds}:{}", seconds + 1));
        }
        if let Some(capabilities) = self.without_capabilities {
            command
                .args(["setpriv", "--bounding-set"])
                .arg(capabilities);
        }
        command.args(&self.wrapper);
        command.arg(binary);
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env(MARK, &mark)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        let output = Arc::new(Output::default());
        let readers = [
            child
                .stdout
                .take()
                .map(|pipe| output.collect(Stream::Out, pipe)),
            child
                .stderr
                .take()
                .map(|pipe| output.collect(Stream::Err, pipe)),
        ];
        let readers = readers.into_iter().flatten().collect();
        let mark = Mark {
            leader: child.id().cast_signed(),
            environment: format!("{MARK}={mark}"),
            limit: mark_number(run).to_string(),
        };
        Ok(Running {
            child,
            mark,
            started,
            output,
            readers,
        })
    }
}

/// Where a provider's built component lies, by its crate's name, as in `chunked`.
///
/// # Errors
/// When it is not built.
pub fn component(name: &str) -> Result<PathBuf> {
    let path = target_folder()?.join(format!("components/{name}.wasm"));
    if !path.is_file() {
        bail!(
            "{} is missing: build the providers before the tests",
            path.display()
        );
    }
    Ok(path)
}

/// A run that has not been waited for. Dropping it kills all of its processes.
#[derive(Debug)]
pub struct Running {
    child: Child,
    mark: Mark,
    started: Instant,
    output: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
}

/// How a run's processes are known.
#[derive(Debug)]
struct Mark {
    leader: i32,
    environment: String,
    limit: String,
}

/// Unique among all runs on this machine: a process id has at most 22 bits (proc_pid_max(5)).
fn mark_number(run: u32) -> u64 {
    (u64::from(std::process::id()) << 32) | u64::from(run)
}

/// A process of a run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its arguments, with spaces between them.
    pub command_line: String,
}

impl Process {
    /// Whether it is one that acts when its job dies.
    fn is_watchdog(&self) -> bool {
        self.command_line.contains("__watchdog")
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    /// When it is gone.
    pub fn kill(&self) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid).context("no such process")?;
        Ok(rustix::process::kill_process(
            pid,
            rustix::process::Signal::KILL,
        )?)
    }
}

impl Running {
    /// The first line, of either stream, past or to come, that `wanted` accepts.
    ///
    /// # Errors
    /// When the run ends, or `limit` passes, without such a line; with what it printed.
    pub fn wait_for_line(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + limit;
        let mut seen = 0;
        let mut printed = self.output.lock();
        loop {
            if let Some((_, line)) = printed.lines[seen..].iter().find(|(_, line)| wanted(line)) {
                return Ok(line.clone());
            }
            seen = printed.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || printed.ended == self.readers.len() {
                bail!(
                    "the line did not come within {limit:?}:\n{}",
                    printed.text(|_| true)
                );
            }
            printed = match self.output.changed.wait_timeout(printed, left) {
                Ok((printed, _)) => printed,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// The first line on standard output that is a JSON object which `wanted` accepts: an event
    /// of `--json`.
    ///
    /// # Errors
    /// As [`Running::wait_for_line`].
    pub fn wait_for_event(
        &self,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let parse = |line: &str| {
            serde_json::from_str::<Value>(line)
                .ok()
                .filter(Value::is_object)
        };
        let line = self.wait_for_line(limit, |line| {
            parse(line).is_some_and(|event| wanted(&event))
        })?;
        parse(&line).context("the line was JSON a moment ago")
    }

    /// The job process.
    pub fn process(&self) -> Process {
        let pid = self.child.id().cast_signed();
        Process {
            pid,
            command_line: command_line(pid),
        }
    }

    /// All other processes of this run that live but its watchdog: its sandboxes.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn family(&self) -> Result<BTreeSet<Process>> {
        let leader = self.mark.leader;
        Ok(family(&self.mark)?
            .into_iter()
            .filter(|process| process.pid != leader && !process.is_watchdog())
            .collect())
    }

    /// Kills the job process with SIGKILL, and before it its watchdog, which would do something about it: as the end of
    /// a control group or a loss of power does. Waits until the others of its run have ended by themselves.
    ///
    /// # Errors
    /// When they have not within five seconds.
    ///
    /// # Panics
    /// As [`Running::finish`].
    pub fn kill(mut self) -> Result<Outcome> {
        self.kill_watchdogs()?;
        self.child.kill()?;
        // One may have been on its way.
        eventually("no watchdog", FAMILY_LIMIT, || {
            Ok((self.kill_watchdogs()? == 0).then_some(()))
        })?;
        let outcome = self.outcome()?;
        outcome.assert_unbroken();
        Ok(outcome)
    }

    /// Returns how many there were.
    fn kill_watchdogs(&self) -> Result<usize> {
        let family = family(&self.mark)?.into_iter();
        let watchdogs: Vec<_> = family.filter(Process::is_watchdog).collect();
        for watchdog in &watchdogs {
            // Gone already is what we want.
            let _ = watchdog.kill();
        }
        Ok(watchdogs.len())
    }

    /// Kills the job process, and it alone, with SIGKILL, and waits for its other processes as [`Running::kill`].
    ///
    /// # Errors
    /// As [`Running::kill`].
    ///
    /// # Panics
    /// As [`Running::finish`].
    pub fn kill_alone(mut self) -> Result<Outcome> {
        self.child.kill()?;
        let outcome = self.outcome()?;
        outcome.assert_unbroken();
        Ok(outcome)
    }

    /// Waits for the end of the job process, whose watchdog may go on, and gives its exit code.
    ///
    /// # Errors
    /// When it takes longer than five minutes.
    pub fn wait_for_the_job(&mut self) -> Result<Option<i32>> {
        let ended = eventually("fleecebox to end", RUN_LIMIT, || {
            Ok(self.child.try_wait()?)
        })?;
        Ok(ended.code())
    }

    /// What was printed on standard error so far. What a process wrote may come after its end is seen:
    /// [`Running::wait_for_line`] first.
    pub fn said(&self) -> String {
        self.output.lock().text(|stream| stream == Stream::Err)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it takes longer than five minutes, or its other processes outlive it by five seconds.
    ///
    /// # Panics
    /// If it panicked or printed a backtrace.
    pub fn finish(self) -> Result<Outcome> {
        let outcome = self.finish_broken()?;
        outcome.assert_unbroken();
        Ok(outcome)
    }

    /// As [`Running::finish`], for a job that is made to panic.
    ///
    /// # Errors
    /// As [`Running::finish`].
    pub fn finish_broken(mut self) -> Result<Outcome> {
        let ended = eventually("fleecebox to end", RUN_LIMIT, || {
            Ok(self.child.try_wait()?)
        });
        if let Err(error) = ended {
            return Err(error.context(self.output.lock().text(|_| true)));
        }
        self.outcome()
    }

    fn outcome(&mut self) -> Result<Outcome> {
        let status = self.child.wait()?;
        let took = self.started.elapsed();
        eventually("the job's other processes to end", FAMILY_LIMIT, || {
            Ok(family(&self.mark)?.is_empty().then_some(()))
        })
        .with_context(|| format!("left behind: {:?}", family(&self.mark)))?;
        for reader in self.readers.drain(..) {
            // A reader that panicked has nothing more to give.
            let _ = reader.join();
        }
        let printed = self.output.lock();
        let stdout = printed.text(|stream| stream == Stream::Out);
        let stderr = printed.text(|stream| stream == Stream::Err);
        Ok(Outcome {
            status,
            stdout,
            stderr,
            took,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for process in family(&self.mark).unwrap_or_default() {
            let _ = process.kill();
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    status: ExitStatus,
    /// All of standard output.
    pub stdout: String,
    /// All of standard error.
    pub stderr: String,
    /// From the start to the end.
    pub took: Duration,
}

impl Outcome {
    #[track_caller]
    fn assert_unbroken(&self) {
        let Self { status, stderr, .. } = self;
        let crash = SIGNS_OF_A_CRASH.iter().find(|sign| stderr.contains(**sign));
        assert!(crash.is_none(), "fleecebox broke ({status}):\n{stderr}");
    }

    /// The exit code; `None` if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// The JSON document that standard output is: the result, or the error, of `--json`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn document(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("not one JSON document:\n{}\n{}", self.stdout, self.stderr))
    }

    /// The JSON objects on standard output, one a line, as `--json` prints them.
    pub fn events(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).ok();
        self.stdout
            .lines()
            .filter_map(parse)
            .filter(Value::is_object)
            .collect()
    }

    /// Panics, with what was printed, unless the exit code is 0.
    #[track_caller]
    pub fn assert_success(self) -> Self {
        assert!(
            self.status.success(),
            "{}\n{}{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Panics unless it ended with this code and one line on standard error that contains `name`:
    /// the form of an error that is the caller's.
    #[track_caller]
    pub fn assert_refused(self, code: i32, name: &str) -> Self {
        let (stdout, stderr) = (&self.stdout, &self.stderr);
        let status = self.status;
        assert_eq!(status.code(), Some(code), "{status}\n{stdout}{stderr}");
        // What a system does not offer of the confinement is said besides, on that system.
        let lines = stderr.lines().filter(|line| {
            !line.starts_with("warning: this system does not confine the provider fully")
        });
        assert_eq!(lines.count(), 1, "not one line:\n{stderr}");
        assert!(stderr.contains(name), "{name:?} is not named:\n{stderr}");
        self
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

#[derive(Debug, Default)]
struct Output {
    printed: Mutex<Printed>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Printed {
    lines: Vec<(Stream, String)>,
    ended: usize,
}

impl Output {
    fn collect(
        self: &Arc<Self>,
        stream: Stream,
        pipe: impl Read + Send + 'static,
    ) -> JoinHandle<()> {
        let output = Arc::clone(self);
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            // An error of a pipe is its end.
            while pipe
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line));
                output.lock().lines.push((stream, text.into_owned()));
                output.changed.notify_all();
                line.clear();
            }
            output.lock().ended += 1;
            output.changed.notify_all();
        })
    }

    fn lock(&self) -> MutexGuard<'_, Printed> {
        // No value here is left half-changed by a panic.
        self.printed
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Printed {
    fn text(&self, of: impl Fn(Stream) -> bool) -> String {
        let lines = self.lines.iter().filter(|(stream, _)| of(*stream));
        lines.map(|(_, line)| format!("{line}\n")).collect()
    }
}

/// The folder that cargo builds into: tests lie in its `release/deps`, other programs in its `release`.
pub(crate) fn target_folder() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let mut above = program.ancestors().skip(1);
    let release = above.find(|folder| !folder.ends_with("deps"));
    let folder = release.and_then(Path::parent);
    Ok(folder
        .with_context(|| format!("{} is in no target folder", program.display()))?
        .into())
}

/// The living processes of the leader's process group and those that carry a mark.
fn family(mark: &Mark) -> Result<BTreeSet<Process>> {
    let mut family = BTreeSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A process that went meanwhile is none of the living.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let Some((state, group)) = state_and_group(&stat) else {
            continue;
        };
        if matches!(state, 'Z' | 'X') {
            continue;
        }
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let marked = environment
            .split(|&byte| byte == 0)
            .any(|entry| entry == mark.environment.as_bytes());
        if group == mark.leader || marked || limit(pid).is_some_and(|limit| limit == mark.limit) {
            family.insert(Process {
                pid,
                command_line: command_line(pid),
            });
        }
    }
    Ok(family)
}

/// The limit that marks a process: `Max file locks  SOFT  HARD  locks`.
fn limit(pid: i32) -> Option<String> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix(MARK_LIMIT))?;
    line.split_whitespace().next().map(String::from)
}

/// From `/proc/PID/stat`: `pid (name) state parent group …`, where the name may hold anything.
fn state_and_group(stat: &str) -> Option<(char, i32)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(1)?.parse().ok()?))
}

fn command_line(pid: i32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .replace('\0', " ")
        .trim_end()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell in place of the product.
    fn shell(script: &str) -> Fleecebox {
        Fleecebox {
            program: Some("/bin/sh".into()),
            ..Fleecebox::new(["-c", script])
        }
    }

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn output_and_exit_code_are_kept_apart() {
        let outcome = shell("echo out; echo '{\"a\":1}'; echo unknown VM x >&2; exit 2")
            .run()
            .unwrap();
        assert_eq!((outcome.code(), outcome.signal()), (Some(2), None));
        assert_eq!(outcome.stdout, "out\n{\"a\":1}\n");
        assert_eq!(outcome.events(), [serde_json::json!({"a": 1})]);
        outcome.assert_refused(2, "x");
    }

    #[test]
    fn a_line_is_waited_for_and_the_job_killed_there() {
        let running = shell("echo ready; sleep 60 & wait").start().unwrap();
        assert_eq!(
            running
                .wait_for_line(SOON, |line| line.contains("ready"))
                .unwrap(),
            "ready"
        );
        // Between fork and exec it has another command line, or none.
        let is_sleep = |process: &Process| process.command_line.starts_with("sleep 60");
        let child = || Ok(running.family()?.into_iter().find(is_sleep));
        eventually("the child", SOON, child).unwrap();
        for process in running.family().unwrap() {
            process.kill().unwrap();
        }
        let outcome = running.kill();
        // The shell may have ended by itself when its child was killed.
        assert!(outcome.is_ok(), "{outcome:?}");
    }

    #[test]
    fn a_line_that_never_comes_is_an_error_with_what_came() {
        let running = shell("echo something else").start().unwrap();
        let error = running
            .wait_for_line(SOON, |line| line == "ready")
            .unwrap_err();
        assert!(error.to_string().contains("something else"));
    }

    #[test]
    fn a_process_that_outlives_the_job_is_found_though_it_left_the_group_and_its_environment() {
        let running = shell("setsid env -i sleep 60 >/dev/null 2>&1 & echo started")
            .start()
            .unwrap();
        running
            .wait_for_line(SOON, |line| line == "started")
            .unwrap();
        let error = running.finish().unwrap_err();
        assert!(format!("{error:#}").contains("sleep 60"), "{error:#}");
    }

    #[test]
    #[should_panic(expected = "fleecebox broke")]
    fn a_panic_of_the_product_fails_the_test() {
        let _ = shell("echo \"thread 'main' panicked at src/main.rs\" >&2; exit 101").run();
    }

    #[test]
    fn the_group_is_read_behind_a_strange_name() {
        assert_eq!(
            state_and_group("12 (a) R (b)) S 1 77 77 0"),
            Some(('S', 77))
        );
    }
}
