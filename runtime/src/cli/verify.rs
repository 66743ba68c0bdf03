//! `fleecebox verify`.

use super::progress::Progress;
use super::{Failure, Sandboxes, Session, target, text};
use crate::job::replay::{self, Order};
use anyhow::anyhow;
use clap::Args;
use serde_json::json;
use std::time::Instant;

/// Read a backup completely and compare each block with its digest.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  fleecebox verify 20261123T020000Z-0123456789abcdef --archive /srv/backups"
)]
pub(super) struct Verify {
    /// The backup's id
    backup: String,
    /// The archive, by name or folder
    #[arg(long, value_name = "NAME|FOLDER")]
    archive: Option<String>,
    #[command(flatten)]
    sandboxes: Sandboxes,
}

impl Verify {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let archive = target::archive(session, self.archive.as_deref(), false)?;
        let (namespace, manifest) = target::backup(&archive, &self.backup)?;
        let cache = target::cache(session)?;
        let program = self.sandboxes.program();
        let started = Instant::now();
        let (events, progress) = Progress::start(session.quiet);
        let mut findings = Vec::new();
        let mut ended = Ok(());
        for volume in &manifest.record.volumes {
            let order = Order {
                namespace: &namespace,
                manifest: &manifest,
                volume,
                output: None,
                cache: &cache,
                program: &program,
                events: &events,
                cancel: &session.cancel,
                all_findings: true,
            };
            match replay::replay(order).await {
                Ok(found) => findings.extend(
                    found
                        .into_iter()
                        .map(|finding| (volume.name.clone(), finding.to_string())),
                ),
                Err(error) => {
                    ended = Err(target::failed(error));
                    break;
                }
            }
        }
        drop(events);
        progress.finish().await;
        ended?;
        if session.json {
            let findings: Vec<_> = findings
                .iter()
                .map(|(volume, finding)| json!({ "volume": volume, "finding": finding }))
                .collect();
            show!(
                "{:#}",
                json!({ "backup": manifest.backup, "intact": findings.is_empty(), "findings": findings })
            );
        } else {
            for (volume, finding) in &findings {
                show!("{volume}: {}", text::one_line(finding));
            }
        }
        if !findings.is_empty() {
            return Err(Failure::Failed(anyhow!(
                "backup {} is damaged ({} findings)",
                manifest.backup,
                findings.len()
            )));
        }
        let bytes = manifest
            .record
            .volumes
            .iter()
            .map(|volume| volume.root.size())
            .sum();
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
