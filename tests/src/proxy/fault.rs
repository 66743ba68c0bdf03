//! What can go wrong between the product and QEMU, one command at a time.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};

/// Which command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// The n-th of all commands, from 1.
    Number(usize),
    /// The n-th of this name, from 1.
    Named(&'static str, usize),
}

/// When in that command's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// QEMU never sees it, or sees it late.
    BeforeQemu,
    /// QEMU has done it, and the product does not know, or knows it late.
    BeforeAnswer,
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The connection breaks, in both directions.
    Cut,
    /// It takes this much longer.
    Delay(Duration),
    /// It waits until the test lets it go: the moment to kill the product.
    Hold,
}

/// One thing that goes wrong, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which command.
    pub at: At,
    /// When in its life.
    pub stage: Stage,
    /// What happens.
    pub what: What,
}

/// A command that waits. Dropping this cuts its connection.
#[derive(Debug)]
#[must_use = "the product waits for its answer until this is let go"]
pub struct Held {
    /// The command's name.
    pub command: String,
    go_on: Sender<()>,
}

impl Held {
    /// Goes on as if nothing had been.
    pub fn go_on(self) {
        // The connection may be gone, and then there is nothing to go on with.
        let _ = self.go_on.send(());
    }

    /// Breaks the connection: after the product was killed, so that nothing happens any more.
    pub fn cut(self) {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass,
    Cut,
}

#[derive(Debug)]
pub(super) struct Faults {
    state: Mutex<State>,
    held: Mutex<Receiver<Held>>,
    hold: Mutex<Sender<Held>>,
}

#[derive(Debug, Default)]
struct State {
    pending: Vec<Fault>,
    commands: Vec<String>,
    connections: Vec<UnixStream>,
}

impl Default for Faults {
    fn default() -> Self {
        let (hold, held) = channel();
        Self {
            state: Mutex::default(),
            held: Mutex::new(held),
            hold: Mutex::new(hold),
        }
    }
}

impl Faults {
    pub(super) fn inject(&self, fault: Fault) {
        lock(&self.state).pending.push(fault);
    }

    pub(super) fn commands(&self) -> Vec<String> {
        lock(&self.state).commands.clone()
    }

    pub(super) fn forget_commands(&self) {
        lock(&self.state).commands.clear();
    }

    pub(super) fn wait_held(&self, limit: Duration) -> Result<Held> {
        lock(&self.held)
            .recv_timeout(limit)
            .context("no command met the hold")
    }

    /// Remembers a connection for [`Faults::cut_all`].
    pub(super) fn watch(&self, both_ends: [UnixStream; 2]) {
        lock(&self.state).connections.extend(both_ends);
    }

    pub(super) fn cut_all(&self) {
        for connection in lock(&self.state).connections.drain(..) {
            // Most are closed already.
            let _ = connection.shutdown(Shutdown::Both);
        }
        // Those that nobody waited for would wait for ever.
        while let Ok(held) = lock(&self.held).try_recv() {
            held.cut();
        }
    }

    /// Counts a command; its number says which one it is from here on.
    pub(super) fn command_came(&self, name: &str) -> usize {
        let mut state = lock(&self.state);
        state.commands.push(name.into());
        state.commands.len()
    }

    /// Lets a fault happen that was injected for this moment, if there is one.
    pub(super) fn meet(&self, number: usize, name: &str, stage: Stage) -> Verdict {
        let met = {
            let mut state = lock(&self.state);
            let same_so_far = state
                .commands
                .iter()
                .take(number)
                .filter(|came| *came == name)
                .count();
            let meets = |fault: &Fault| {
                fault.stage == stage
                    && match fault.at {
                        At::Number(wanted) => wanted == number,
                        At::Named(wanted, nth) => wanted == name && nth == same_so_far,
                    }
            };
            state
                .pending
                .iter()
                .position(meets)
                .map(|index| state.pending.remove(index).what)
        };
        match met {
            None => Verdict::Pass,
            Some(What::Cut) => Verdict::Cut,
            Some(What::Delay(time)) => {
                std::thread::sleep(time);
                Verdict::Pass
            }
            Some(What::Hold) => {
                let (go_on, let_go) = channel();
                // The receiver lives in `self`, so this is always taken.
                let _ = lock(&self.hold).send(Held {
                    command: name.into(),
                    go_on,
                });
                // An error means that the test dropped it without letting it go on.
                if let_go.recv().is_ok() {
                    Verdict::Pass
                } else {
                    Verdict::Cut
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No value here is left half-changed by a panic.
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
