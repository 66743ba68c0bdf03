//! What a job tells about itself while it runs; the command line turns it into text, a bar, or JSON.

use crate::channel::{self, Gap};
use std::sync::{Arc, Once};
use tokio::sync::mpsc;

/// Something worth telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The job reached this step.
    Step {
        /// Of the journal or of reading back.
        step: &'static str,
    },
    /// A decision or a finding that the operator should know.
    Note {
        /// One line.
        text: String,
    },
    /// As [`Event::Note`], for what needs attention.
    Warning {
        /// One line.
        text: String,
    },
    /// A line that the provider logged, escaped and capped.
    Provider {
        /// The volume it works on.
        volume: String,
        /// `debug`, `info`, `warn` or `error`.
        level: &'static str,
        /// One line.
        text: String,
    },
    /// The bytes that the job has to go through became known.
    Total {
        /// The volume that they are of.
        volume: String,
        /// Added to the total, in bytes.
        bytes: u64,
    },
    /// Bytes were gone through.
    Advance {
        /// The volume that they are of.
        volume: String,
        /// Since the last event, in bytes.
        bytes: u64,
    },
}

/// Where a job's events go. Clones share one destination; events are dropped once nobody listens.
#[derive(Debug, Clone)]
pub struct Events {
    sender: mpsc::UnboundedSender<Event>,
    unconfined: Arc<Once>,
}

impl Events {
    /// A destination and the end to read it from.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let unconfined = Arc::new(std::sync::Once::new());
        (Self { sender, unconfined }, receiver)
    }

    /// Tells `event`.
    pub fn send(&self, event: Event) {
        // Nobody listening is no reason to fail a backup.
        let _ = self.sender.send(event);
    }

    /// Tells a finding.
    pub fn note(&self, text: impl Into<String>) {
        self.send(Event::Note { text: text.into() });
    }

    /// Tells something that needs attention.
    pub fn warn(&self, text: impl Into<String>) {
        self.send(Event::Warning { text: text.into() });
    }

    /// Tells once per job in what the system does not confine its sandbox processes; it is the same for all of them.
    pub fn confinement(&self, missing: &[Gap]) {
        if !missing.is_empty() {
            let missing = channel::listed(missing);
            self.unconfined.call_once(|| {
                self.warn(format!(
                    "this system does not confine the provider fully: {missing}"
                ));
            });
        }
    }
}
