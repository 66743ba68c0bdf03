//! `fleecebox restore`.

use super::progress::Progress;
use super::stored::{self, Stored};
use super::{AllowWasi, Failure, Sandboxes, Session, Telling, places, text, words};
use crate::archive::{Manifest, VolumeRecord};
use crate::job::audit::{Job, Record};
use crate::job::means::Means;
use crate::job::reading::Reading;
use crate::job::restore::{self, Format, Insistence};
use anyhow::anyhow;
use clap::Args;
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
    #[arg(long, value_parser = words::format(), default_value = Format::Raw.name())]
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
    #[command(flatten)]
    pub(super) telling: Telling,
}

impl Restore {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let found = self.stored.find(session)?;
        let allowed = self.wasi.parts(session)?;
        let (namespace, manifest) = (&found.namespace, &found.manifest);
        let reading = Reading::new(&session.config, namespace, manifest, allowed);
        let mut record = reading.record(Job::Restore);
        let ended = self.make(session, &reading, &mut record).await;
        record.used = reading.account.used();
        places::audited(session, record, ended)
    }

    async fn make(
        &self,
        session: &Session,
        reading: &Reading<'_>,
        record: &mut Record,
    ) -> Result<(), Failure> {
        let _slot = places::slot(session, reading.restores.tenant().as_ref())?;
        let volumes = stored::volumes(self.volume.as_slice(), &reading.manifest.record.volumes)?;
        let places = self.places(&volumes)?;
        let volumes: Vec<_> = volumes.into_iter().zip(places).collect();
        let cache = places::cache(session)?;
        let program = self.sandboxes.program();
        let started = Instant::now();
        places::begun(session, record)?;
        let (events, progress) = Progress::start(session.quiet);
        let (cancel, account) = (session.cancel.clone(), Arc::clone(&reading.account));
        let means = Means::new(events, cancel, account, program);
        let restore = restore::Restore {
            volumes: &volumes,
            format: self.format,
            insistence: Insistence {
                force: self.force,
                even_if_in_use: self.even_if_in_use,
            },
            config: &session.config,
        };
        let restored = restore::restore(reading, restore, &cache, means).await;
        progress.finish().await;
        restored.map_err(Failure::of)?;
        tell(session, reading.manifest, &volumes, started);
        Ok(())
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

fn tell(
    session: &Session,
    manifest: &Manifest,
    written: &[(&VolumeRecord, PathBuf)],
    started: Instant,
) {
    if session.json {
        let volumes = written
            .iter()
            .map(|(volume, path)| json!({ "volume": volume.name, "path": path }));
        let volumes: Vec<_> = volumes.collect();
        let result = json!({ "backup": manifest.backup, "volumes": volumes });
        show!("{result:#}");
        return;
    }
    for (volume, path) in written {
        say!("{}: {}", volume.name, path.display());
    }
    let bytes = text::total(written.iter().map(|(volume, _)| volume.root.size()));
    say!("restored in {}", text::pace(bytes, started.elapsed()));
}
