//! `--progress json`: all that a command tells on standard error, as JSON, one object a line.
//!
//! A thread of its own writes, so that a reader that does not read holds up no job, and no point in time of a VM. What is
//! left out then is progress, which the next such line makes up for, and what others than the command wrote; it is counted.
//!
//! Others are its child processes, the commands that start and stop a VM, and the standard library in a panic. What they write to
//! standard error comes through a pipe, and is a line like all others.

use crate::terminal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::stdio::dup2_stderr;
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

/// Of the lines. It grows where a reader of an older one would misunderstand them; events and fields that it may pass over
/// come without.
const VERSION: u32 = 1;

/// Longest line in bytes, its end included: a pipe takes it whole or not at all (PIPE_BUF, pipe(7)), so that not even a
/// kill leaves half of one.
const LONGEST: usize = 4096;

/// Lines that wait for a reader before progress is left out.
const AHEAD: usize = 8;

/// Lines that wait for a reader before what others write is left out, which has no bound of its own.
const OTHERS_AHEAD: usize = 1024;

/// How long a reader is waited for at the end.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How long those are waited for at the end who hold our standard error as theirs.
const LAST_OTHERS: Duration = Duration::from_millis(200);

/// The process has one standard error, and so one of these.
static LINES: OnceLock<Lines> = OnceLock::new();

/// What a line tells.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(super) enum Line {
    /// The first.
    Begin {
        /// [`VERSION`].
        version: u32,
        /// Such as `backup`.
        command: &'static str,
    },
    /// The job reached this step.
    Step { step: &'static str },
    /// A decision or a finding.
    Note { text: String },
    /// A finding that needs attention.
    Warning { text: String },
    /// What the provider logged.
    Provider {
        volume: String,
        level: &'static str,
        text: String,
    },
    /// How far a volume is; the last one of each is never left out.
    Progress {
        volume: String,
        done_bytes: u64,
        total_bytes: u64,
    },
    /// What another process wrote to this one's standard error, or the standard library.
    Stderr { text: String },
    /// Why the command failed.
    Error { text: String },
    /// The last.
    End {
        exit_status: u8,
        /// Of progress and of others, for a reader that did not read.
        dropped_lines: u64,
    },
}

/// The end that lines are given to.
#[derive(Debug)]
pub(super) struct Lines {
    queue: Sender<Line>,
    waiting: Arc<AtomicUsize>,
    dropped: AtomicU64,
    /// What standard error was.
    stderr: OwnedFd,
    /// Closed once nobody else can write any more.
    heard: Mutex<Receiver<()>>,
    /// Closed once the last line is written.
    written: Mutex<Receiver<()>>,
}

/// The lines, where they were asked for.
pub(super) fn asked_for() -> Option<&'static Lines> {
    LINES.get()
}

/// From here on nothing but lines is written to standard error.
pub(super) fn begin(command: &'static str) -> io::Result<()> {
    let stderr = fcntl_dupfd_cloexec(io::stderr(), 0)?;
    let (others, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    let (queue, lines) = mpsc::channel();
    let (hearing, heard) = mpsc::channel();
    let (writing, written) = mpsc::channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    let left = Arc::clone(&waiting);
    let file = File::from(stderr.try_clone()?);
    thread::Builder::new()
        .name("lines".into())
        .spawn(move || write(file, lines, &left, writing))?;
    let begun = LINES.get_or_init(|| Lines {
        queue,
        waiting,
        dropped: AtomicU64::new(0),
        stderr,
        heard: Mutex::new(heard),
        written: Mutex::new(written),
    });
    begun.tell(Line::Begin {
        version: VERSION,
        command,
    });
    thread::Builder::new()
        .name("others".into())
        .spawn(move || hear(others, begun, hearing))?;
    Ok(dup2_stderr(theirs)?)
}

impl Lines {
    /// Tells it, however late.
    pub(super) fn tell(&self, line: Line) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // The thread is gone after the last line alone.
        let _ = self.queue.send(line);
    }

    /// Whether the reader is so far behind that `lines` of progress are left out.
    pub(super) fn drops(&self, lines: usize) -> bool {
        self.is_behind(AHEAD) && {
            self.dropped.fetch_add(lines as u64, Ordering::Relaxed);
            true
        }
    }

    fn is_behind(&self, most: usize) -> bool {
        self.waiting.load(Ordering::Relaxed) >= most
    }

    /// Tells what others wrote last and the last line, and waits for what can still be written.
    pub(super) fn end(&self, exit_status: u8) {
        if dup2_stderr(&self.stderr).is_ok() {
            wait(&self.heard, LAST_OTHERS);
        }
        self.tell(Line::End {
            exit_status,
            dropped_lines: self.dropped.load(Ordering::Relaxed),
        });
        wait(&self.written, LAST_WORDS);
    }
}

