//! The slowest write that each test's guests saw, for the table at the end of `make test`.

use std::time::Duration;

use crate::report;

/// Enters what `who` saw during the test that runs in this thread, in microseconds.
pub(crate) fn record(who: &str, worst: Duration) {
    report::enter("worst-writes.tsv", &[who, &worst.as_micros().to_string()]);
}
