//! What was read last, within a bound.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Most things that are kept, however small: what each costs besides its bytes then does not show, and neither does
/// looking for the one to give up.
const MOST: usize = 1024;

/// Bytes by their keys. What was used longest ago goes first.
#[derive(Debug)]
pub struct Kept<K> {
    limit: usize,
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K> {
    entries: BTreeMap<K, Entry>,
    bytes: usize,
    /// Grows with each use.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    bytes: Arc<Vec<u8>>,
    used: u64,
}

impl<K: Ord + Clone> Kept<K> {
    /// Keeps at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            state: Mutex::new(State {
                entries: BTreeMap::new(),
                bytes: 0,
                clock: 0,
            }),
        }
    }

    /// What is kept under `key`.
    pub fn find(&self, key: &K) -> Option<Arc<Vec<u8>>> {
        self.find_last(key, key).map(|(_, bytes)| bytes)
    }

    /// What is kept under the last key that is not before `from` and not after `to`.
    pub fn find_last(&self, from: &K, to: &K) -> Option<(K, Arc<Vec<u8>>)> {
        self.with(|state| {
            state.clock += 1;
            let clock = state.clock;
            let (key, entry) = state.entries.range_mut(from..=to).next_back()?;
            entry.used = clock;
            Some((key.clone(), Arc::clone(&entry.bytes)))
        })
    }

    /// Keeps it; what is larger than all that may be kept is not.
    pub fn keep(&self, key: K, bytes: Arc<Vec<u8>>) {
        let size = bytes.len();
        if size > self.limit {
            return;
        }
        self.with(|state| {
            state.clock += 1;
            let used = state.clock;
            if let Some(before) = state.entries.insert(key, Entry { bytes, used }) {
                state.bytes -= before.bytes.len();
            }
            state.bytes += size;
            while state.bytes > self.limit || state.entries.len() > MOST {
                state.give_up_one();
            }
        });
    }

    fn with<T>(&self, work: impl FnOnce(&mut State<K>) -> T) -> T {
        // Nothing in here panics half way.
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<K: Ord + Clone> State<K> {
    fn give_up_one(&mut self) {
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
        if let Some(key) = oldest.map(|(key, _)| key.clone())
            && let Some(entry) = self.entries.remove(&key)
        {
            self.bytes -= entry.bytes.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(length: usize) -> Arc<Vec<u8>> {
        Arc::new(vec![0; length])
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_the_bound_holds() {
        let kept = Kept::new(100);
        kept.keep(1, bytes(40));
        kept.keep(2, bytes(40));
        assert!(kept.find(&1).is_some());
        kept.keep(3, bytes(40));
        assert!(kept.find(&2).is_none());
        assert!(kept.find(&1).is_some() && kept.find(&3).is_some());
        kept.keep(4, bytes(101));
        assert!(kept.find(&4).is_none() && kept.find(&1).is_some());
        // The same key is counted once.
        kept.keep(3, bytes(60));
        assert!(kept.find(&1).is_some() && kept.find(&3).is_some());
        kept.keep(5, bytes(100));
        assert!(kept.find(&1).is_none() && kept.find(&3).is_none());
    }

    #[test]
    fn small_things_are_bounded_too() {
        let kept = Kept::new(1 << 30);
        for key in 0..2 * MOST {
            kept.keep(key, bytes(1));
        }
        assert!(kept.find(&(MOST - 1)).is_none());
        assert!(kept.find(&MOST).is_some());
    }

    #[test]
    fn the_last_one_in_a_range_is_found() {
        let kept = Kept::new(100);
        for key in [10, 20] {
            kept.keep(key, bytes(key));
        }
        let found = |from, to| kept.find_last(&from, &to).map(|(key, _)| key);
        assert_eq!(found(0, 19), Some(10));
        assert_eq!(found(0, 20), Some(20));
        assert_eq!(found(11, 19), None);
        assert_eq!(found(0, 9), None);
    }
}
