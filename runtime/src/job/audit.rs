//! The audit: one record of each job's beginning and one of its end, in a file that is only ever appended to.
//!
//! A record is one line of JSON, written by one call and made durable before the command ends. Appends of several
//! processes do not mix (O_APPEND, open(2)), and what a crash tore is a line that is no JSON, with the next record on a
//! line of its own.
//!
//! A job that is killed writes no end. While it runs it holds the lock on a file of its own, with its record in it, which
//! the kernel lets go of however the job ends: whoever finds such a file and gets its lock writes down that the job died.

use crate::archive::ComponentId;
use crate::config::{Limits, Names};
use crate::contract::{Wasi, with_causes};
use crate::grants::account::Used;
use crate::policy::Decision;
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, File, OpenOptions, OpenOptionsExt};
use cap_tempfile::TempFile;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::time::Instant;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Its name in the state folder.
pub const FILE: &str = "audit.jsonl";

/// The folder beside it with a file for each job that runs.
const RUNNING: &str = "jobs";

/// Longest record that is read back, in bytes: far more than the longest configuration makes of one.
const MAX_RECORD: u64 = 1 << 20;

/// What a job was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// A backup.
    Backup,
    /// A point in time held for a tool.
    Export,
    /// A restore.
    Restore,
    /// A backup that is served to whoever may connect.
    Serve,
    /// A verify.
    Verify,
}

/// What became of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It has begun: the record of its end comes later.
    Begun,
    /// It is done.
    Done,
    /// It was refused before it began: denied by the policy, or a mistake of the user's.
    Refused,
    /// It failed.
    Failed,
    /// A signal ended it.
    Cancelled,
    /// Its process ended without a word. Written by the next one.
    Died,
}

/// One job.
#[derive(Debug, Serialize)]
pub struct Record {
    /// The same in both records of a job, and in no other's.
    id: String,
    /// When it was written, in UTC.
    time: String,
    /// What it was asked for.
    job: Job,
    /// Whose it is; none without tenants.
    pub tenant: Option<String>,
    /// The VM, as it was named.
    pub vm: String,
    /// The provider, as it was named.
    pub provider: Option<String>,
    /// The provider's component.
    pub component_sha256: Option<ComponentId>,
    /// The backup that was made or read.
    pub backup: Option<String>,
    /// What was granted.
    pub granted: Option<Granted>,
    /// What was used of it, and which calls were refused how often.
    pub used: Used,
    /// From start to end.
    seconds: f64,
    /// What became of it.
    outcome: Outcome,
    /// Why, in one line; none where it is done.
    error: Option<String>,
    /// What may be wrong with the backup that was read, although nothing was found.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub doubts: Vec<String>,
    #[serde(skip)]
    started: Instant,
    #[serde(skip)]
    running: Option<Running>,
}

/// The file of a job that runs, locked.
#[derive(Debug)]
struct Running {
    folder: Dir,
    name: String,
    #[allow(dead_code, reason = "held for its lock")]
    lock: std::fs::File,
}

/// What a backup was granted.
#[derive(Debug, Clone, Serialize)]
pub struct Granted {
    namespace: String,
    volumes: Names,
    read: bool,
    discard: bool,
    attachments: BTreeSet<String>,
    wasi: BTreeSet<Wasi>,
    limits: Limits,
}

impl Granted {
    /// From the decision, and the attachments that the VM has of those that it grants.
    pub fn new(decision: &Decision, attachments: impl Iterator<Item = String>) -> Self {
        let grant = &decision.provider.grant;
        Self {
            namespace: decision.namespace.to_string(),
            volumes: decision.volumes.clone(),
            read: grant.read,
            discard: grant.discard,
            attachments: attachments.collect(),
            wasi: grant.wasi(),
            limits: decision.provider.limits.clone(),
        }
    }
}

impl Record {
    /// A job that begins now.
    pub fn begin(job: Job, vm: String) -> Self {
        // Two jobs of one id would be told apart by nothing but their times, which is no harm worth failing for.
        let id = getrandom::u64().unwrap_or_else(|_| std::process::id().into());
        Self {
            id: format!("{id:016x}"),
            time: String::new(),
            job,
            tenant: None,
            vm,
            provider: None,
            component_sha256: None,
            backup: None,
            granted: None,
            used: Used::default(),
            seconds: 0.0,
            outcome: Outcome::Done,
            error: None,
            doubts: Vec::new(),
            started: Instant::now(),
            running: None,
        }
    }

    /// Whether its beginning was written down, so that its end has to be.
    pub fn has_begun(&self) -> bool {
        self.running.is_some()
    }

    /// It has ended.
    pub fn end(&mut self, outcome: Outcome, error: Option<String>) {
        self.time = now();
        self.seconds = self.started.elapsed().as_secs_f64();
        self.outcome = outcome;
        self.error = error;
    }
}

