//! The moment that a cancelled run is given to end by itself: each of its calls is answered `cancelled`, until it returns.
//!
//! It holds nothing of the VM's or the archive's meanwhile, and nothing waits for it but the very end of the job.

use super::account::Account;
use crate::channel::{Answer, Call};
use crate::contract::ErrorCode;
use crate::sandbox::{self, Process};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long it may take to notice.
const GRACE: Duration = Duration::from_secs(1);

/// The cancelled runs of a job.
#[derive(Debug, Clone, Default)]
pub struct Farewells {
    at_once: CancellationToken,
    runs: TaskTracker,
}

impl Farewells {
    /// Those of a job that `at_once` ends without any.
    pub fn new(at_once: CancellationToken) -> Self {
        Self {
            at_once,
            runs: TaskTracker::new(),
        }
    }

    /// Begins that of `process`, which waits for the answer `owed` if it has made a call.
    pub(super) fn begin(&self, mut process: Process, owed: Option<Answer>, account: Arc<Account>) {
        let at_once = self.at_once.clone();
        self.runs.spawn(async move {
            let told = timeout(GRACE, tell(&mut process, owed));
            // However it ends, there is nobody who wants to know.
            let _ = at_once.run_until_cancelled(told).await;
            account.sandbox(process.kill().await);
        });
    }

    /// Waits until all are gone, which is at most as long as one may take.
    pub async fn over(&self) {
        self.runs.close();
        self.runs.wait().await;
    }
}

/// Answers whatever it asks, until it has returned.
async fn tell(process: &mut Process, owed: Option<Answer>) -> Result<(), sandbox::Error> {
    if let Some(answer) = owed {
        process.answer(&answer)?;
    }
    loop {
        match process.next().await? {
            Call::Done(_) => return Ok(()),
            call => process.answer(&cancelled(&call))?,
        }
    }
}

/// What a call of a cancelled run is answered. One that cannot fail has no word for it.
pub(super) fn cancelled(call: &Call) -> Answer {
    match call {
        call if call.can_fail() => Answer::Error(ErrorCode::Cancelled),
        Call::Attachment { .. } => Answer::Nothing,
        _ => Answer::Unit,
    }
}
