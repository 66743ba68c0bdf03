//! `bandwidth`: how fast a job may read, over all of its volumes and connections.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// A turnstile that every byte of a job's volumes goes through.
///
/// A read books the time that it takes at the rate, and waits for the end of what was booked before. So in any span of
/// time at most the rate and one read go through, and nothing is saved up while a job reads nothing.
#[derive(Debug)]
pub struct Bandwidth {
    bytes_per_second: NonZeroU64,
    booked_until: Mutex<Option<Instant>>,
}

impl Bandwidth {
    /// Nothing is booked yet.
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Self {
            bytes_per_second,
            booked_until: Mutex::new(None),
        }
    }

    /// Waits until `bytes` more may be read.
    pub async fn take(&self, bytes: u64) {
        sleep_until(self.book(Instant::now(), bytes)).await;
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
        *until = Some(from + takes);
        from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_spread_at_the_rate_and_nothing_is_saved_up() {
        let bandwidth = Bandwidth::new(NonZeroU64::new(1000).unwrap());
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
}
