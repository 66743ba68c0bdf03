//! The part of a backup that knows no QEMU: from frozen disks behind an NBD server to the manifest.
//!
//! run each volume → prove → commit. Whoever made the point in time does the rest; the conformance kit makes one of
//! disks in memory.

use super::component::Component;
use super::prove::{self, ProofError};
use super::volume_run::{self, Covered, Uncovered};
use crate::archive::{
    self, BackupId, BackupRecord, BackupWriter, ComponentId, LeftOut, Manifest, Moment, Namespace,
    Proof, ProviderRecord, VolumeRecord,
};
use crate::config::Provider;
use crate::contract::World;
use crate::event::Events;
use crate::grants::account::Account;
use crate::sandbox::Program;
use crate::volume::bandwidth::Bandwidth;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::backup::BackupError;

/// How long a job that is to end waits for the archive. What is then left is the next run's.
const ARCHIVE_TIME: Duration = Duration::from_secs(10);

/// When the job has been told to stop and the archive has had time for what was under way.
async fn given_up(cancel: &CancellationToken) {
    cancel.cancelled().await;
    tokio::time::sleep(ARCHIVE_TIME).await;
}

/// The writer is there until the commit, and held by nobody else once all runs have ended.
fn not_held() -> archive::Error {
    archive::Error::WriterFailed {
        first: "a task of the job still holds it".into(),
    }
}

/// One backup on its way.
pub struct Transfer<'a> {
    /// The VM's name.
    pub vm: &'a str,
    /// The provider's name.
    pub provider_name: &'a str,
    /// Its settings, limits and grants.
    pub provider: &'a Provider,
    /// Its component, as it came.
    pub bytes: Bytes,
    /// Its component, ready to run.
    pub component: &'a Component,
    /// What its sandbox processes run.
    pub program: &'a Program,
    /// Handed to it.
    pub attachments: &'a BTreeMap<String, Vec<u8>>,
    /// What the job uses of its limits.
    pub account: &'a Arc<Account>,
    /// Its part of the archive.
    pub namespace: Arc<Namespace>,
    /// The backup in the making, until it commits.
    pub writer: Option<Arc<BackupWriter>>,
    /// Its id.
    pub id: BackupId,
    /// Whether the volumes are as of one moment.
    pub moment: Moment,
    /// Disks of the VM that are in no volume.
    pub left_out: Vec<LeftOut>,
    /// Where the job tells what it does.
    pub events: &'a Events,
    /// Ends the job early.
    pub cancel: &'a CancellationToken,
}

