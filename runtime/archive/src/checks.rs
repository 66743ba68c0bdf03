//! What was read back and matched, and what did not: so that no damage is ever referred to again, and not everything is
//! read every day.
//!
//! A job that reads stored bytes and compares them notes the result, and at its end writes it down in `checks/`:
//!
//! ```text
//! seen-<16 hex digits>    matched; believed for some days        JSON   '\n'   keyed BLAKE3 of all before, in hex
//! wrong-<16 hex digits>   did not match; believed for ever
//! ```
//! Each is written once. A `seen` record that is damaged, of the future or too old says nothing, and the next backup
//! removes it. A `wrong` record that is damaged may have named anything, so nothing counts as seen then.
//!
//! # The clock
//!
//! A record bears the time at which its job began. One of the future means that the clock went back: how long ago the
//! others were written cannot be told either then, and nothing counts as seen. A clock that went forward makes records
//! old before their time. Either costs reading and believes nothing for longer.

use super::directory;
use super::error::Error;
use super::lock;
use super::name::random;
use cap_std::fs::Dir;
use fleecebox_contract::extent::{Extent, ExtentSet};
use fleecebox_contract::with_causes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Mutex;
use std::time::Duration;
use time::OffsetDateTime;

/// In the namespace's directory.
const CHECKS: &str = "checks";
const SEEN: &str = "seen-";
const WRONG: &str = "wrong-";

/// Longest record, in bytes: some 60 for each pack, of which a job of 64 TiB has a million.
const RECORD_LIMIT: u64 = 64 << 20;

/// What clocks of several hosts may differ by before one of them counts as having gone back.
const CLOCKS_DIFFER: Duration = Duration::from_secs(300);

/// For how long bytes that were read and matched are believed, unless it is configured.
pub const BELIEVED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What is read back before it is referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recheck {
    /// All of it, whatever is recorded.
    Everything,
    /// What was not read, or longer ago.
    OlderThan(Duration),
}

/// Who noted what is written down.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Author {
    /// A backup that was committed. It also removes records that say nothing any more.
    Backup,
    /// A backup that was not: it leaves nothing but the damage that it found.
    Failed,
    /// Whoever only reads.
    Verify,
}

/// Bytes of files, by their paths in the namespace.
type Extents = HashMap<String, ExtentSet>;

/// What is known of stored bytes in one process.
pub(super) struct Checks {
    root: Dir,
    key: [u8; 32],
    began: OffsetDateTime,
    state: Mutex<Known>,
}

struct Known {
    recheck: Recheck,
    /// Read from the records when it is first asked for.
    recorded: Option<Recorded>,
    /// By this process.
    seen: Extents,
    /// By this process, and not written down yet.
    wrong: Extents,
}

#[derive(Default)]
struct Recorded {
    /// By when it was seen no more, whoever looks.
    seen: Extents,
    wrong: Extents,
    /// `seen` records that say nothing any more.
    useless: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    /// For people: whose job it was.
    by: String,
    #[serde(with = "time::serde::rfc3339")]
    when: OffsetDateTime,
    files: BTreeMap<String, Vec<Extent>>,
}

impl Checks {
    /// Of the namespace in this directory.
    pub(super) fn new(root: Dir, key: [u8; 32]) -> Self {
        Self {
            root,
            key,
            began: OffsetDateTime::now_utc(),
            state: Mutex::new(Known {
                recheck: Recheck::OlderThan(BELIEVED),
                recorded: None,
                seen: Extents::new(),
                wrong: Extents::new(),
            }),
        }
    }

    /// Says what is to be read again. What was read in this process is not, whatever it says.
    pub(super) fn set_recheck(&self, recheck: Recheck) {
        let mut state = lock(&self.state);
        state.recheck = recheck;
        state.recorded = None;
    }

    /// Whether all of these bytes were seen in this process or lately.
    pub(super) fn is_seen(&self, file: &str, bytes: Extent) -> bool {
        self.with(|state, recorded| {
            let is_in = |files: &Extents| files.get(file).is_some_and(|set| set.contains(bytes));
            is_in(&state.seen) || is_in(&recorded.seen)
        })
    }

