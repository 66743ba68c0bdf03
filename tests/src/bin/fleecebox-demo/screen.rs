//! What the reader sees: a calm page of [`WIDTH`] columns, with colours on a terminal only.

use std::io::{IsTerminal, Write};

/// Columns, so that it reads well in a usual terminal and in a log.
const WIDTH: usize = 96;

/// The page. Output that nobody reads any more (`| head`) is no error.
#[derive(Debug)]
pub(crate) struct Screen {
    colour: bool,
    chapters: u32,
    broken: Vec<String>,
    checks: u32,
}

#[derive(Clone, Copy)]
enum Style {
    Plain,
    Bold,
    Faint,
    Good,
    Bad,
    Command,
}

impl Screen {
    /// Starts the page on standard output.
    pub(crate) fn new() -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let able = std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        Self {
            colour: wanted && able && std::io::stdout().is_terminal(),
            chapters: 0,
            broken: Vec::new(),
            checks: 0,
        }
    }

    /// The head of the page.
    pub(crate) fn title(&mut self, text: &str) {
        self.line("", Style::Bold, text);
        self.line("", Style::Faint, &"─".repeat(WIDTH));
    }

    /// A new chapter, with a number.
    pub(crate) fn chapter(&mut self, heading: &str) {
        self.chapters += 1;
        let heading = format!("{}  {heading}", self.chapters);
        self.gap();
        self.line("", Style::Bold, &heading);
        self.line("", Style::Faint, &"─".repeat(WIDTH));
    }

    /// Says what is going on.
    pub(crate) fn say(&mut self, text: &str) {
        for line in wrapped(text, WIDTH) {
            self.line("", Style::Plain, &line);
        }
    }

    /// An empty line.
    pub(crate) fn gap(&mut self) {
        self.line("", Style::Plain, "");
    }

    /// A command, as it could be typed.
    pub(crate) fn command(&mut self, text: &str) {
        self.gap();
        let lines = wrapped(text, WIDTH - 8);
        for (index, line) in lines.iter().enumerate() {
            let prompt = if index == 0 { "  $ " } else { "      " };
            let more = if index + 1 == lines.len() { "" } else { " \\" };
            self.line(prompt, Style::Command, &format!("{line}{more}"));
        }
    }

    /// A line that a program printed, or one of a file that is shown.
    pub(crate) fn printed(&mut self, text: &str) {
        // Two columns are kept for the indent of what does not fit into one line.
        for (index, line) in wrapped(text, WIDTH - 6).iter().enumerate() {
            let indent = if index == 0 { "  │ " } else { "  │   " };
            self.line(indent, Style::Faint, line);
        }
    }

    /// One of several things that a check is about.
    pub(crate) fn item(&mut self, text: &str) {
        self.bullet("      ", Style::Plain, text);
    }

    /// A fact that was looked up.
    pub(crate) fn fact(&mut self, text: &str) {
        self.bullet("  · ", Style::Plain, text);
    }

    /// Something that must be so. If it is not, the demonstration fails in the end.
    pub(crate) fn check(&mut self, is_so: bool, text: &str) {
        self.checks += 1;
        if is_so {
            self.bullet("  ✓ ", Style::Good, text);
        } else {
            self.bullet("  ✗ NOT SO: ", Style::Bad, text);
            self.broken.push(text.into());
        }
    }

    /// How many checks there were.
    pub(crate) fn checks(&self) -> u32 {
        self.checks
    }

    /// What was not as it should be.
    pub(crate) fn broken(&self) -> &[String] {
        &self.broken
    }

    fn bullet(&mut self, sign: &str, style: Style, text: &str) {
        let indent = sign.chars().count();
        for (index, line) in wrapped(text, WIDTH - indent).iter().enumerate() {
            let blank = " ".repeat(indent);
            self.line(if index == 0 { sign } else { &blank }, style, line);
        }
    }

    fn line(&mut self, before: &str, style: Style, text: &str) {
        let code = match style {
            Style::Plain => "",
            Style::Bold => "1",
            Style::Faint => "2",
            Style::Good => "32",
            Style::Bad => "1;31",
            Style::Command => "1;36",
        };
        let mut out = std::io::stdout().lock();
        let _ = if self.colour && !code.is_empty() && !text.is_empty() {
            writeln!(out, "\x1b[{code}m{before}{text}\x1b[0m")
        } else {
            writeln!(out, "{before}{text}")
        };
    }
}

/// Broken at spaces into lines of at most `width` characters, where the words allow it.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let indent: String = text.chars().take_while(|&c| c == ' ').collect();
    let mut lines = Vec::new();
    let mut line = indent;
    let mut empty = true;
    for word in text.trim_start().split(' ') {
        if !empty && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut line));
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_is_lost_and_no_line_too_long() {
        let text = "  one two three  four";
        assert_eq!(wrapped(text, 9), ["  one two", "three ", "four"]);
        assert_eq!(wrapped("unbreakable", 4), ["unbreakable"]);
        assert_eq!(wrapped("", 4), [""]);
    }
}
