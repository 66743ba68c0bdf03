//! QMP through libvirt: each command is one call. A daemon that is started again, as with an update, is waited for; QEMU
//! does not notice, and all that a job has in it stays.
//!
//! What was under way when the daemon went may have been carried out or not. A question is asked again; who gave an order
//! is told that its fate is not known, as after one that was not answered in time.

use super::connection::Ears;
use super::{Address, Domain, LibvirtError, OPERATION_INVALID};
use crate::monitor::{Event, MonitorError, Refusal};
use fleecebox_contract::with_causes;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// How long a daemon that went is waited for. It starts again in seconds; a job that holds a snapshot must not wait for
/// an operator.
const AWAY_LIMIT: Duration = Duration::from_secs(60);

/// Between two tries to reach it.
const PAUSE: Duration = Duration::from_millis(200);

/// How the monitor's way through libvirt stands.
#[derive(Debug, Clone)]
enum State {
    Up(Arc<Domain>),
    /// The daemon is gone, and may come back.
    Away,
    Lost {
        reason: String,
    },
}

/// A running domain's monitor.
#[derive(Debug)]
pub struct Link {
    address: Address,
    state: Arc<watch::Sender<State>>,
    events: broadcast::WeakSender<Event>,
    task: AbortHandle,
}

impl Link {
    /// Reaches the monitor of a domain that runs; `kept` events are kept for a subscriber that is behind.
    ///
    /// # Errors
    /// A [`LibvirtError`]; one that says so where it does not run.
    pub async fn open(address: &Address, kept: usize) -> Result<Self, LibvirtError> {
        let (events, _) = broadcast::channel(kept);
        let (domain, stopped) = reach(address, &events).await?;
        // From here on it is this one, whatever it will be called.
        let address = Address {
            domain: domain.uuid(),
            ..address.clone()
        };
        let state = Arc::new(watch::Sender::new(State::Up(Arc::new(domain))));
        let weak_events = events.downgrade();
        let keeping = keep(address.clone(), Arc::clone(&state), events, stopped);
        Ok(Self {
            address,
            state,
            events: weak_events,
            task: tokio::spawn(keeping).abort_handle(),
        })
    }