impl Transfer<'_> {
    /// Runs the provider on every volume side by side; the first failure stops the others, and so does `stop`.
    pub async fn run(
        &self,
        volumes: &[Uncovered],
        stop: &CancellationToken,
    ) -> Result<Vec<Covered>, BackupError> {
        let encoders = Arc::new(Semaphore::new(
            std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
        ));
        let attachments = Arc::new(self.attachments.clone());
        let bandwidth = self.provider.limits.bandwidth;
        let bandwidth = bandwidth.map(|rate| Arc::new(Bandwidth::new(rate, stop.clone())));
        let writer = self.writer()?;
        let accounts = self.accounts(volumes);
        let own = |number| (accounts.len() > 1).then_some(number);
        let runs = volumes.iter().enumerate().map(|(number, volume)| {
            let order = volume_run::Order {
                volume,
                disks: volumes.len(),
                provider_name: self.provider_name,
                provider: self.provider,
                component: self.component,
                program: self.program,
                namespace: &self.namespace,
                writer,
                backup: self.id,
                attachments: &attachments,
                own_names: own(number),
                account: accounts.get(number).unwrap_or(self.account),
                bandwidth: &bandwidth,
                encoders: &encoders,
                events: self.events,
                stop,
            };
            async move {
                let covered = volume_run::run(order).await;
                if covered.is_err() {
                    stop.cancel();
                }
                covered.map_err(|source| (volume.source.name.clone(), source))
            }
        });
        let ended = futures_util::future::join_all(runs).await;
        if self.cancel.is_cancelled() {
            return Err(BackupError::Cancelled { left: false });
        }
        let (covered, mut failed): (Vec<_>, Vec<_>) = ended.into_iter().partition(Result::is_ok);
        // A run that was stopped because another failed is not the reason.
        failed.sort_by_key(|failed| matches!(failed, Err((_, error)) if error.is_cancelled()));
        if let Some(Err((volume, source))) = failed.into_iter().next() {
            return Err(BackupError::Volume { volume, source });
        }
        Ok(covered.into_iter().flatten().collect())
    }

    /// One account for each volume where instances of the provider must not see each other: who may not see the bytes must
    /// not tell time, and whatever two instances share is a clock. None where all volumes have the job's.
    fn accounts(&self, volumes: &[Uncovered]) -> Vec<Arc<Account>> {
        let sees = self.component.world == World::Provider && self.provider.grant.read;
        if sees || volumes.len() < 2 {
            return Vec::new();
        }
        let sizes: Vec<u64> = volumes.iter().map(|volume| volume.source.size).collect();
        let accounts = self.account.split(&sizes);
        accounts.into_iter().map(Arc::new).collect()
    }

    /// Reads back what the provider claims.
    pub async fn prove(&self, covered: &[Covered]) -> Result<(), BackupError> {
        let writer = self.writer()?;
        for volume in covered {
            let order = prove::Order {
                covered: volume,
                component: self.component,
                program: self.program,
                provider: self.provider,
                account: self.account,
                writer,
                backup: self.id,
                events: self.events,
                cancel: self.cancel,
            };
            prove::prove(order).await.map_err(|source| match source {
                ProofError::Cancelled => BackupError::Cancelled { left: false },
                source => BackupError::Proof {
                    volume: volume.name.clone(),
                    source,
                },
            })?;
        }
        if self.cancel.is_cancelled() {
            return Err(BackupError::Cancelled { left: false });
        }
        Ok(())
    }

    /// Makes the backup happen. `volumes` are those that were `covered`, in that order.
    pub async fn commit(
        &mut self,
        covered: Vec<Covered>,
        volumes: &[Uncovered],
    ) -> Result<Manifest, BackupError> {
        let component = self.bytes.clone();
        let record = self.record(covered, volumes, ComponentId::of(&component));
        // Every run has ended, so this is the last holder.
        let writer = self
            .writer
            .take()
            .and_then(Arc::into_inner)
            .ok_or_else(not_held)?;
        let committed = tokio::task::spawn_blocking(move || {
            writer.keep_component(&component)?;
            writer.commit(record)
        });
        tokio::select! {
            done = committed => Ok(done.map_err(BackupError::Task)??),
            () = given_up(self.cancel) => {
                let source = io::Error::new(io::ErrorKind::TimedOut, "the archive does not answer");
                Err(archive::Error::CommitUnknown { source }.into())
            }
        }
    }

    /// Removes what was stored; a writer that committed is gone already. Returns what could not be removed.
    pub async fn abandon(&mut self) -> Option<String> {
        let writer = self.writer.take()?;
        let removed = async {
            // Held by nobody else, unless by a task that hangs.
            let writer = Arc::into_inner(writer)?;
            let removed = tokio::task::spawn_blocking(move || writer.abandon());
            timeout(ARCHIVE_TIME, removed).await.ok()
        };
        let error = match removed.await {
            Some(Ok(Ok(()))) => return None,
            Some(Ok(Err(error))) => error.to_string(),
            Some(Err(error)) => error.to_string(),
            None => "a task of the job still writes, or the archive does not answer".into(),
        };
        Some(format!("what backup {} stored: {error}", self.id))
    }

    fn writer(&self) -> Result<&Arc<BackupWriter>, archive::Error> {
        self.writer.as_ref().ok_or_else(not_held)
    }

    fn record(
        &self,
        covered: Vec<Covered>,
        volumes: &[Uncovered],
        component: ComponentId,
    ) -> BackupRecord {
        let volumes = covered
            .into_iter()
            .zip(volumes)
            .map(|(volume, before)| VolumeRecord {
                name: volume.name,
                disk: before.disk.clone(),
                mode: volume.mode,
                base: volume.base,
                fallback: volume.reason,
                bitmap: before.bitmap.clone(),
                root: volume.root,
                receipt: volume.receipt,
                dirty_bytes: volume.dirty_bytes,
                zero_bytes: volume.zero_bytes,
                placed_bytes: volume.dirty_bytes - volume.zero_bytes - volume.claimed.bytes(),
                claimed_bytes: volume.claimed.bytes(),
                proof: Proof::Proven,
            })
            .collect();
        BackupRecord {
            vm: self.vm.into(),
            created: OffsetDateTime::now_utc(),
            provider: ProviderRecord {
                name: self.provider_name.into(),
                component,
                world: self.component.world,
                settings: self.provider.settings.to_string(),
                limits: volume_run::guest_limits(&self.provider.limits),
            },
            host_version: env!("CARGO_PKG_VERSION").into(),
            volumes,
            attachments: Vec::new(),
            moment: self.moment,
            left_out: self.left_out.clone(),
        }
    }
}
