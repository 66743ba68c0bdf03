//! Lines for people and scripts. The standard library's own macros panic when nobody reads any more (`| head`, a terminal
//! that is gone), and what was done is done all the same.

use super::lines::{self, Line};
use crate::terminal;
use std::io::{Write, stderr};

/// A line on standard error, harmless whatever it holds.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::output::say(format!($($text)*)) };
}

/// As `say!`, of what needs attention.
macro_rules! warn {
    ($($text:tt)*) => { $crate::cli::output::warn(format!($($text)*)) };
}

/// A line of the result, on standard output, or a document of several; harmless too.
macro_rules! show {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let lines = $crate::terminal::lines(&format!($($text)*));
        let _ = writeln!(std::io::stdout(), "{lines}");
    }};
}

pub(super) fn say(text: String) {
    match lines::asked_for() {
        Some(lines) => lines.tell(Line::Note { text }),
        None => print(&text),
    }
}

pub(super) fn warn(text: String) {
    match lines::asked_for() {
        Some(lines) => lines.tell(Line::Warning { text }),
        None => print(&format!("warning: {text}")),
    }
}

/// Why the command fails.
pub(super) fn fail(text: String) {
    match lines::asked_for() {
        Some(lines) => lines.tell(Line::Error { text }),
        None => print(&format!("fleecebox: {text}")),
    }
}

/// That the command ends so. Nothing is said after it.
pub(super) fn end(exit_status: u8) {
    if let Some(lines) = lines::asked_for() {
        lines.end(exit_status);
    }
}

fn print(text: &str) {
    let _ = writeln!(stderr(), "{}", terminal::one_line(text));
}