    /// Whether any of these bytes were found wrong, ever.
    pub(super) fn is_wrong(&self, file: &str, bytes: Extent) -> bool {
        self.with(|state, recorded| {
            let is_in = |files: &Extents| files.get(file).is_some_and(|set| set.overlaps(bytes));
            is_in(&state.wrong) || is_in(&recorded.wrong)
        })
    }

    /// Whether anything of the file was found wrong, ever.
    pub(super) fn has_wrong(&self, file: &str) -> bool {
        self.with(|state, recorded| {
            state.wrong.contains_key(file) || recorded.wrong.contains_key(file)
        })
    }

    /// These bytes were read and are what was stored.
    pub(super) fn note_seen(&self, file: &str, bytes: Extent) {
        let mut state = lock(&self.state);
        note(&mut state.seen, file, bytes);
    }

    /// These bytes are not what was stored, or cannot be had.
    pub(super) fn note_wrong(&self, file: &str, bytes: Extent) {
        let mut state = lock(&self.state);
        if let Some(seen) = state.seen.get_mut(file) {
            seen.remove(bytes);
        }
        note(&mut state.wrong, file, bytes);
    }

    /// Writes down what was noted, as far as `by` is to be believed.
    pub(super) fn record(&self, by: &str, author: Author) -> Result<(), Error> {
        let mut state = lock(&self.state);
        let written = self.write_all(&state, by, author);
        if written.is_ok() {
            let Known {
                wrong, recorded, ..
            } = &mut *state;
            let wrong = std::mem::take(wrong);
            if let Some(recorded) = recorded {
                for (file, set) in wrong {
                    let known = recorded.wrong.entry(file).or_default();
                    set.iter().for_each(|extent| known.insert(extent));
                }
            }
        }
        written
    }

    fn write_all(&self, state: &Known, by: &str, author: Author) -> Result<(), Error> {
        let seen = match author {
            // An empty one says what time it was.
            Author::Backup => true,
            Author::Verify => !state.seen.is_empty(),
            Author::Failed => false,
        };
        if state.wrong.is_empty() && !seen {
            return Ok(());
        }
        let dir = directory::open_or_make_dir(&self.root, CHECKS).map_err(Error::at(CHECKS))?;
        if !state.wrong.is_empty() {
            self.write(&dir, WRONG, by, &state.wrong)?;
        }
        if seen {
            self.write(&dir, SEEN, by, &state.seen)?;
        }
        if author == Author::Backup
            && let Some(recorded) = &state.recorded
        {
            for name in &recorded.useless {
                directory::remove(&dir, name);
            }
        }
        directory::sync(&dir)
            .and_then(|()| directory::sync(&self.root))
            .map_err(Error::at(CHECKS))
    }

    fn write(&self, dir: &Dir, kind: &str, by: &str, files: &Extents) -> Result<(), Error> {
        let listed = files.iter().filter(|(_, set)| !set.is_empty());
        let record = Record {
            by: by.into(),
            when: self.began,
            files: listed
                .map(|(file, set)| (file.clone(), set.iter().collect()))
                .collect(),
        };
        let mut bytes =
            serde_json::to_vec(&record).map_err(|error| Error::Serialise(with_causes(&error)))?;
        bytes.push(b'\n');
        let digest = blake3::keyed_hash(&self.key, &bytes);
        bytes.extend(digest.to_hex().as_bytes());
        let name = format!("{kind}{}", hex::encode(random::<8>()?));
        let temporary = format!("{name}{}", directory::TEMPORARY);
        directory::write_new(dir, &temporary, &bytes)
            .and_then(|()| dir.rename(&temporary, dir, &name))
            .map_err(Error::at(&name))
    }

