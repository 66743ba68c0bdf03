//! What every part of a job has: whom it tells, what ends it early, and what it may use.

use super::component::Component;
use crate::config::Provider;
use crate::event::Events;
use crate::grants::account::Account;
use crate::sandbox::Program;
use crate::volume::bandwidth::Bandwidth;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Clones are of one job. Whoever waits for the end of its events has to wait for the end of all clones.
#[derive(Debug, Clone)]
pub struct Means {
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

impl Means {
    /// For a job under the limits of `account`.
    pub fn new(
        events: Events,
        cancel: CancellationToken,
        account: Arc<Account>,
        program: Program,
    ) -> Self {
        let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let none_yet = Self {
            events,
            cancel: CancellationToken::new(),
            account,
            program,
            encoders: Arc::new(Semaphore::new(processors)),
            bandwidth: None,
        };
        none_yet.ended_by(cancel)
    }

    /// Of a part that ends by another word, at which nothing waits for its turn to read any more. Its bandwidth is counted
    /// by itself.
    pub fn ended_by(&self, cancel: CancellationToken) -> Self {
        let rate = self.account.limits().bandwidth;
        Self {
            bandwidth: rate.map(|rate| Arc::new(Bandwidth::new(rate, cancel.clone()))),
            cancel,
            ..self.clone()
        }
    }

    /// Of a part that another account is charged for.
    pub fn charging(&self, account: &Arc<Account>) -> Self {
        Self {
            account: Arc::clone(account),
            ..self.clone()
        }
    }

    /// What comes of `future`; none where the job is told to end first, and then `future` is dropped.
    pub async fn unless_cancelled<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        self.cancel.run_until_cancelled(future).await
    }
}

/// By whom a backup is made: what each of its runs and proofs goes by.
#[derive(Clone, Copy)]
pub struct Maker<'a> {
    /// The provider's name.
    pub name: &'a str,
    /// Its settings, limits and grants.
    pub provider: &'a Provider,
    /// Its component, ready to run.
    pub component: &'a Component,
}