/// Until the other end is closed.
fn wait(end: &Mutex<Receiver<()>>, limit: Duration) {
    let end = end.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = end.recv_timeout(limit);
}

/// Writes all lines up to the last. Where nobody reads any more, they go nowhere.
fn write(mut stderr: File, lines: Receiver<Line>, waiting: &AtomicUsize, _writing: Sender<()>) {
    let mut is_read = true;
    for line in lines {
        let is_last = matches!(line, Line::End { .. });
        is_read = is_read && write_all(&mut stderr, rendered(line).as_bytes()).is_ok();
        waiting.fetch_sub(1, Ordering::Relaxed);
        if is_last {
            return;
        }
    }
}

/// As [`Write::write_all`], also where whoever started us made the file one that does not block.
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(file, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes lines of what others write. It never waits for our reader, so that nobody who writes waits for it.
fn hear(others: OwnedFd, lines: &Lines, _hearing: Sender<()>) {
    let mut others = BufReader::new(File::from(others));
    let mut heard = Vec::new();
    loop {
        heard.clear();
        let mut line = others.by_ref().take(LONGEST as u64);
        match line.read_until(b'\n', &mut heard) {
            Ok(1..) => {}
            _ => return,
        }
        if lines.is_behind(OTHERS_AHEAD) {
            lines.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let text = String::from_utf8_lossy(&heard).trim_end().to_owned();
        lines.tell(Line::Stderr { text });
    }
}

/// As it is written. Where it would be too long its text is cut, and ends with `…`.
fn rendered(mut line: Line) -> String {
    loop {
        let json = serde_json::to_string(&line).unwrap_or_default();
        let shown = terminal::lines(&json) + "\n";
        match line.text() {
            Some(text) if shown.len() > LONGEST => {
                text.truncate(text.floor_char_boundary(text.len() / 4 * 3));
                text.push('…');
            }
            _ => return shown,
        }
    }
}

impl Line {
    fn text(&mut self) -> Option<&mut String> {
        match self {
            Self::Note { text }
            | Self::Warning { text }
            | Self::Provider { text, .. }
            | Self::Stderr { text }
            | Self::Error { text } => Some(text),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn a_text_that_is_too_long_is_cut_and_steers_no_terminal() {
        for text in [
            "ä".repeat(9000),
            "\u{9b}\n\"".repeat(4000),
            "x".repeat(LONGEST),
        ] {
            let shown = rendered(Line::Note { text: text.clone() });
            assert!(
                shown.len() <= LONGEST && shown.len() > LONGEST / 2,
                "{}",
                shown.len()
            );
            assert!(shown.ends_with("}\n") && !shown.contains('\u{9b}'));
            let read: Value = serde_json::from_str(&shown).unwrap();
            let kept = read["text"].as_str().unwrap();
            assert!(text.starts_with(kept.strip_suffix('…').unwrap()));
        }
        let whole = rendered(Line::Step { step: "snapshot" });
        assert_eq!(whole, "{\"event\":\"step\",\"step\":\"snapshot\"}\n");
    }
}
