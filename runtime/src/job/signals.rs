//! What signals ask of a job.

use tokio_util::sync::CancellationToken;

/// The first one and the second one.
#[derive(Debug, Clone, Default)]
pub struct Signals {
    /// The job is to end in order.
    pub end: CancellationToken,
    /// It is to end now: what it cannot take from the VM at once stays, and is named.
    pub at_once: CancellationToken,
}
