//! `fleecebox backup`.

use super::progress::Progress;
use super::vm::{self, VmArguments};
use super::{
    AllowWasi, Failure, Sandboxes, Session, Status, Telling, installed, places, recording, text,
};
use crate::archive::{ComponentId, LeftOut};
use crate::config::Vm;
use crate::config::size;
use crate::contract::MAX_ATTACHMENT;
use crate::grants::account::Account;
use crate::job::audit::{Granted, Job, Record};
use crate::job::backup::{self, BackupPlaces, BackupRequest, Summary};
use crate::job::dry_run::{self, DiskForecast, DryRun, Forecast, Mode};
use crate::job::selection::Selection;
use crate::job::subject::{Folders, VmAccess};
use crate::policy::{self, Decision, Tenancy};
use crate::sandbox::Budget;
use anyhow::anyhow;
use clap::Args;
use serde_json::json;
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Back up the disks of a running VM.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox backup web
  fleecebox backup --libvirt web --provider ./chunked.wasm --archive /srv/backups
  fleecebox backup web --qmp /run/web.qmp --provider ./chunked.wasm --archive /srv/backups
  fleecebox backup web --bandwidth 100MiB
  fleecebox backup web --dry-run                      what would happen to each disk, and why
  fleecebox backup web --record case.jsonl              for the provider's vendor: `fleecebox provider test --replay`

The backup is committed only once every changed block is proven to be in the archive. A disk with a usable bitmap of \
this archive is backed up incrementally, any other in full.")]
pub(super) struct Backup {
    #[command(flatten)]
    vm: VmArguments,
    /// The provider, by name or component file
    #[arg(long, value_name = "NAME|FILE")]
    provider: Option<String>,
    /// A TOML file with the provider's settings
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// The archive, by name or folder; an empty folder becomes an archive
    #[arg(long, value_name = "NAME|FOLDER")]
    archive: Option<String>,
    /// Read every disk in full
    #[arg(long)]
    full: bool,
    /// Most bytes of the disks to read in a second, over the whole job, such as 100MiB; a provider's own limit holds too
    #[arg(long, value_name = "BYTES", value_parser = size::rate)]
    bandwidth: Option<NonZeroU64>,
    /// Only say what would happen to each disk; nothing is changed in QEMU or in the archive
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    recording: recording::Options,
    #[command(flatten)]
    wasi: AllowWasi,
    #[command(flatten)]
    sandboxes: Sandboxes,
    #[command(flatten)]
    pub(super) telling: Telling,
}

