//! Waiting for a condition that no event announces.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Short against everything that tests wait for, long enough to cost no processor.
const INTERVAL: Duration = Duration::from_millis(10);

/// Asks `probe` until it answers with a value. `what` completes "timed out waiting for …".
///
/// # Errors
/// When `limit` has passed without a value, or `probe` fails.
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("timed out after {limit:?} waiting for {what}");
        }
        std::thread::sleep(INTERVAL);
    }
}
