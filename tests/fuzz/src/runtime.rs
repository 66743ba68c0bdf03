//! One runtime for all executions of a target.

use std::future::Future;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// Its clock stands still while anything can go on, and jumps to the next timer otherwise. So whoever waits for what
/// never comes is found at once.
static JUMPING: LazyLock<Runtime> =
    LazyLock::new(|| make(Builder::new_current_thread().start_paused(true)));

static REAL: LazyLock<Runtime> = LazyLock::new(|| make(&mut Builder::new_current_thread()));

/// By a clock that jumps: above the sum of all limits of the product that one execution can meet.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

/// By the real clock: far beyond the longest execution on a busy machine.
const LONGEST_EXECUTION: Duration = Duration::from_secs(60);

/// Runs `future`, which waits for nothing outside of it, to its end. Panics where there is none.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    JUMPING
        .block_on(async { timeout(LONGEST_WAIT, future).await })
        .expect("it hangs")
}

/// Runs `future`, which may wait for other processes, to its end. Panics where that takes too long.
pub fn run_in_real_time<T>(future: impl Future<Output = T>) -> T {
    REAL.block_on(async { timeout(LONGEST_EXECUTION, future).await })
        .expect("it hangs")
}

fn make(builder: &mut Builder) -> Runtime {
    builder.enable_all().build().expect("a runtime can be made")
}
