//! `fleecebox restore`.

use super::progress::Progress;
use super::reading::Reading;
use super::{AllowWasi, Failure, Sandboxes, Session, Status, target, text};
use crate::archive::{Manifest, Namespace, VolumeRecord};
use crate::job::Event;
use crate::job::audit::Job;
use crate::job::replay::{self, Order};
use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use rustix::fs::{FallocateFlags, RenameFlags, fallocate};
use serde_json::json;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Bytes zeroed at once on a block device, so that a cancel does not wait for all of a large one.
const ZERO_PIECE: u64 = 1 << 30;

/// Write a backup's volumes to files or block devices.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox restore 20261123T020000Z-0123456789abcdef --archive /srv/backups --to ./restored/
  fleecebox restore 20261123T020000Z-0123456789abcdef --volume scsi0 --to disk.qcow2 --format qcow2
  fleecebox restore 20261123T020000Z-0123456789abcdef --volume scsi0 --to /dev/vg/web --force

Each block is compared with its digest before it is written. A file appears under its name only once it is complete.")]
pub(super) struct Restore {
    /// The backup's id
    backup: String,
    /// The archive, by name or folder
    #[arg(long, value_name = "NAME|FOLDER")]
    archive: Option<String>,
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
        let archive = target::archive(session, self.archive.as_deref(), false)?;
        let (namespace, manifest) = target::backup(&archive, &self.backup)?;
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
        let mut written = Vec::new();
        let mut ended = Ok(());
        for (volume, path) in volumes.iter().zip(places) {
            events.send(Event::Total {
                bytes: volume.root.size(),
            });
            let outcome = async {
                let output = Output::open(&path, volume, self.format, self.force)?;
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
                let findings = replay::replay(order).await.map_err(target::failed)?;
                if let Some(finding) = findings.first() {
                    let said = anyhow!("volume {}: {finding}", volume.name);
                    return Err(match Status::of_finding(finding) {
                        Status::Denied => Failure::Denied(said),
                        _ => Failure::Unusable(said),
                    });
                }
                output.complete(self.format, self.force).await
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

/// A file that appears once it is complete, or a block device.
struct Output {
    file: Arc<File>,
    path: PathBuf,
    /// The file under construction; nothing for a device. Removed when this is dropped.
    partial: Option<Partial>,
}

struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Output {
    fn open(
        path: &Path,
        volume: &VolumeRecord,
        format: Format,
        force: bool,
    ) -> Result<Self, Failure> {
        let existing = std::fs::metadata(path).ok();
        if existing.is_some() && !force {
            return Err(Failure::Mistake(anyhow!(
                "{} exists; --force overwrites it",
                path.display()
            )));
        }
        let shown = || format!("{} cannot be written", path.display());
        if existing.is_some_and(|meta| meta.file_type().is_block_device()) {
            if format != Format::Raw {
                return Err(Failure::Mistake(anyhow!(
                    "{} is a block device, which takes the raw format only",
                    path.display()
                )));
            }
            // O_EXCL: a device that is mounted or otherwise in use is refused (open(2)).
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed())
                .open(path)
                .with_context(shown)
                .map_err(Failure::Mistake)?;
            prepare_device(&file, path, volume.root.size())?;
            return Ok(Self {
                file: Arc::new(file),
                path: path.to_owned(),
                partial: None,
            });
        }
        let partial = with_suffix(path, ".partial");
        if force && partial.exists() {
            // What a restore that was killed left.
            std::fs::remove_file(&partial)
                .with_context(shown)
                .map_err(Failure::Mistake)?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)
            .with_context(|| {
                format!(
                    "{} cannot be made (--force removes what a killed restore left)",
                    partial.display()
                )
            })
            .map_err(Failure::Mistake)?;
        let partial = Partial(partial);
        file.set_len(volume.root.size())
            .with_context(shown)
            .map_err(Failure::Failed)?;
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
            partial: Some(partial),
        })
    }

    async fn complete(self, format: Format, force: bool) -> Result<(), Failure> {
        let shown = || format!("{} cannot be completed", self.path.display());
        self.file
            .sync_all()
            .with_context(shown)
            .map_err(Failure::Failed)?;
        let Some(raw) = self.partial else {
            return Ok(());
        };
        let done = match format {
            Format::Raw => raw,
            Format::Qcow2 => convert(&raw.0, &self.path).await?,
        };
        let flags = if force {
            RenameFlags::empty()
        } else {
            RenameFlags::NOREPLACE
        };
        rustix::fs::renameat_with(rustix::fs::CWD, &done.0, rustix::fs::CWD, &self.path, flags)
            .with_context(shown)
            .map_err(Failure::Failed)
    }
}

/// QEMU's own tool writes QEMU's own format.
async fn convert(raw: &Path, path: &Path) -> Result<Partial, Failure> {
    let converted = Partial(with_suffix(path, ".partial-qcow2"));
    let output = tokio::process::Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([raw, &converted.0])
        .kill_on_drop(true)
        .output()
        .await
        .context("qemu-img, which writes qcow2, cannot be run (Debian: qemu-utils)")
        .map_err(Failure::Failed)?;
    if !output.status.success() {
        let said = text::one_line(&String::from_utf8_lossy(&output.stderr));
        return Err(Failure::Failed(anyhow!(
            "qemu-img could not write qcow2: {said}"
        )));
    }
    Ok(converted)
}

/// A device holds something else wherever the backup is zero.
fn prepare_device(device: &File, path: &Path, size: u64) -> Result<(), Failure> {
    let mut seek = device;
    let available = seek
        .seek(SeekFrom::End(0))
        .with_context(|| format!("{}", path.display()))
        .map_err(Failure::Failed)?;
    if available < size {
        return Err(Failure::Mistake(anyhow!(
            "{} has {available} bytes, the volume {size}",
            path.display()
        )));
    }
    let zero = || -> io::Result<()> {
        let mut at = 0;
        while at < size {
            let length = ZERO_PIECE.min(size - at);
            fallocate(
                device,
                FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                at,
                length,
            )?;
            at += length;
        }
        Ok(())
    };
    zero()
        .with_context(|| format!("{} cannot be zeroed", path.display()))
        .map_err(Failure::Failed)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