    fn with<T>(&self, look: impl FnOnce(&Known, &Recorded) -> T) -> T {
        let mut state = lock(&self.state);
        if state.recorded.is_none() {
            let recorded = self.load(state.recheck).unwrap_or_else(|error| {
                tracing::warn!(error = %with_causes(&error), "what was read back before cannot be told");
                Recorded::default()
            });
            state.recorded = Some(recorded);
        }
        match &state.recorded {
            Some(recorded) => look(&state, recorded),
            None => look(&state, &Recorded::default()),
        }
    }

    fn load(&self, recheck: Recheck) -> Result<Recorded, Error> {
        let mut found = Recorded::default();
        let dir = match self.root.open_dir(CHECKS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            dir => dir.map_err(Error::at(CHECKS))?,
        };
        let mut doubtful = recheck == Recheck::Everything;
        for entry in dir.entries().map_err(Error::at(CHECKS))? {
            let name = entry.map_err(Error::at(CHECKS))?.file_name();
            let Some(name) = name.to_str().filter(|name| is_record(name)) else {
                continue;
            };
            let record = self.read(&dir, name);
            if name.starts_with(WRONG) {
                match record {
                    Some(record) => record.add_to(&mut found.wrong),
                    None => {
                        tracing::warn!(name, "a record of damage is damaged: all is read again");
                        doubtful = true;
                    }
                }
                continue;
            }
            match record {
                Some(record) if record.when > self.began + CLOCKS_DIFFER => {
                    tracing::warn!(name, "the clock went back: all is read again");
                    found.useless.push(name.into());
                    doubtful = true;
                }
                Some(record) if record.is_within(recheck, self.began) => {
                    record.add_to(&mut found.seen)
                }
                // Whoever asks for everything leaves the records to those who do not.
                Some(_) if recheck == Recheck::Everything => {}
                _ => found.useless.push(name.into()),
            }
        }
        if doubtful {
            found.seen.clear();
        }
        Ok(found)
    }

    /// Nothing where it is not as it was written.
    fn read(&self, dir: &Dir, name: &str) -> Option<Record> {
        let bytes = directory::read(dir, name, RECORD_LIMIT).ok()?;
        let (body, digest) = bytes.split_last_chunk::<64>()?;
        let expected = blake3::keyed_hash(&self.key, body);
        if expected.to_hex().as_bytes() != digest {
            return None;
        }
        serde_json::from_slice(body).ok()
    }
}

impl Record {
    fn is_within(&self, recheck: Recheck, now: OffsetDateTime) -> bool {
        let Recheck::OlderThan(most) = recheck else {
            return false;
        };
        // Of two hosts' clocks either may be ahead.
        (now - self.when).unsigned_abs() < most
    }

    fn add_to(self, files: &mut Extents) {
        for (file, extents) in self.files {
            let set = files.entry(file).or_default();
            extents.into_iter().for_each(|extent| set.insert(extent));
        }
    }
}

fn is_record(name: &str) -> bool {
    (name.starts_with(SEEN) || name.starts_with(WRONG)) && !name.ends_with(directory::TEMPORARY)
}

