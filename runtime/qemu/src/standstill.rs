//! What has to be done while the guest's CPUs stand still.
//!
//! The caller arms the watchdog before: a job that dies half-way leaves the VM stopped.

use super::monitor::{Monitor, MonitorError};
use qapi::qmp::{cont, stop};
use std::time::Duration;
use tokio::time::Instant;

/// How the VM came through.
#[derive(Debug, Default)]
pub(super) struct Stopped {
    /// From before `stop` to after `cont`, where the VM ran.
    pub(super) time: Option<Duration>,
    /// It was stopped and could not be continued.
    pub(super) still: Option<MonitorError>,
}

/// Does `work` while the VM is stopped, if it `runs`, and continues it whatever becomes of the work.
pub(super) async fn during<T, E: From<MonitorError>>(
    monitor: &Monitor,
    runs: bool,
    stopped: &mut Stopped,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    if !runs {
        return work.await;
    }
    let start = Instant::now();
    monitor.execute(stop {}).await?;
    let done = work.await;
    stopped.still = monitor.execute(cont {}).await.err();
    stopped.time = Some(start.elapsed());
    done
}
