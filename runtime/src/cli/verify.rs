//! `fleecebox verify`.

use super::progress::Progress;
use super::reading::Reading;
use super::stored::Stored;
use super::{AllowWasi, Failure, Sandboxes, Session, Status, target, text};
use crate::archive::{Manifest, Namespace};
use crate::job::audit::Job;
use crate::job::doubts;
use crate::job::replay::{self, Order};
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
}

/// Something that is not as it was backed up, and in which `volume` or `object`.
struct Found {
    kind: &'static str,
    name: String,
    finding: String,
    status: Status,
}

impl Verify {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let (namespace, manifest) = self.stored.find(session)?;
        let allowed = self.wasi.parts(session)?;
        let mut reading = Reading::begin(session, Job::Verify, &manifest, allowed);
        let ended = self
            .make(session, &namespace, &manifest, &mut reading)
            .await;
        reading.end(ended)
    }

    async fn make(
        self,
        session: &Session,
        namespace: &Arc<Namespace>,
        manifest: &Arc<Manifest>,
        reading: &mut Reading<'_>,
    ) -> Result<(), Failure> {
        let _slot = reading.slot()?;
        let cache = target::cache(session)?;
        let program = self.sandboxes.program();
        let started = Instant::now();
        reading.begun()?;
        let (events, progress) = Progress::start(session.quiet);
        let mut findings = Vec::new();
        let mut ended = Ok(());
        for volume in &manifest.record.volumes {
            let order = Order {
                namespace,
                manifest,
                volume,
                output: None,
                restores: &reading.restores,
                account: &reading.account,
                cache: &cache,
                program: &program,
                events: &events,
                cancel: &session.cancel,
                all_findings: true,
            };
            match replay::replay(order).await {
                Ok(found) => findings.extend(found.into_iter().map(|finding| Found {
                    kind: "volume",
                    name: volume.name.clone(),
                    finding: finding.to_string(),
                    status: Status::of_finding(&finding),
                })),
                Err(error) => {
                    ended = Err(target::failed(error));
                    break;
                }
            }
        }
        if ended.is_ok() {
            match replay::check_objects(namespace, manifest, &session.cancel).await {
                Ok(found) => findings.extend(found.into_iter().map(|(name, error)| Found {
                    kind: "object",
                    name: name.to_string(),
                    finding: error.to_string(),
                    status: Status::Unusable,
                })),
                Err(error) => ended = Err(target::failed(error)),
            }
        }
        let by = format!("verify of {}", manifest.backup);
        match namespace.record_checks(&by) {
            Ok(()) => {}
            // Whoever may only read gets what was asked for.
            Err(error) if findings.is_empty() => {
                events.note(format!("what was found is not recorded: {error}"));
            }
            Err(error) => events.warn(format!("what was found is not recorded: {error}")),
        }
        drop(events);
        progress.finish().await;
        ended?;
        let doubts = doubts::of(manifest);
        let left = doubts.iter().filter(|it| !it.is_settled_by_verify());
        let left: Vec<_> = left.map(ToString::to_string).collect();
        reading.doubt(&left);
        if session.json {
            let findings: Vec<_> = findings
                .iter()
                .map(|found| json!({ found.kind: found.name, "finding": found.finding }))
                .collect();
            show!(
                "{:#}",
                json!({
                    "backup": manifest.backup, "intact": findings.is_empty(), "findings": findings, "doubts": left,
                })
            );
        } else {
            for found in &findings {
                show!(
                    "{} {}: {}",
                    found.kind,
                    found.name,
                    text::one_line(&found.finding)
                );
            }
        }
        for doubt in &left {
            say!(
                "warning: backup {} is suspect: version {} made it, and {doubt}",
                manifest.backup,
                manifest.record.host_version
            );
        }
        if !findings.is_empty() {
            let denied = findings.iter().all(|found| found.status == Status::Denied);
            let (status, what) = match denied {
                true => (Status::Denied, "cannot be read"),
                false => (Status::Unusable, "is damaged"),
            };
            return Err(Failure::Told(
                status,
                anyhow!(
                    "backup {} {what} ({} findings)",
                    manifest.backup,
                    findings.len()
                ),
            ));
        }
        let volumes = manifest.record.volumes.iter();
        let bytes = text::total(volumes.map(|volume| volume.root.size()));
        if !session.json {
            say!(
                "backup {} is intact ({})",
                manifest.backup,
                text::pace(bytes, started.elapsed())
            );
        }
        Ok(())
    }
}