fn note(files: &mut Extents, file: &str, bytes: Extent) {
    match files.get_mut(file) {
        Some(set) => set.insert(bytes),
        None => drop(files.insert(file.into(), ExtentSet::from_iter([bytes]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cap_std::ambient_authority;
    use time::ext::NumericalDuration;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// As a job that begins `hours` from now finds it.
        fn after(&self, hours: i64) -> Checks {
            let root = Dir::open_ambient_dir(self.0.path(), ambient_authority()).unwrap();
            let mut checks = Checks::new(root, [1; 32]);
            checks.began += hours.hours();
            checks
        }

        fn records(&self, kind: &str) -> Vec<std::path::PathBuf> {
            let all = std::fs::read_dir(self.0.path().join(CHECKS)).unwrap();
            let paths = all.map(|entry| entry.unwrap().path());
            let is_of = |path: &std::path::PathBuf| {
                path.file_name()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .starts_with(kind)
            };
            paths.filter(is_of).collect()
        }
    }

    fn bytes(start: u64, end: u64) -> Extent {
        Extent::between(start, end).unwrap()
    }

    #[test]
    fn what_was_seen_is_believed_for_some_days_and_not_under_any_clock_that_went_back() {
        let folder = Folder::new();
        let first = folder.after(0);
        first.note_seen("packs/a.pack", bytes(0, 10));
        first.note_seen("packs/a.pack", bytes(10, 20));
        assert!(first.is_seen("packs/a.pack", bytes(5, 15)));
        first.record("backup a", Author::Backup).unwrap();
        let seen = |hours| folder.after(hours).is_seen("packs/a.pack", bytes(0, 20));
        assert!(seen(0) && seen(24 * 7 - 1));
        assert!(!seen(24 * 7 + 1));
        // The record is of the future then.
        assert!(!seen(-1) && !seen(-24 * 3) && !seen(-24 * 400));
        assert!(!folder.after(0).is_seen("packs/a.pack", bytes(0, 21)));
        assert!(!folder.after(0).is_seen("packs/b.pack", bytes(0, 20)));
        let all = folder.after(0);
        all.set_recheck(Recheck::Everything);
        assert!(!all.is_seen("packs/a.pack", bytes(0, 20)));
        let none = folder.after(0);
        none.set_recheck(Recheck::OlderThan(Duration::ZERO));
        assert!(!none.is_seen("packs/a.pack", bytes(0, 20)));
    }

    #[test]
    fn a_clock_that_was_ahead_for_one_job_costs_the_next_one_reading_and_no_other() {
        let folder = Folder::new();
        let right = folder.after(0);
        right.note_seen("packs/a.pack", bytes(0, 10));
        right.record("backup a", Author::Backup).unwrap();
        folder
            .after(24 * 900)
            .record("backup b", Author::Backup)
            .unwrap();
        let next = folder.after(1);
        assert!(!next.is_seen("packs/a.pack", bytes(0, 10)));
        next.note_seen("packs/a.pack", bytes(0, 10));
        next.record("backup c", Author::Backup).unwrap();
        assert!(folder.after(2).is_seen("packs/a.pack", bytes(0, 10)));
    }

    #[test]
    fn what_was_wrong_is_wrong_for_ever() {
        let folder = Folder::new();
        let first = folder.after(0);
        first.note_seen("packs/a.pack", bytes(0, 10));
        first.note_wrong("packs/a.pack", bytes(4, 6));
        assert!(!first.is_seen("packs/a.pack", bytes(4, 5)));
        first.record("verify of a", Author::Verify).unwrap();
        assert!(first.is_wrong("packs/a.pack", bytes(5, 7)));
        for hours in [-24 * 400, 0, 24 * 400] {
            let later = folder.after(hours);
            assert!(later.is_wrong("packs/a.pack", bytes(0, 5)));
            assert!(!later.is_wrong("packs/a.pack", bytes(6, 10)));
        }
    }

    #[test]
    fn a_damaged_record_of_what_was_seen_says_nothing_and_one_of_damage_casts_doubt_on_all() {
        for (kind, others) in [(SEEN, false), (WRONG, false)] {
            let folder = Folder::new();
            let checks = folder.after(0);
            checks.note_seen("packs/a.pack", bytes(0, 10));
            checks.note_wrong("packs/b.pack", bytes(0, 10));
            checks.record("backup a", Author::Backup).unwrap();
            let [path] = &folder.records(kind)[..] else {
                panic!("one record of a kind");
            };
            let mut damaged = std::fs::read(path).unwrap();
            damaged[20] ^= 1;
            std::fs::write(path, damaged).unwrap();
            let later = folder.after(1);
            assert_eq!(
                later.is_seen("packs/a.pack", bytes(0, 10)),
                others,
                "{kind}"
            );
        }
    }

    #[test]
    fn records_that_say_nothing_any_more_are_removed_by_the_next_backup() {
        let folder = Folder::new();
        folder.after(0).record("backup a", Author::Backup).unwrap();
        let later = folder.after(24 * 8);
        later.is_seen("packs/a.pack", bytes(0, 1));
        later.record("backup b", Author::Backup).unwrap();
        assert_eq!(folder.records(SEEN).len(), 1);
    }
}
