//! `progress-per-minute`: a provider that trickles is stopped, because the guest pays for the snapshot all the while.

use std::time::Duration;

/// How long a provider is looked at before it is judged; what it must cover in a minute is cut down to this.
const WINDOW: Duration = Duration::from_secs(15);

/// How much was covered in one window of the provider's own time.
///
/// Its own time is what the host waits for its next call. While the host reads or stores for it, the provider is not
/// the one who is slow.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes to be covered in one window.
    least: u64,
    waited: Duration,
    covered_before: u64,
}

/// A provider covered less than it must.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooSlow {
    /// Bytes that it covered in [`TooSlow::seconds`].
    pub(super) covered: u64,
    /// The window, in seconds.
    pub(super) seconds: u64,
}

impl Pace {
    /// For a provider that must cover `per_minute` bytes in a minute.
    pub(super) fn new(per_minute: u64) -> Self {
        let share = u128::from(per_minute) * WINDOW.as_millis() / 60_000;
        Self {
            least: u64::try_from(share).unwrap_or(u64::MAX).max(1),
            waited: Duration::ZERO,
            covered_before: 0,
        }
    }

    /// How long its next call may take until it is judged.
    pub(super) fn patience(&self) -> Duration {
        WINDOW.saturating_sub(self.waited)
    }

    /// The host has waited for another `waited`, and `covered` bytes are covered altogether.
    pub(super) fn judge(&mut self, waited: Duration, covered: u64) -> Result<(), TooSlow> {
        self.waited += waited;
        if self.waited < WINDOW {
            return Ok(());
        }
        let done = covered.saturating_sub(self.covered_before);
        if done < self.least {
            return Err(TooSlow {
                covered: done,
                seconds: WINDOW.as_secs(),
            });
        }
        self.waited = Duration::ZERO;
        self.covered_before = covered;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_providers_own_time_counts_and_each_window_by_itself() {
        let mut pace = Pace::new(400);
        assert_eq!(pace.patience(), WINDOW);
        assert_eq!(pace.judge(WINDOW / 2, 0), Ok(()));
        assert_eq!(pace.patience(), WINDOW / 2);
        assert_eq!(pace.judge(WINDOW / 2, 100), Ok(()));
        // What an earlier window had too much of does not carry over.
        assert_eq!(pace.judge(WINDOW, 1000), Ok(()));
        let slow = TooSlow {
            covered: 99,
            seconds: WINDOW.as_secs(),
        };
        assert_eq!(pace.judge(WINDOW, 1099), Err(slow));
    }
}