impl Backup {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        if self.dry_run {
            self.recording.refuse_for_dry_run()?;
            return self.foretell(session).await;
        }
        let started = Instant::now();
        super::refuse_suspension("a backup");
        let mut record = Record::begin(Job::Backup, self.vm.which.name().into());
        let made = self.make(session, &mut record).await;
        if let Ok(summary) = &made {
            record.backup = Some(summary.manifest.backup.to_string());
        }
        let summary = places::audited(session, record, made)?;
        tell(session, &summary, started);
        match &summary.left[..] {
            [] => complete(&summary.manifest.record.left_out),
            left => Err(Failure::Told(
                Status::Incomplete,
                anyhow!(
                    "backup {} is committed, but the clean-up is incomplete and left to the next run: {}",
                    summary.manifest.backup,
                    left.join("; ")
                ),
            )),
        }
    }

    async fn make(self, session: &Session, record: &mut Record) -> Result<Summary, Failure> {
        let mut program = self.sandboxes.program();
        let recording = self.recording.clone();
        let (request, archive, tenant) = self.prepare(session, record)?;
        let archive = places::archive(session, archive.as_deref(), true)?;
        let _slot = places::slot(session, tenant.as_ref())?;
        let recorder = recording.begin(&request.provider_name, &request.component)?;
        if let Some(recorder) = &recorder {
            program = program.watched_by(recorder.clone());
        }
        let limits = request.account.limits();
        let places = BackupPlaces {
            archive: Arc::new(archive),
            folders: folders(session, &request.vm)?,
            cache: places::cache(session)?,
            program: program.within(Budget::new(limits.memory, limits.cpu())),
        };
        places::begun(session, record)?;
        let account = Arc::clone(&request.account);
        let (events, progress) = Progress::start(session.quiet);
        let made = backup::backup(request, places, &events, &session.signals()).await;
        drop(events);
        progress.finish().await;
        recording::end(recorder);
        record.used = account.used();
        made.map_err(Failure::of)
    }

    async fn foretell(self, session: &Session) -> Result<(), Failure> {
        let mut record = Record::begin(Job::Backup, self.vm.which.name().into());
        let (request, archive, _) = self.prepare(session, &mut record)?;
        let archive = places::archive_if_made(session, archive.as_deref())?;
        let folders = folders(session, &request.vm)?;
        let wanted = DryRun {
            request: &request,
            archive: archive.as_ref(),
            folders: &folders,
        };
        let foretold = dry_run::dry_run(wanted).await;
        let forecast = foretold.map_err(Failure::of)?;
        tell_forecast(session, &forecast);
        complete(&forecast.left_out)
    }

    /// The request, the archive's name, and the tenant whose job it is.
    fn prepare(
        self,
        session: &Session,
        record: &mut Record,
    ) -> Result<(BackupRequest, Option<String>, Option<Tenancy>), Failure> {
        let (name, mut vm, monitor) = self.vm.resolve(session)?;
        let wanted = self.provider.or_else(|| vm.provider.clone()).ok_or_else(|| {
            mistake("no provider: name one with --provider, or as `provider` of this VM in the configuration".into())
        })?;
        record.provider = Some(wanted.clone());
        let allowed = self.wasi.parts(session)?;
        let decision = match session.config.tenant.is_empty() {
            true => {
                let (named, mut provider) = installed::provider(session, &wanted)?;
                provider.grant.wasi.extend(allowed);
                Decision::of_the_operator(&name, named, provider)?
            }
            false => policy::decide(&session.config, &name, &wanted)?,
        };
        record.tenant = decision.tenant.as_ref().map(|tenant| tenant.name.clone());
        // What the provider may not ask for is not even read.
        vm.attachments
            .retain(|name, _| decision.attachments.covers(name));
        record.granted = Some(Granted::new(&decision, vm.attachments.keys().cloned()));
        let by_rule = vm.disks.is_empty();
        vm.disks = decision.disks(vm.disks)?;
        let asked = vm.disks.len();
        vm.disks.retain(|name| !vm.extra.contains_key(name));
        // No names at all would mean every disk.
        if asked > 0 && vm.disks.is_empty() {
            return Err(mistake(format!(
                "nothing but what is `extra` of the VM '{}' is to be backed up; name a disk of it, too",
                name
            )));
        }
        let component = places::component(&decision)?;
        let digest = ComponentId::of(&component);
        record.component_sha256 = Some(digest);
        decision.check_digest(&session.config, digest)?;
        let archive_name = self.archive.or_else(|| vm.archive.clone());
        let archive_name = decision.archive(&session.config, archive_name)?;
        let tenant = decision.tenant.clone();
        let mut provider = decision.provider.clone();
        if let Some(path) = &self.settings {
            provider.settings = places::settings(path)?;
        }
        let rates = [provider.limits.bandwidth, self.bandwidth.or(vm.bandwidth)];
        provider.limits.bandwidth = rates.into_iter().flatten().min();
        let mut attachments = BTreeMap::new();
        for (name, path) in &vm.attachments {
            let bytes = places::read(path, "attachment")?;
            if bytes.len() > MAX_ATTACHMENT {
                return Err(mistake(format!(
                    "the attachment {} has {} bytes, more than {MAX_ATTACHMENT}",
                    path.display(),
                    bytes.len()
                )));
            }
            attachments.insert(name.clone(), bytes);
        }
        let extra_not_granted = not_granted(session, &mut vm, &decision);
        let extra = vm::extra(&vm)?;
        let request = BackupRequest {
            vm: VmAccess {
                name,
                config: vm,
                monitor,
                extra,
            },
            account: Arc::new(Account::new(provider.limits.clone())),
            provider_name: decision.provider_name.clone(),
            provider,
            component: component.into(),
            namespace: decision.namespace.clone(),
            selection: Selection {
                decision: Some(decision),
                by_rule,
                extra_not_granted,
            },
            attachments,
            full: self.full,
        };
        Ok((request, archive_name, tenant))
    }
}

/// Takes those further volumes away that the policy does not grant.
fn not_granted(session: &Session, vm: &mut Vm, decision: &Decision) -> Vec<String> {
    let extra = std::mem::take(&mut vm.extra).into_iter();
    let (granted, others) = extra.partition(|(name, _)| decision.volumes.covers(name));
    vm.extra = granted;
    let others: BTreeMap<String, String> = others;
    if !others.is_empty() && !session.quiet {
        warn!("the policy does not grant all that is `extra` of the VM; it is left out");
    }
    others.into_keys().collect()
}

