//! `fleecebox verify`.

use super::progress::Progress;
use super::stored::Stored;
use super::{AllowWasi, Failure, Sandboxes, Session, Status, Telling, places, text};
use crate::archive::Manifest;
use crate::contract::with_causes;
use crate::job::audit::{Job, Record};
use crate::job::means::Means;
use crate::job::reading::Reading;
use crate::job::verify::{self, Found, Verified};
use anyhow::anyhow;
use clap::Args;
use serde_json::json;
use std::sync::Arc;
use std::time::Instant;

/// Read a backup completely and compare each block with its digest.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  fleecebox verify 20261123T020000Z-0123456789abcdef --archive /srv/backups"
)]
pub(super) struct Verify {
    #[command(flatten)]
    stored: Stored,
    #[command(flatten)]
    wasi: AllowWasi,
    #[command(flatten)]
    sandboxes: Sandboxes,
    #[command(flatten)]
    pub(super) telling: Telling,
}

impl Verify {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let found = self.stored.find(session)?;
        let allowed = self.wasi.parts(session)?;
        let (namespace, manifest) = (&found.namespace, &found.manifest);
        let reading = Reading::new(&session.config, namespace, manifest, allowed);
        let mut record = reading.record(Job::Verify);
        let ended = self.make(session, &reading, &mut record).await;
        record.used = reading.account.used();
        places::audited(session, record, ended)
    }

    async fn make(
        self,
        session: &Session,
        reading: &Reading<'_>,
        record: &mut Record,
    ) -> Result<(), Failure> {
        let _slot = places::slot(session, reading.restores.tenant().as_ref())?;
        let cache = places::cache(session)?;
        let program = self.sandboxes.program();
        let started = Instant::now();
        places::begun(session, record)?;
        let (events, progress) = Progress::start(session.quiet);
        let (cancel, account) = (session.cancel.clone(), Arc::clone(&reading.account));
        let means = Means::new(events, cancel, account, program);
        let verified = verify::verify(reading, &cache, means).await;
        progress.finish().await;
        let verified = verified.map_err(Failure::of)?;
        record.doubts = verified.doubts.iter().map(ToString::to_string).collect();
        let manifest = reading.manifest;
        tell(session, manifest, &verified);
        judge(manifest, &verified.found)?;
        if !session.json {
            let volumes = manifest.record.volumes.iter();
            let bytes = text::total(volumes.map(|volume| volume.root.size()));
            say!(
                "backup {} is intact ({})",
                manifest.backup,
                text::pace(bytes, started.elapsed())
            );
        }
        Ok(())
    }
}

/// A `volume`, an `object` or what is `kept`, its name, and what is wrong with it.
fn words(found: &Found) -> (&'static str, String, String) {
    match found {
        Found::Volume { name, finding } => ("volume", name.clone(), with_causes(finding)),
        Found::Object { name, error } => ("object", name.to_string(), with_causes(error)),
        Found::Kept { name, error } => ("kept", name.to_string(), with_causes(error)),
    }
}

fn tell(session: &Session, manifest: &Manifest, verified: &Verified) {
    let found = verified.found.iter().map(words);
    let doubts: Vec<_> = verified.doubts.iter().map(ToString::to_string).collect();
    if session.json {
        let findings = found.map(|(kind, name, finding)| json!({ kind: name, "finding": finding }));
        let findings: Vec<_> = findings.collect();
        show!(
            "{:#}",
            json!({
                "backup": manifest.backup, "intact": findings.is_empty(), "findings": findings, "doubts": doubts,
            })
        );
    } else {
        for (kind, name, finding) in found {
            show!("{kind} {name}: {}", text::one_line(&finding));
        }
    }
    for doubt in &doubts {
        warn!(
            "backup {} is suspect: version {} made it, and {doubt}",
            manifest.backup, manifest.record.host_version
        );
    }
}

/// Nothing was found, or it is a failure after a result that says all of it.
fn judge(manifest: &Manifest, found: &[Found]) -> Result<(), Failure> {
    if found.is_empty() {
        return Ok(());
    }
    let is_denied = |found| Status::of_found(found) == Status::Denied;
    let (status, what) = match found.iter().all(is_denied) {
        true => (Status::Denied, "cannot be read"),
        false => (Status::Unusable, "is damaged"),
    };
    let backup = manifest.backup;
    let said = anyhow!("backup {backup} {what} ({} findings)", found.len());
    Err(Failure::Told(status, said))
}