fn now() -> String {
    // Fails for years beyond 9999 only.
    OffsetDateTime::now_utc()
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// The file, open for appending.
#[derive(Debug)]
pub struct Audit(File);

impl Audit {
    /// Opens or makes the file in the state folder.
    pub fn open(state: &Dir) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600).read(true);
        Ok(Self(state.open_with(FILE, &options)?))
    }

    /// Writes down that a job begins, before it does anything, and that others have died since.
    pub fn begin(&mut self, state: &Dir, record: &mut Record) -> io::Result<()> {
        // What cannot be said of others must not keep this one from being done.
        let _ = self.find_dead(state);
        let folder = running(state)?;
        record.end(Outcome::Begun, None);
        let mut file = TempFile::new(&folder)?;
        let lock = file.as_file().try_clone()?.into_std();
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        serde_json::to_writer(&mut file, &*record).map_err(io::Error::other)?;
        file.as_file().sync_all()?;
        let name = format!("{}.json", record.id);
        // It appears whole and locked.
        file.replace(&name)?;
        record.running = Some(Running { folder, name, lock });
        self.append(record)
    }

    /// Writes down how a job ended.
    pub fn end(&mut self, record: &mut Record) -> io::Result<()> {
        self.append(record)?;
        match record.running.take() {
            Some(running) => running.folder.remove_file(running.name),
            None => Ok(()),
        }
    }

    /// Writes down which jobs have died. One that cannot be looked at does not hide the others.
    pub fn find_dead(&mut self, state: &Dir) -> io::Result<()> {
        let folder = running(state)?;
        let mut looked = Ok(());
        for entry in folder.entries()? {
            let name = entry?.file_name();
            if name.to_string_lossy().ends_with(".json") {
                looked = looked.and(self.look(&folder, &name).map_err(|error| {
                    let why = format!("{}: {}", name.display(), with_causes(&error));
                    io::Error::new(error.kind(), why)
                }));
            }
        }
        looked
    }

    fn look(&mut self, folder: &Dir, name: &OsStr) -> io::Result<()> {
        let file = match folder.open(name) {
            Ok(file) => file.into_std(),
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(());
        }
        // Another process may have been faster.
        if std::os::unix::fs::MetadataExt::nlink(&file.metadata()?) == 0 {
            return Ok(());
        }
        let mut text = Vec::new();
        (&file).take(MAX_RECORD).read_to_end(&mut text)?;
        let mut record: Value = serde_json::from_slice(&text).unwrap_or_default();
        if record.is_object() {
            record["outcome"] = json!(Outcome::Died);
            record["time"] = json!(now());
            record["error"] = json!("its process ended without a word, as one does that is killed");
            self.append(&record)?;
        }
        folder.remove_file(name)
    }

    /// Appends one record, durably.
    fn append(&mut self, record: &impl Serialize) -> io::Result<()> {
        let mut line = Vec::new();
        if self.is_torn()? {
            line.push(b'\n');
        }
        serde_json::to_writer(&mut line, record).map_err(io::Error::other)?;
        line.push(b'\n');
        let written = self.0.write(&line)?;
        if written != line.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.0.sync_all()
    }

    /// Whether a crash left a line without its end.
    fn is_torn(&self) -> io::Result<bool> {
        use cap_std::fs::FileExt;
        let length = self.0.metadata()?.len();
        let Some(last) = length.checked_sub(1) else {
            return Ok(false);
        };
        let mut end = [0];
        self.0.read_exact_at(&mut end, last)?;
        Ok(end != *b"\n")
    }
}

fn running(state: &Dir) -> io::Result<Dir> {
    let mut private = DirBuilder::new();
    private.mode(0o700);
    match state.create_dir_with(RUNNING, &private) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => state.open_dir(RUNNING),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn records_are_lines_and_a_torn_one_spoils_no_other() {
        let path = tempfile::tempdir().unwrap();
        let state = Dir::open_ambient_dir(path.path(), cap_std::ambient_authority()).unwrap();
        let append = |outcome| {
            let mut record = Record::begin(Job::Backup, "web".into());
            record.end(outcome, None);
            Audit::open(&state).unwrap().end(&mut record).unwrap();
        };
        append(Outcome::Done);
        let mut options = OpenOptions::new();
        let mut torn = state.open_with(FILE, options.append(true)).unwrap();
        torn.write_all(b"{\"time\":\"2026").unwrap();
        append(Outcome::Cancelled);
        append(Outcome::Failed);
        let text = state.read_to_string(FILE).unwrap();
        let parsed: Vec<Option<Value>> = text
            .lines()
            .map(|line| serde_json::from_str(line).ok())
            .collect();
        let outcomes: Vec<_> = parsed
            .iter()
            .map(|record| {
                record
                    .as_ref()
                    .and_then(|record| record["outcome"].as_str())
            })
            .collect();
        assert_eq!(
            outcomes,
            [Some("done"), None, Some("cancelled"), Some("failed")]
        );
    }

    #[test]
    fn a_job_whose_process_is_gone_is_found_dead_once_and_one_that_runs_is_not() {
        let path = tempfile::tempdir().unwrap();
        let state = Dir::open_ambient_dir(path.path(), cap_std::ambient_authority()).unwrap();
        let mut audit = Audit::open(&state).unwrap();
        let begin = |audit: &mut Audit, vm: &str| {
            let mut record = Record::begin(Job::Backup, vm.into());
            audit.begin(&state, &mut record).unwrap();
            record
        };
        let killed = begin(&mut audit, "killed");
        let mut runs = begin(&mut audit, "runs");
        // As the kernel lets go of a lock when a process ends.
        drop(killed);
        audit.find_dead(&state).unwrap();
        let mut ends = begin(&mut audit, "ends");
        ends.end(Outcome::Done, None);
        audit.end(&mut ends).unwrap();
        runs.end(Outcome::Failed, None);
        audit.end(&mut runs).unwrap();
        audit.find_dead(&state).unwrap();
        let text = state.read_to_string(FILE).unwrap();
        let records: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let told: Vec<_> = records
            .iter()
            .map(|it| (it["vm"].as_str().unwrap(), it["outcome"].as_str().unwrap()))
            .collect();
        assert_eq!(
            told,
            [
                ("killed", "begun"),
                ("runs", "begun"),
                ("killed", "died"),
                ("ends", "begun"),
                ("ends", "done"),
                ("runs", "failed"),
            ]
        );
        assert_eq!(records[0]["id"], records[2]["id"]);
        assert_ne!(records[0]["id"], records[1]["id"]);
        assert!(
            state
                .open_dir(RUNNING)
                .unwrap()
                .entries()
                .unwrap()
                .next()
                .is_none()
        );
    }
}
