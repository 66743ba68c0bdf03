//! What every part of a job has: whom it tells, what ends it early, and what it may use.

use crate::event::Events;
use crate::grants::account::Account;
use crate::sandbox::Program;
use crate::volume::bandwidth::Bandwidth;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Clones are of one job. Whoever waits for the end of its events has to wait for the end of all clones.
#[derive(Debug, Clone)]
pub struct Context {
    /// Where it tells what it does.
    pub events: Events,
    /// Ends it early.
    pub cancel: CancellationToken,
    /// What it uses of the provider's limits.
    pub account: Arc<Account>,
    /// What sandbox processes run.
    pub program: Program,
    /// Digesting and encoding at once in the whole job: one for each processor.
    pub encoders: Arc<Semaphore>,
    /// How fast it may read, where the limits say so.
    pub bandwidth: Option<Arc<Bandwidth>>,
}

impl Context {
    /// For a job under the limits of `account`.
    pub fn new(
        events: Events,
        cancel: CancellationToken,
        account: Arc<Account>,
        program: Program,
    ) -> Self {
        let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let rate = account.limits().bandwidth;
        Self {
            bandwidth: rate.map(|rate| Arc::new(Bandwidth::new(rate, cancel.clone()))),
            events,
            cancel,
            account,
            program,
            encoders: Arc::new(Semaphore::new(processors)),
        }
    }
}
