//! `job.context.log`: a provider's lines, escaped, capped and counted before anybody sees them.

use super::account::Account;
use crate::contract::{LogLevel, MAX_TEXT};
use crate::event::{Event, Events};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest reason of a failure that is shown, in bytes: it is one line among others.
const REASON: usize = 1024;

/// Lines at once, before they come too fast: more than an honest provider says in a whole run.
const BURST: u32 = 256;

/// How often another line may come after that: a job's log is read by people.
const PER_LINE: Duration = Duration::from_millis(20);

/// The log of one run.
#[derive(Debug)]
pub(super) struct ProviderLog {
    volume: String,
    events: Events,
    account: Arc<Account>,
    dropped: u64,
    too_fast: u64,
    pace: LinePace,
}

/// How many lines may come now.
#[derive(Debug)]
struct LinePace {
    left: u32,
    since: Instant,
}

impl LinePace {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
        }
    }

    /// Whether a line may come at `now`.
    fn take(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since).as_nanos() / PER_LINE.as_nanos();
        if let Some(earned) = u32::try_from(earned).ok().filter(|earned| *earned < BURST) {
            self.left = (self.left + earned).min(BURST);
            self.since += PER_LINE * earned;
        } else {
            *self = Self::new(now);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

impl ProviderLog {
    /// For the provider at work on `volume`, as long as `account` has bytes for it.
    pub(super) fn new(volume: &str, events: Events, account: Arc<Account>) -> Self {
        Self {
            volume: volume.to_owned(),
            events,
            account,
            dropped: 0,
            too_fast: 0,
            pace: LinePace::new(Instant::now()),
        }
    }

    /// Keeps a line, as far as it is allowed.
    pub(super) fn line(&mut self, level: LogLevel, message: &str) {
        if !self.pace.take(Instant::now()) {
            self.account.log_dropped();
            self.too_fast += 1;
            return;
        }
        let text = shown(message, MAX_TEXT);
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
        if self.too_fast > 0 {
            self.events.warn(format!(
                "{}: {} lines of the provider's log were dropped: they came too fast",
                self.volume, self.too_fast
            ));
        }
        if self.dropped > 0 {
            self.events.warn(format!(
                "{}: {} lines of the provider's log were dropped: it passed its limit (log-bytes)",
                self.volume, self.dropped
            ));
        }
    }
}

/// A reason in a provider's words, as [`shown`] does it.
pub(super) fn harmless(message: &str) -> String {
    shown(message, REASON)
}

/// `message` on one line of at most `most` bytes, with everything but printable ASCII escaped: a terminal must not
/// be steered, and look-alikes must not pass for other text.
fn shown(message: &str, most: usize) -> String {
    let mut line = String::new();
    for c in message.chars() {
        let escaped = c.escape_default();
        let plain = matches!(c, ' '..='~');
        let length = if plain { 1 } else { escaped.len() };
        if line.len() + length > most {
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
    use crate::config::Limits;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_a_provider_logs_is_one_short_line_of_printable_ascii(message in any::<String>()) {
            let line = shown(&message, 1000);
            prop_assert!(line.chars().all(|c| matches!(c, ' '..='~')));
            prop_assert!(line.len() <= 1000 + 3);
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

    #[test]
    fn a_message_is_cut_at_what_the_contract_says() {
        let line = shown(&"a".repeat(MAX_TEXT + 1), MAX_TEXT);
        assert_eq!(line, "a".repeat(MAX_TEXT) + "...");
    }

    #[test]
    fn lines_that_come_too_fast_are_dropped_and_one_that_waits_is_not() {
        let start = Instant::now();
        let mut pace = LinePace::new(start);
        assert!((0..BURST).all(|_| pace.take(start)));
        assert!(!pace.take(start + PER_LINE / 2));
        assert!(pace.take(start + PER_LINE));
        assert!(!pace.take(start + PER_LINE));
        assert!(pace.take(start + PER_LINE * 2));
        let later = start + PER_LINE * (BURST * 10);
        assert_eq!(
            (0..=BURST).filter(|_| pace.take(later)).count(),
            BURST as usize
        );
    }
}