    /// Which domain it is, by what does not change.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Gives QEMU a command, and waits for its answer.
    ///
    /// # Errors
    /// A [`MonitorError`].
    pub(crate) async fn exchange(
        &self,
        command: &str,
        arguments: Value,
        mut descriptor: Option<OwnedFd>,
    ) -> Result<Value, MonitorError> {
        let message = json!({ "execute": command, "arguments": arguments }).to_string();
        tracing::debug!(target: "fleecebox::qmp", "-> {message}");
        loop {
            let domain = self.up().await?;
            let answer = tokio::select! {
                answer = domain.command(&message, descriptor.take()) => answer,
                // Of a domain that stopped none may come.
                () = self.lost() => return Err(self.gone()),
            };
            match answer {
                Ok(answer) => return read_answer(command, answer),
                Err(error) if error.is_lost() && is_question(command) => {}
                Err(error) if error.is_lost() => {
                    return Err(MonitorError::Unanswered {
                        what: command.into(),
                    });
                }
                Err(LibvirtError::Refused { code, .. })
                    if code == OPERATION_INVALID && !domain.has_qemu().await.unwrap_or(true) =>
                {
                    lose(&self.state, "the domain does not run any more");
                    return Err(self.gone());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The domain, once the daemon is there.
    pub(crate) async fn up(&self) -> Result<Arc<Domain>, MonitorError> {
        let mut state = self.state.subscribe();
        let settled = state.wait_for(|state| match state {
            State::Up(domain) => !domain.is_lost(),
            State::Away => false,
            State::Lost { .. } => true,
        });
        match settled.await.as_deref() {
            Ok(State::Up(domain)) => Ok(Arc::clone(domain)),
            _ => Err(self.gone()),
        }
    }

    async fn lost(&self) {
        let mut state = self.state.subscribe();
        let lost = state.wait_for(|state| matches!(state, State::Lost { .. }));
        // Its sender is ours.
        let _ = lost.await;
    }

    pub(crate) fn is_lost(&self) -> bool {
        matches!(*self.state.borrow(), State::Lost { .. })
    }

    pub(crate) fn events(&self) -> Option<broadcast::Receiver<Event>> {
        self.events.upgrade().map(|sender| sender.subscribe())
    }

    pub(crate) fn gone(&self) -> MonitorError {
        let reason = match &*self.state.borrow() {
            State::Lost { reason } => reason.clone(),
            _ => "the way to libvirt ended".into(),
        };
        MonitorError::Lost { reason }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What can be asked again without harm.
fn is_question(command: &str) -> bool {
    const QUESTIONS: [&str; 3] = ["qom-get", "qom-list", "x-debug-query-block-graph"];
    command.starts_with("query-") || QUESTIONS.contains(&command)
}

fn read_answer(command: &str, mut answer: Value) -> Result<Value, MonitorError> {
    if let Some(value) = answer.get_mut("return") {
        return Ok(value.take());
    }
    let refusal = serde_json::from_value(answer["error"].take());
    let Refusal { class, desc } = refusal.map_err(|source| MonitorError::Answer {
        command: command.into(),
        source,
    })?;
    Err(MonitorError::Refused {
        command: command.into(),
        class,
        description: desc,
    })
}

/// The domain, if it runs, and what is cancelled when it stops.
async fn reach(
    address: &Address,
    events: &broadcast::Sender<Event>,
) -> Result<(Domain, CancellationToken), LibvirtError> {
    let stopped = CancellationToken::new();
    let ears = Ears {
        events: events.downgrade(),
        stopped: stopped.clone(),
    };
    let domain = Domain::find_heard(address, Some(ears)).await?;
    // Before the look: one that stops in between is heard of.
    domain.listen().await?;
    match domain.has_qemu().await? {
        true => Ok((domain, stopped)),
        false => Err(LibvirtError::ShutOff {
            domain: domain.name().into(),
        }),
    }
}

/// Looks after the connection until the domain stops, or libvirt does not come back. The events end with it.
async fn keep(
    address: Address,
    state: Arc<watch::Sender<State>>,
    events: broadcast::Sender<Event>,
    mut stopped: CancellationToken,
) {
    loop {
        let State::Up(domain) = state.borrow().clone() else {
            return;
        };
        tokio::select! {
            biased;
            () = stopped.cancelled() => return lose(&state, "the domain stopped"),
            () = domain.ended() => {}
        }
        if !advance(&state, State::Away) {
            return;
        }
        let again = match wait_for_return(&address, &events, domain.id()).await {
            Ok(again) => again,
            Err(reason) => return lose(&state, &reason),
        };
        stopped = again.1;
        if !advance(&state, State::Up(Arc::new(again.0))) {
            return;
        }
    }
}

async fn wait_for_return(
    address: &Address,
    events: &broadcast::Sender<Event>,
    id: i32,
) -> Result<(Domain, CancellationToken), String> {
    let deadline = Instant::now() + AWAY_LIMIT;
    loop {
        match reach(address, events).await {
            Ok((domain, stopped)) if domain.id() == id => return Ok((domain, stopped)),
            Ok(_) => return Err("the domain was started anew while libvirt was away".into()),
            Err(error @ (LibvirtError::ShutOff { .. } | LibvirtError::NoDomain { .. })) => {
                return Err(format!("after libvirt was away: {}", with_causes(&error)));
            }
            Err(error) if Instant::now() >= deadline => {
                let seconds = AWAY_LIMIT.as_secs();
                return Err(format!(
                    "libvirt did not come back within {seconds} s: {}",
                    with_causes(&error)
                ));
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// What is lost stays so, for the first reason.
fn advance(state: &watch::Sender<State>, next: State) -> bool {
    state.send_if_modified(|state| {
        let goes_on = !matches!(state, State::Lost { .. });
        if goes_on {
            *state = next;
        }
        goes_on
    })
}

fn lose(state: &watch::Sender<State>, reason: &str) {
    let reason = reason.to_owned();
    advance(state, State::Lost { reason });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_qemus_is_read_whatever_else_it_holds() {
        let read = |answer| read_answer("query-status", answer);
        let told = read(json!({ "return": { "a": 1 }, "id": "libvirt-7" }));
        assert_eq!(told.unwrap(), json!({ "a": 1 }));
        let refused = read(json!({ "error": { "class": "DeviceNotFound", "desc": "no" } }));
        assert!(refused.unwrap_err().is_not_found());
        let neither = read(json!({ "id": 1 })).unwrap_err();
        assert!(matches!(neither, MonitorError::Answer { .. }), "{neither}");
    }

    #[test]
    fn only_what_changes_nothing_is_asked_again() {
        for question in ["query-jobs", "qom-get", "query-named-block-nodes"] {
            assert!(is_question(question), "{question}");
        }
        for order in ["transaction", "qom-set", "blockdev-add", "getfd", "stop"] {
            assert!(!is_question(order), "{order}");
        }
    }
}
