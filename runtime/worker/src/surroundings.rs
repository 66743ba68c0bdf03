//! What an instance learns of time and chance: the real ones in a run; in an image a time at which all clocks stand, and
//! chances that are the same whenever it is opened. By nothing of it can a proof be told from a restore.

use fleecebox_channel::Still;
use getrandom::rand_core::TryRng;
use std::convert::Infallible;
use std::time::{Duration, SystemTime};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;
use wasmtime_wasi::{HostMonotonicClock, HostWallClock, WasiCtxBuilder};

/// What calls of a guest wait by: timers, and nothing else. It is this thread's alone, and has no descriptor.
pub(super) fn passing_time() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_time().build()
}

/// The same where time stands: as soon as all that is left to do is to wait for a timer, the clock is put forward to it.
/// It would never get there by itself.
pub(super) fn standing_time() -> std::io::Result<Runtime> {
    let mut time = Builder::new_current_thread();
    time.enable_time().start_paused(true).build()
}

/// Time and chance.
#[derive(Debug)]
pub(super) enum Surroundings {
    /// Of the machine.
    Real,
    /// Of a backup.
    Still(Still),
}

impl Surroundings {
    /// Gives them to an instance. Must be called inside [`passing_time`], or [`standing_time`] if they are of a backup:
    /// clocks start now.
    pub(super) fn put_into(self, wasi: &mut WasiCtxBuilder) {
        let started = Instant::now();
        wasi.monotonic_clock(SinceStart(started));
        match self {
            // Its random numbers are wasmtime-wasi's.
            Self::Real => wasi.wall_clock(OfTheMachine),
            Self::Still(Still { seconds, seed }) => {
                let mut seeding = Chance::new(&seed, "insecure-seed");
                wasi.wall_clock(OfABackup { seconds, started })
                    .secure_random(Chance::new(&seed, "random"))
                    .insecure_random(Chance::new(&seed, "insecure"))
                    .insecure_random_seed(u128::from_le_bytes(seeding.next()))
            }
        };
    }
}

/// Counts from the start of the instance: since when the machine is up is nobody's business.
struct SinceStart(Instant);

impl HostMonotonicClock for SinceStart {
    fn resolution(&self) -> u64 {
        1
    }

    fn now(&self) -> u64 {
        // In nanoseconds 584 years, which one that sleeps in an image may have passed.
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// What is finer than this is the machine's business too, and to ask for it is a call that no sandbox may make.
const RESOLUTION: Duration = Duration::from_nanos(1);

struct OfTheMachine;

impl HostWallClock for OfTheMachine {
    fn resolution(&self) -> Duration {
        RESOLUTION
    }

    fn now(&self) -> Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.unwrap_or_default()
    }
}

struct OfABackup {
    /// The time, in seconds since 1970, where nobody sleeps.
    seconds: u64,
    started: Instant,
}

impl HostWallClock for OfABackup {
    fn resolution(&self) -> Duration {
        RESOLUTION
    }

    fn now(&self) -> Duration {
        Duration::from_secs(self.seconds).saturating_add(self.started.elapsed())
    }
}

/// Random bytes of a backup's, as many as anybody likes. Their bytes are the same with every version of every generator.
struct Chance(blake3::OutputReader);

impl Chance {
    fn new(seed: &[u8; 32], purpose: &str) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(seed);
        Self(hasher.update(purpose.as_bytes()).finalize_xof())
    }

    fn next<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.fill(&mut bytes);
        bytes
    }
}

impl TryRng for Chance {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(self.next()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(self.next()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.0.fill(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wasmtime_wasi::p2::bindings::random::random::Host as _;
    use wasmtime_wasi::p2::bindings::random::{insecure, insecure_seed};

    const BACKUP: Still = Still {
        seconds: 1_800_000_000,
        seed: [7; 32],
    };

    #[test]
    fn a_still_clock_moves_only_by_sleeping_and_nobody_waits_for_it() {
        let began = std::time::Instant::now();
        standing_time().unwrap().block_on(async {
            let started = Instant::now();
            let clock = SinceStart(started);
            let seconds = BACKUP.seconds;
            let wall = OfABackup { seconds, started };
            std::thread::sleep(Duration::from_millis(3));
            assert_eq!(clock.now(), 0);
            assert_eq!(wall.now(), Duration::from_secs(seconds));
            let day = Duration::from_secs(24 * 3600);
            tokio::time::sleep(day).await;
            assert_eq!(u128::from(clock.now()), day.as_nanos());
            tokio::time::sleep_until(started + day / 2).await;
            assert_eq!(wall.now(), Duration::from_secs(seconds) + day);
            // As long as a guest can ask for, and then longer than the clock counts.
            let longest = Duration::from_nanos(u64::MAX);
            tokio::time::sleep_until(Instant::now() + longest).await;
            assert_eq!(clock.now(), u64::MAX);
            assert!(wall.now() > Duration::from_nanos(u64::MAX));
        });
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_clock_that_passes_does_so_by_itself() {
        passing_time().unwrap().block_on(async {
            let clock = SinceStart(Instant::now());
            std::thread::sleep(Duration::from_millis(3));
            assert!(clock.now() >= 3_000_000);
        });
    }

    /// Bytes, a number, insecure bytes, and the seed.
    fn drawn(seed: u8) -> (Vec<u8>, u64, Vec<u8>, (u64, u64)) {
        let time = standing_time().unwrap();
        let _inside = time.enter();
        let mut wasi = WasiCtxBuilder::new();
        let seed = [seed; 32];
        Surroundings::Still(Still { seed, ..BACKUP }).put_into(&mut wasi);
        let mut wasi = wasi.build();
        let random = wasi.random();
        (
            random.get_random_bytes(100).unwrap(),
            random.get_random_u64().unwrap(),
            insecure::Host::get_insecure_random_bytes(random, 100).unwrap(),
            insecure_seed::Host::insecure_seed(random).unwrap(),
        )
    }

    #[test]
    fn chance_is_the_same_each_time_for_one_backup_and_another_for_another() {
        let (bytes, number, insecure, seed) = drawn(7);
        assert_eq!(drawn(7), (bytes.clone(), number, insecure.clone(), seed));
        let other = drawn(8);
        assert!(other.0 != bytes && other.1 != number && other.2 != insecure && other.3 != seed);
        assert_ne!(bytes, insecure);
    }
}
