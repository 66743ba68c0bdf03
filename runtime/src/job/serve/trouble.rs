//! What could not be read: told once for each place, and listed at the end.

use super::super::read_back::FINDINGS;
use crate::event::Events;
use crate::extent::Extent;
use crate::nbd::ErrorCode;
use crate::nbd::server::Refused;
use std::sync::{Mutex, PoisonError};

/// A range that somebody wanted to read and could not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    /// Of the backup.
    pub volume: String,
    /// What cannot be had: whole blocks, and as many as go together.
    pub extent: Extent,
    /// The range, and why.
    pub reason: String,
    /// Whether the policy is why.
    pub is_denied: bool,
}

/// All that was met.
#[derive(Debug)]
pub(super) struct Troubles {
    events: Events,
    met: Mutex<Vec<Unread>>,
}

impl Troubles {
    pub(super) fn new(events: Events) -> Self {
        Self {
            events,
            met: Mutex::default(),
        }
    }

    /// What the client is answered. The operator is told when it is met for the first time; a client that tries it for
    /// ever fills no log.
    pub(super) fn refuse(&self, unread: Unread) -> Refused {
        let refused = Refused {
            code: ErrorCode::Eio,
            message: unread.reason.clone(),
            at: Some(unread.extent.start()),
        };
        let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same =
            |other: &Unread| (&other.volume, other.extent) == (&unread.volume, unread.extent);
        if met.len() < FINDINGS && !met.iter().any(is_same) {
            let Unread { volume, reason, .. } = &unread;
            self.events
                .warn(format!("volume {volume}: cannot be read: {reason}"));
            met.push(unread);
            if met.len() == FINDINGS {
                self.events
                    .warn("what cannot be read besides is not listed any more");
            }
        }
        refused
    }

    pub(super) fn all(&self) -> Vec<Unread> {
        let met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        met.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    fn unread(start: u64) -> Unread {
        Unread {
            volume: "da".into(),
            extent: Extent::new(start, 512).unwrap(),
            reason: "gone".into(),
            is_denied: false,
        }
    }

    #[test]
    fn each_place_is_told_once_and_only_so_many_are() {
        let (events, mut told) = Events::channel();
        let troubles = Troubles::new(events);
        for start in (0..2 * FINDINGS as u64).chain(0..9) {
            assert_eq!(troubles.refuse(unread(start)).at, Some(start));
        }
        assert_eq!(troubles.all().len(), FINDINGS);
        drop(troubles);
        let mut lines = 0;
        while let Ok(event) = told.try_recv() {
            assert!(matches!(event, Event::Warning { .. }));
            lines += 1;
        }
        assert_eq!(lines, FINDINGS + 1);
    }
}
