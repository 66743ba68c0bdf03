//! `job.context.log`: a provider's lines, escaped, capped and counted before anybody sees them.

use super::account::Account;
use crate::channel::LogLevel;
use crate::job::{Event, Events};
use std::sync::Arc;

/// Longest line that is kept, in bytes: more is no message but a dump.
const LINE: usize = 1024;

/// What a line costs at least, in bytes: an empty one takes as much to keep and show.
pub(crate) const LINE_COST: u64 = 64;

/// The log of one run.
#[derive(Debug)]
pub(super) struct ProviderLog {
    volume: String,
    events: Events,
    account: Arc<Account>,
    dropped: u64,
}

impl ProviderLog {
    /// For the provider at work on `volume`, as long as `account` has bytes for it.
    pub(super) fn new(volume: &str, events: Events, account: Arc<Account>) -> Self {
        Self {
            volume: volume.to_owned(),
            events,
            account,
            dropped: 0,
        }
    }

    /// Keeps a line, as far as it is allowed.
    pub(super) fn line(&mut self, level: LogLevel, message: &str) {
        let text = harmless(message);
        match self.account.log(text.len() as u64) {
            true => {
                let level = match level {
                    LogLevel::Debug => "debug",
                    LogLevel::Info => "info",
                    LogLevel::Warn => "warn",
                    LogLevel::Error => "error",
                };
                self.events.send(Event::Provider {
                    volume: self.volume.clone(),
                    level,
                    text,
                });
            }
            false => self.dropped += 1,
        }
    }
}

impl Drop for ProviderLog {
    fn drop(&mut self) {
        if self.dropped > 0 {
            self.events.warn(format!(
                "{}: {} lines of the provider's log were dropped: it passed its limit (log-bytes)",
                self.volume, self.dropped
            ));
        }
    }
}

/// `message` on one line of at most [`LINE`] bytes, with everything but printable ASCII escaped: a terminal must not
/// be steered, and look-alikes must not pass for other text.
pub(super) fn harmless(message: &str) -> String {
    let mut line = String::new();
    for c in message.chars() {
        let escaped = c.escape_default();
        let plain = matches!(c, ' '..='~');
        let length = if plain { 1 } else { escaped.len() };
        if line.len() + length > LINE {
            line.push_str("...");
            break;
        }
        if plain {
            line.push(c);
        } else {
            line.extend(escaped);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Limits;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_a_provider_logs_is_one_short_line_of_printable_ascii(message in any::<String>()) {
            let line = harmless(&message);
            prop_assert!(line.chars().all(|c| matches!(c, ' '..='~')));
            prop_assert!(line.len() <= LINE + 3);
        }
    }

    #[test]
    fn a_flood_is_dropped_and_counted() {
        let (events, mut received) = Events::channel();
        let limits = Limits {
            log_bytes: 100,
            ..Limits::default()
        };
        let mut log = ProviderLog::new("scsi0", events, Arc::new(Account::new(limits)));
        for _ in 0..10 {
            log.line(LogLevel::Info, "\u{1b}[2Jx");
        }
        drop(log);
        let mut all = Vec::new();
        while let Ok(event) = received.try_recv() {
            all.push(event);
        }
        assert_eq!(all.len(), 2);
        assert!(matches!(&all[0], Event::Provider { text, .. } if text == "\\u{1b}[2Jx"));
        assert!(matches!(&all[1], Event::Warning { text } if text.contains("9 lines")));
    }
}
