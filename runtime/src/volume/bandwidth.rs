//! `bandwidth`: how fast a job may read, over all of its volumes and connections.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// A turnstile that every byte of a job's volumes goes through.
///
/// A read books the time that it takes at the rate, and waits for the end of what was booked before. So in any span of
/// time at most the rate and one read go through, and nothing is saved up while a job reads nothing.
#[derive(Debug)]
pub struct Bandwidth {
    bytes_per_second: NonZeroU64,
    booked_until: Mutex<Option<Instant>>,
    stop: CancellationToken,
}

impl Bandwidth {
    /// Nothing is booked yet. After `stop` nothing waits any more: what a job that ends still reads is what was under way.
    pub fn new(bytes_per_second: NonZeroU64, stop: CancellationToken) -> Self {
        Self {
            bytes_per_second,
            booked_until: Mutex::new(None),
            stop,
        }
    }

    /// Waits until `bytes` more may be read.
    pub async fn take(&self, bytes: u64) {
        let until = self.book(Instant::now(), bytes);
        self.stop.run_until_cancelled(sleep_until(until)).await;
    }

    /// When `bytes` that are asked for `now` may be read.
    fn book(&self, now: Instant, bytes: u64) -> Instant {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        // Four centuries of nanoseconds fit; a read that is to take longer than a day waits that day only.
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let takes = takes.min(Duration::from_secs(24 * 3600));
        let mut until = self
            .booked_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let from = until.map_or(now, |until| until.max(now));
        // A day for each of the reads that wait is far from the clock's end.
        *until = from.checked_add(takes).or(*until);
        from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_spread_at_the_rate_and_nothing_is_saved_up() {
        let bandwidth = Bandwidth::new(NonZeroU64::new(1000).unwrap(), CancellationToken::new());
        let start = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(bandwidth.book(start, 1000), start);
        assert_eq!(bandwidth.book(start, 500), start + second);
        assert_eq!(bandwidth.book(start, 500), start + second * 3 / 2);
        // Ten idle seconds give no right to a burst.
        let later = start + second * 10;
        assert_eq!(bandwidth.book(later, 1000), later);
        assert_eq!(bandwidth.book(later, 1000), later + second);
    }

    #[tokio::test]
    async fn what_waits_waits_no_more_when_the_job_ends() {
        let stop = CancellationToken::new();
        let bandwidth = Bandwidth::new(NonZeroU64::new(1).unwrap(), stop.clone());
        bandwidth.take(24 * 3600).await;
        // Without an end this would take a day.
        tokio::join!(bandwidth.take(1), async { stop.cancel() });
    }
}
