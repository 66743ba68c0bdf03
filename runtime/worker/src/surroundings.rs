//! What an instance learns of time and chance: the real ones in a run; in an image a time at which all clocks stand, and
//! chances that are the same whenever it is opened. By nothing of it can a proof be told from a restore.

use fleecebox_channel::Still;
use rustix::event::{Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// Longest sleep at once; the wait goes on after it. Far below what a system call takes.
const NAP: Duration = Duration::from_secs(3600);

/// Time and chance.
pub(super) enum Surroundings {
    /// Of the machine.
    Real {
        /// From when the monotonic clock counts: since when the machine is up is nobody's business.
        started: Instant,
    },
    /// Of a backup.
    Still {
        /// The time, in seconds since 1970, where nobody sleeps.
        seconds: u64,
        /// For how long the instance has slept.
        slept: Duration,
        /// Where its random bytes come from, as many as it likes.
        chance: Box<blake3::OutputReader>,
    },
}

impl Surroundings {
    /// Those of the machine, with a monotonic clock that starts now.
    pub(super) fn real() -> Self {
        Self::Real {
            started: Instant::now(),
        }
    }

    /// Those of a backup.
    pub(super) fn still(still: Still) -> Self {
        Self::Still {
            seconds: still.seconds,
            slept: Duration::ZERO,
            chance: Box::new(blake3::Hasher::new_keyed(&still.seed).finalize_xof()),
        }
    }

    /// The time of day, since 1970.
    pub(super) fn wall(&self) -> Duration {
        match self {
            Self::Real { .. } => {
                let now = clock_gettime(ClockId::Realtime);
                // Nanoseconds are below a second (clock_gettime(2)).
                Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
            }
            Self::Still { seconds, slept, .. } => {
                Duration::from_secs(*seconds).saturating_add(*slept)
            }
        }
    }

    /// Of the monotonic clock, since the instance's start.
    pub(super) fn elapsed(&self) -> Duration {
        match self {
            Self::Real { started } => started.elapsed(),
            Self::Still { slept, .. } => *slept,
        }
    }

    /// Returns when the monotonic clock shows `due` or more. A clock that stands is put forward: it would never get
    /// there by itself.
    pub(super) fn sleep_until(&mut self, due: Duration) {
        loop {
            let left = due.saturating_sub(self.elapsed()).min(NAP);
            if left.is_zero() {
                return;
            }
            if let Self::Still { slept, .. } = self {
                *slept = due;
                return;
            }
            let wait = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            // Ends early by a signal only, and is then begun again. std's sleep is a call that no sandbox may make.
            let _ = poll(&mut [], Some(&wait));
        }
    }

    /// Random bytes; none where the system has none.
    pub(super) fn random(&mut self, bytes: &mut [u8]) -> Result<(), getrandom::Error> {
        match self {
            Self::Real { .. } => getrandom::fill(bytes),
            Self::Still { chance, .. } => {
                chance.fill(bytes);
                Ok(())
            }
        }
    }
}

impl std::fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Real { .. } => "Real",
            Self::Still { .. } => "Still",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKUP: Still = Still {
        seconds: 1_800_000_000,
        seed: [7; 32],
    };

    #[test]
    fn a_still_clock_moves_only_by_sleeping_and_nobody_waits_for_it() {
        let mut still = Surroundings::still(BACKUP);
        let began = Instant::now();
        let day = Duration::from_secs(24 * 3600);
        assert_eq!(still.elapsed(), Duration::ZERO);
        assert_eq!(still.wall(), Duration::from_secs(BACKUP.seconds));
        still.sleep_until(day);
        still.sleep_until(day / 2);
        assert_eq!(still.elapsed(), day);
        assert_eq!(still.wall(), Duration::from_secs(BACKUP.seconds) + day);
        still.sleep_until(Duration::MAX);
        assert_eq!(still.wall(), Duration::MAX);
        assert!(began.elapsed() < day);
    }

    #[test]
    fn chance_is_the_same_each_time_however_it_is_asked_for() {
        let drawn = |lengths: &[usize]| {
            let mut still = Surroundings::still(BACKUP);
            let mut all = Vec::new();
            for length in lengths {
                let mut bytes = vec![0; *length];
                still.random(&mut bytes).unwrap();
                all.extend(bytes);
            }
            all
        };
        assert_eq!(drawn(&[100]), drawn(&[8, 16, 76]));
        let mut other = [0; 100];
        let seed = [8; 32];
        Surroundings::still(Still { seed, ..BACKUP })
            .random(&mut other)
            .unwrap();
        assert_ne!(drawn(&[100]), other);
    }
}
