//! `fleecebox audit`.

use super::{Failure, Session, Status, places, text};
use crate::contract::with_causes;
use crate::job::audit::FILE;
use crate::job::doubts::{self, Looked, Suspect};
use anyhow::{Context, anyhow};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Show what became of jobs, and what they used of what they were granted.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox audit acme --json\n  fleecebox audit --archive main")]
pub(super) struct Audit {
    /// Only jobs of this tenant
    tenant: Option<String>,
    /// Instead, name the backups in this archive that are suspect: made by a version that proved less, or built on such
    #[arg(long, value_name = "NAME|FOLDER", conflicts_with = "tenant")]
    archive: Option<String>,
}

impl Audit {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        if let Some(archive) = &self.archive {
            return suspects(session, archive);
        }
        let (state, path) = places::folder(&session.state)?;
        places::find_dead(session)?;
        let text = match state.read(FILE) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => Err(error)
                .with_context(|| format!("{} cannot be read", path.join(FILE).display()))
                .map_err(Failure::Failed)?,
        };
        let mut records = Vec::new();
        let mut torn = 0;
        for (number, line) in (1..).zip(text.lines()) {
            match serde_json::from_str::<Value>(line) {
                Ok(record) => records.push(record),
                Err(_) => {
                    torn += 1;
                    say!("warning: line {number} of {FILE} was torn by a crash");
                }
            }
        }
        // Of a job that has ended its end says everything.
        let begun = |record: &Value| record["outcome"] == "begun";
        let ended: BTreeSet<String> = records
            .iter()
            .filter(|record| !begun(record))
            .filter_map(|record| record["id"].as_str().map(str::to_owned))
            .collect();
        records.retain(|it| !begun(it) || it["id"].as_str().is_none_or(|id| !ended.contains(id)));
        if let Some(tenant) = &self.tenant {
            records.retain(|record| record["tenant"] == *tenant);
        }
        if session.json {
            show!("{:#}", json!(records));
            return whole(torn, LINES);
        }
        for record in &records {
            let field = |key: &str| text::one_line(record[key].as_str().unwrap_or("-"));
            let calls: u64 = record["used"]["refused"]
                .as_object()
                .map_or(0, |codes| codes.values().filter_map(Value::as_u64).sum());
            show!(
                "{}  {:<7} {:<9} {} {} {} {}{}{}",
                field("time"),
                field("job"),
                field("outcome"),
                field("tenant"),
                field("vm"),
                field("provider"),
                field("backup"),
                match calls {
                    0 => String::new(),
                    calls => format!("  {calls} calls refused"),
                },
                match (record["error"].as_str(), record["doubts"][0].as_str()) {
                    (None, None) => String::new(),
                    (None, Some(doubt)) => format!("  suspect: {}", text::one_line(doubt)),
                    (Some(error), _) => format!("  {}", text::one_line(error)),
                },
            );
        }
        whole(torn, LINES)
    }
}

/// What is missing has been told of.
fn whole(bad: usize, what: &str) -> Result<(), Failure> {
    match bad {
        0 => Ok(()),
        bad => Err(Failure::Told(
            Status::Incomplete,
            anyhow!("{bad} {what} cannot be read and are left out"),
        )),
    }
}

const LINES: &str = "lines";
const PARTS: &str = "namespaces or backups";

/// Names the suspects of an archive.
fn suspects(session: &Session, archive: &str) -> Result<(), Failure> {
    let archive = places::archive(session, Some(archive), false)?;
    let mut found = Vec::new();
    let mut bad = 0;
    for name in archive.namespaces().map_err(places::failed)? {
        let in_it = archive
            .namespace(&name)
            .and_then(|namespace| doubts::in_namespace(&namespace));
        match in_it {
            Ok(Looked {
                suspects,
                unreadable,
            }) => {
                found.extend(suspects);
                bad += unreadable.len();
                for (id, error) in unreadable {
                    say!("warning: backup {id}: {}", with_causes(&error));
                }
            }
            Err(error) => {
                bad += 1;
                say!("warning: namespace {name}: {}", with_causes(&error));
            }
        }
    }
    if session.json {
        let all = found.iter().map(|Suspect { manifest, doubts }| {
            json!({
                "backup": manifest.backup,
                "namespace": manifest.namespace,
                "vm": manifest.record.vm,
                "version": manifest.record.host_version,
                "bases": manifest.record.volumes.iter().map(|it| it.base).collect::<Vec<_>>(),
                "doubts": doubts.iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        });
        show!("{:#}", json!(all.collect::<Vec<_>>()));
        return whole(bad, PARTS);
    }
    for Suspect { manifest, doubts } in &found {
        for doubt in doubts {
            show!(
                "{} {} (version {}): {doubt}",
                manifest.backup,
                text::one_line(&manifest.record.vm),
                text::one_line(&manifest.record.host_version)
            );
        }
    }
    if found.is_empty() {
        say!("no backup that can be read is suspect");
    }
    whole(bad, PARTS)
}
