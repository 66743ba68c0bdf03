//! The audit: one record for each job, whatever became of it, in a file that is only ever appended to.
//!
//! A record is one line of JSON, written by one call and made durable before the command ends. Appends of several
//! processes do not mix (O_APPEND, open(2)), and what a crash tore is a line that is no JSON, with the next record on a
//! line of its own.

use crate::archive::ComponentId;
use crate::grants::account::Used;
use crate::policy::{Decision, Limits, Names};
use cap_std::fs::{Dir, File, OpenOptions, OpenOptionsExt};
use serde::Serialize;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::Instant;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Its name in the state folder.
pub const FILE: &str = "audit.jsonl";

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
    /// A verify.
    Verify,
}

/// What became of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is done.
    Done,
    /// It was refused before it began: denied by the policy, or a mistake of the user's.
    Refused,
    /// It failed.
    Failed,
    /// A signal ended it.
    Cancelled,
}

/// One job.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// When it ended, in UTC.
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
    #[serde(skip)]
    started: Instant,
}

/// What a backup was granted.
#[derive(Debug, Clone, Serialize)]
pub struct Granted {
    namespace: String,
    volumes: Names,
    read: bool,
    discard: bool,
    attachments: BTreeSet<String>,
    limits: Limits,
}

impl Granted {
    /// From the decision, and the attachments that the VM has of those that it grants.
    pub fn new(decision: &Decision, attachments: impl Iterator<Item = String>) -> Self {
        let grant = decision.provider.grant;
        Self {
            namespace: decision.namespace.to_string(),
            volumes: decision.volumes.clone(),
            read: grant.read,
            discard: grant.discard,
            attachments: attachments.collect(),
            limits: decision.provider.limits.clone(),
        }
    }
}

impl Record {
    /// A job that begins now.
    pub fn begin(job: Job, vm: String) -> Self {
        Self {
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
            started: Instant::now(),
        }
    }

    /// It has ended.
    pub fn end(&mut self, outcome: Outcome, error: Option<String>) {
        let now = OffsetDateTime::now_utc();
        // Fails for years beyond 9999 only.
        self.time = now.format(&Rfc3339).unwrap_or_default();
        self.seconds = self.started.elapsed().as_secs_f64();
        self.outcome = outcome;
        self.error = error;
    }
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

    /// Appends one record, durably.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
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
            Audit::open(&state).unwrap().append(&record).unwrap();
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
}
