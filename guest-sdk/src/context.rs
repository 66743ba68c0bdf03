//! The job, as far as a provider may know it.

use std::fmt::Display;

use serde::de::DeserializeOwned;

use crate::Error;
use crate::imports::job;

/// How much a line of the log matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// For the provider's author.
    Debug,
    /// Progress worth keeping.
    Info,
    /// Something is odd; the backup goes on.
    Warn,
    /// Something failed.
    Error,
}

/// The job: its id, the provider's settings, what the operator attached, and the log.
#[derive(Debug)]
pub struct Context {
    handle: job::Context,
}

impl Context {
    pub(crate) fn new(handle: job::Context) -> Context {
        Context { handle }
    }

    /// Opaque and unique.
    pub fn id(&self) -> String {
        self.handle.id()
    }

    /// The provider's settings as a type of its own. Mark it `deny_unknown_fields`, so that a misspelt key is an
    /// error and not silently without effect.
    ///
    /// ```no_run
    /// # use fleecebox_guest::{Context, Error};
    /// #[derive(serde::Deserialize)]
    /// #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
    /// struct Settings {
    ///     chunk_size: u32,
    /// }
    ///
    /// impl Default for Settings {
    ///     fn default() -> Self {
    ///         Settings { chunk_size: 1 << 20 }
    ///     }
    /// }
    ///
    /// # fn example(job: &Context) -> Result<(), Error> {
    /// let settings: Settings = job.settings()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Other`] with one line that names the key.
    pub fn settings<T: DeserializeOwned>(&self) -> Result<T, Error> {
        parse(&self.settings_text())
    }

    /// The provider's settings as the operator wrote them (TOML). Empty if there are none.
    pub fn settings_text(&self) -> String {
        self.handle.settings()
    }

    /// What the operator attached under that name, such as `guest-config` or `firewall-config`.
    pub fn attachment(&self, name: &str) -> Option<Vec<u8>> {
        self.handle.attachment(name)
    }

    /// Adds a line to the job's log. The host cuts it at 4 KiB and leaves out lines that come too fast.
    pub fn log(&self, level: Level, message: impl Display) {
        let level = match level {
            Level::Debug => job::Level::Debug,
            Level::Info => job::Level::Info,
            Level::Warn => job::Level::Warn,
            Level::Error => job::Level::Error,
        };
        self.handle.log(level, &message.to_string());
    }

    /// [`log`](Self::log) at [`Level::Debug`].
    pub fn debug(&self, message: impl Display) {
        self.log(Level::Debug, message);
    }

    /// [`log`](Self::log) at [`Level::Info`].
    pub fn info(&self, message: impl Display) {
        self.log(Level::Info, message);
    }

    /// [`log`](Self::log) at [`Level::Warn`].
    pub fn warn(&self, message: impl Display) {
        self.log(Level::Warn, message);
    }

    /// [`log`](Self::log) at [`Level::Error`].
    pub fn error(&self, message: impl Display) {
        self.log(Level::Error, message);
    }
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    toml::from_str(text).map_err(|error| {
        // The error's message leaves out where; a key whose value is wrong is named by its line alone.
        let line = error
            .span()
            .and_then(|span| text.get(..span.start))
            .and_then(|before| text.lines().nth(before.matches('\n').count()))
            .unwrap_or_default()
            .trim();
        let message = error.message().replace('\n', " ");
        match line {
            "" => Error::other(format_args!("settings: {message}")),
            line => Error::other(format_args!("settings: {message}, in `{line}`")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Settings {
        chunk_size: Option<u32>,
    }

    fn words(text: &str) -> String {
        parse::<Settings>(text).unwrap_err().to_string()
    }

    #[test]
    fn settings_are_read_and_may_be_empty() {
        assert_eq!(
            parse("chunk-size = 5"),
            Ok(Settings {
                chunk_size: Some(5)
            })
        );
        assert_eq!(parse(""), Ok(Settings { chunk_size: None }));
    }

    #[test]
    fn an_unknown_setting_is_refused_by_name_on_one_line() {
        let words = words("chunk-size = 5\nchunk-sice = 6\n");
        assert!(words.contains("`chunk-sice`"), "{words}");
        assert!(!words.contains('\n'), "{words}");
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_line() {
        let words = words("\nchunk-size = \"big\"");
        assert!(words.contains("in `chunk-size = \"big\"`"), "{words}");
    }

    #[test]
    fn what_is_not_toml_is_refused_on_one_line() {
        let words = words("chunk-size 5");
        assert!(words.starts_with("settings: "), "{words}");
        assert!(!words.contains('\n'), "{words}");
    }
}
