//! Whether a component fits its world, before anything depends on it: in a process like those that will run it.

use super::compile::Compiled;
use super::spawn::{Error, Process, Program};
use fleecebox_channel::{Call, Failure, Fit, Gap, Order, Outcome};
use fleecebox_contract::{Wasi, World};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::timeout;

/// How long it may take: loading is some milliseconds, on a machine that is very busy some seconds.
const FIT_TIME: Duration = Duration::from_secs(120);

/// Why it is not known that a component will run.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// It imports or exports something of another type than its world says.
    #[error("it cannot be used as a provider")]
    Refused(#[source] Failure),
    /// The process that was to find out failed, or is not confined as required.
    #[error(transparent)]
    Process(#[from] Error),
    /// It takes too long.
    #[error("it was not loaded within {} s", FIT_TIME.as_secs())]
    TimedOut,
    /// The process answered with something else.
    #[error("the sandbox process that was to load it broke the protocol")]
    Unexpected,
}

/// Loads and links a component, and runs none of its code. Returns in what the process was less confined than it could be.
pub async fn fit(
    program: &Program,
    compiled: &Compiled,
    world: World,
    wasi: BTreeSet<Wasi>,
) -> Result<Vec<Gap>, FitError> {
    let order = Order::Fit(Fit { world, wasi });
    let linking = async {
        let mut process = Process::start(program, &order, &compiled.file).await?;
        let missing = process.missing().to_vec();
        let outcome = match process.next().await? {
            Call::Done(Outcome::Fits) => Ok(missing),
            Call::Done(Outcome::Failed(failure)) => Err(FitError::Refused(failure)),
            _ => Err(FitError::Unexpected),
        };
        process.kill().await;
        outcome
    };
    timeout(FIT_TIME, linking)
        .await
        .unwrap_or(Err(FitError::TimedOut))
}
