//! `fleecebox restore`.

mod destination;
pub(super) mod error;
mod in_use;
mod place;
mod qemu_img;
mod temporary;

use super::progress::Progress;
use super::reading::Reading;
use super::stored::Stored;
use super::{AllowWasi, Failure, Sandboxes, Session, Status, target, text};
use crate::archive::{Manifest, Namespace, VolumeRecord};
use crate::event::Event;
use crate::job::audit::Job;
use crate::job::replay::{self, Order, ReplayError};
use anyhow::anyhow;
use clap::{Args, ValueEnum};
use destination::{Destination, Insistence, Users, unwritten};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Write a backup's volumes to files or block devices.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox restore 20261123T020000Z-0123456789abcdef --archive /srv/backups --to ./restored/
  fleecebox restore 20261123T020000Z-0123456789abcdef --volume scsi0 --to disk.qcow2 --format qcow2
  fleecebox restore 20261123T020000Z-0123456789abcdef --volume scsi0 --to /dev/vg/web --force

Each block is compared with its digest before it is written. A file appears under its name only once it is complete, and is \
its owner's alone; where --force replaces one, it has that one's owner and mode. What is in use is not overwritten, and \
a symbolic link is followed only where root or the caller made it.")]
pub(super) struct Restore {
    #[command(flatten)]
    stored: Stored,
    /// A file or block device for one volume, or an existing folder for any number
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Only this volume
    #[arg(long, value_name = "NAME")]
    volume: Option<String>,
    /// Format of the files
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Replace an existing file, or overwrite a block device
    #[arg(long)]
    force: bool,
    /// With --force: even one that a running VM, another process or the kernel has open
    #[arg(long, requires = "force")]
    even_if_in_use: bool,
    #[command(flatten)]
    wasi: AllowWasi,
    #[command(flatten)]
    sandboxes: Sandboxes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl Restore {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let (namespace, manifest) = self.stored.find(session)?;
        let allowed = self.wasi.parts(session)?;
        let mut reading = Reading::begin(session, Job::Restore, &manifest, allowed);
        let ended = self
            .make(session, &namespace, &manifest, &mut reading)
            .await;
        reading.end(ended)
    }

    async fn make(
        &self,
        session: &Session,
        namespace: &Arc<Namespace>,
        manifest: &Arc<Manifest>,
        reading: &mut Reading<'_>,
    ) -> Result<(), Failure> {
        let _slot = reading.slot()?;
        let volumes = self.volumes(manifest)?;
        let places = self.places(&volumes)?;
        let cache = target::cache(session)?;
        let program = self.sandboxes.program();
        let started = Instant::now();
        reading.begun()?;
        let (events, progress) = Progress::start(session.quiet);
        let insistence = Insistence {
            force: self.force,
            even_if_in_use: self.even_if_in_use,
        };
        let mut written = Vec::new();
        let mut ended = Ok(());
        for (volume, path) in volumes.iter().zip(places) {
            events.send(Event::Total {
                bytes: volume.root.size(),
            });
            let outcome = async {
                let size = volume.root.size();
                let users = Users {
                    config: &session.config,
                    events: &events,
                };
                let opened = Destination::open(&path, size, self.format, insistence, users);
                let output = opened.await.map_err(Failure::of)?;
                let order = Order {
                    namespace,
                    manifest,
                    volume,
                    output: Some(Arc::clone(&output.file)),
                    restores: &reading.restores,
                    account: &reading.account,
                    cache: &cache,
                    program: &program,
                    events: &events,
                    cancel: &session.cancel,
                    all_findings: false,
                };
                let findings = replay::replay(order).await.map_err(|error| match error {
                    ReplayError::Output(error) => Failure::of(unwritten(&path, error)),
                    error => Failure::of(error),
                })?;
                if let Some(finding) = findings.first() {
                    let said = anyhow!("volume {}: {finding}", volume.name);
                    return Err(match Status::of_finding(finding) {
                        Status::Denied => Failure::Denied(said),
                        _ => Failure::Unusable(said),
                    });
                }
                let completed = output.complete(self.format, &events, &session.cancel);
                completed.await.map_err(Failure::of)
            };
            match outcome.await {
                Ok(()) => written.push((volume.name.clone(), path)),
                Err(failure) => {
                    ended = Err(failure);
                    break;
                }
            }
        }
        drop(events);
        progress.finish().await;
        ended?;
        if session.json {
            let volumes: Vec<_> = written
                .iter()
                .map(|(volume, path)| json!({ "volume": volume, "path": path }))
                .collect();
            show!(
                "{:#}",
                json!({ "backup": manifest.backup, "volumes": volumes })
            );
        } else {
            let bytes = text::total(volumes.iter().map(|volume| volume.root.size()));
            for (volume, path) in &written {
                say!("{volume}: {}", path.display());
            }
            say!("restored in {}", text::pace(bytes, started.elapsed()));
        }
        Ok(())
    }

    fn volumes<'a>(&self, manifest: &'a Manifest) -> Result<Vec<&'a VolumeRecord>, Failure> {
        let Some(name) = &self.volume else {
            return Ok(manifest.record.volumes.iter().collect());
        };
        match manifest
            .record
            .volumes
            .iter()
            .find(|volume| volume.name == *name)
        {
            Some(volume) => Ok(vec![volume]),
            None => {
                let known: Vec<&str> = manifest
                    .record
                    .volumes
                    .iter()
                    .map(|volume| volume.name.as_str())
                    .collect();
                Err(Failure::Mistake(anyhow!(
                    "the backup holds no volume '{}' (there is {})",
                    name.escape_debug(),
                    known.join(", ")
                )))
            }
        }
    }

    /// Where each volume goes.
    fn places(&self, volumes: &[&VolumeRecord]) -> Result<Vec<PathBuf>, Failure> {
        if self.to.is_dir() {
            return Ok(volumes
                .iter()
                .map(|volume| {
                    self.to.join(format!(
                        "{}.{}",
                        volume.name.replace('/', "_"),
                        self.format.name()
                    ))
                })
                .collect());
        }
        match volumes {
            [_] => Ok(vec![self.to.clone()]),
            _ => Err(Failure::Mistake(anyhow!(
                "the backup holds {} volumes: let --to name an existing folder, or choose one with --volume",
                volumes.len()
            ))),
        }
    }
}