/// Whether nothing is missing that somebody may think is there.
fn complete(left_out: &[LeftOut]) -> Result<(), Failure> {
    let missing = left_out.iter().filter(|disk| !disk.excluded);
    let missing: Vec<_> = missing.map(|disk| disk.name.as_str()).collect();
    match &missing[..] {
        [] => Ok(()),
        missing => Err(Failure::Told(
            Status::Incomplete,
            anyhow!(
                "disks of the VM are left out: {}; grant them, or say by `exclude` that they are not wanted",
                missing.join(", ")
            ),
        )),
    }
}

/// Opened for the VM's jobs.
fn folders(session: &Session, vm: &VmAccess) -> Result<Folders, Failure> {
    let default = || session.state.join("fleecing");
    let fleecing = vm.config.fleecing.clone().unwrap_or_else(default);
    Ok(Folders {
        state: places::vm_state(session, &vm.name)?,
        fleecing: places::folder(&fleecing)?,
    })
}

fn tell_forecast(session: &Session, forecast: &Forecast) {
    if session.json {
        show!("{:#}", json!(forecast));
        return;
    }
    for first in &forecast.first {
        show!("first: {first}");
    }
    for skipped in &forecast.skipped {
        show!("{}: skipped, {}", skipped.name, skipped.reason);
    }
    for disk in &forecast.left_out {
        show!("{}: left out, {}", disk.name, disk.reason);
    }
    for disk in forecast.disks.iter().flatten() {
        tell_disk(disk);
    }
    show!("nothing was changed");
}

fn tell_disk(disk: &DiskForecast) {
    let reason = disk.reason.as_deref().map(|reason| format!(" ({reason})"));
    let what = match (disk.mode, &disk.base) {
        (Mode::Incremental, Some(base)) => format!("what changed since {base}"),
        (Mode::Untracked, _) => "all of it, as each time".into(),
        _ => "all of it".into(),
    };
    show!(
        "{} ({}, {}): {what}{}, about {}",
        disk.name,
        disk.format,
        text::size(disk.size),
        reason.unwrap_or_default(),
        text::size(disk.dirty_bytes)
    );
    let uses = disk.bitmap_used.iter().map(|name| ("reads by", name));
    let adds = disk.bitmap_added.iter().map(|name| ("adds", name));
    let removed = disk.bitmap_used.iter().chain(&disk.bitmaps_removed);
    let removes = removed.map(|name| ("removes, once committed,", name));
    for (verb, name) in uses.chain(adds).chain(removes) {
        show!("  {verb} the bitmap {name}");
    }
}

fn mistake(message: String) -> Failure {
    Failure::Mistake(anyhow!(message))
}

fn tell(session: &Session, summary: &Summary, started: Instant) {
    let manifest = &summary.manifest;
    let took = started.elapsed();
    if session.json {
        let result = json!({
            "backup": manifest.backup,
            "vm": manifest.record.vm,
            "seconds": took.as_secs_f64(),
            "frozen_ms": summary.frozen.map(|frozen| frozen.as_millis()),
            "stopped_ms": summary.stopped.map(|stopped| stopped.as_secs_f64() * 1000.0),
            "snapshot_seconds": summary.snapshot.as_secs_f64(),
            "step_seconds": summary.steps.iter().map(|(step, took)| (step.name(), took.as_secs_f64())).collect::<BTreeMap<_, _>>(),
            "fleecing_peak_bytes": summary.fleecing_peak,
            "clean_up_left": summary.left,
            "volumes": manifest.record.volumes,
            "moment": manifest.record.moment,
            "left_out": manifest.record.left_out,
        });
        show!("{result:#}");
        return;
    }
    let volumes = manifest.record.volumes.iter();
    let covered = text::total(volumes.map(|volume| volume.dirty_bytes));
    for volume in &manifest.record.volumes {
        say!(
            "{}: {} covered, {} of it zero, {} claimed and proven",
            volume.name,
            text::size(volume.dirty_bytes),
            text::size(volume.zero_bytes),
            text::size(volume.claimed_bytes)
        );
    }
    if let Some(frozen) = summary.frozen {
        say!("the guest was frozen for {} ms", frozen.as_millis());
    }
    if let Some(stopped) = summary.stopped {
        say!(
            "the VM was stopped for {:.1} ms",
            stopped.as_secs_f64() * 1000.0
        );
    }
    say!("committed in {}", text::pace(covered, took));
    // The id alone on standard output, for scripts.
    show!("{}", manifest.backup);
}
