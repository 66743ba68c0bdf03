//! The part of a backup that knows no QEMU: from frozen disks behind an NBD server to the manifest.
//!
//! run each volume → prove → commit. Whoever made the point in time does the rest; the conformance kit makes one of
//! disks in memory.

use super::means::{Maker, Means};
use super::prove::{self, ProofError, Proving};
use super::volume_run::{self, Covered, Uncovered, VolumeRun};
use crate::archive::{
    self, BackupId, BackupRecord, BackupWriter, ComponentId, Kept, LeftOut, Manifest, Moment,
    Namespace, Proof, ProviderRecord, VolumeRecord,
};
use crate::contract::{World, with_causes};
use crate::grants::account::Account;
use crate::grants::farewell::Farewells;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
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
    /// The provider.
    pub maker: Maker<'a>,
    /// Its component, as it came.
    pub bytes: Bytes,
    /// Handed to it.
    pub attachments: &'a BTreeMap<String, Vec<u8>>,
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
    /// What the host keeps beside the volumes.
    pub kept: Vec<Kept>,
    /// The job's.
    pub means: Means,
    /// The runs that its cancel has ended.
    pub farewells: Farewells,
}

impl Transfer<'_> {
    /// Runs the provider on every volume side by side; the first failure stops the others, and so does `stop`. When what
    /// is clean of the `index`th volume has been given back, `make_room(index)` is run.
    pub async fn run<R: Future<Output = ()>>(
        &self,
        volumes: &[Uncovered],
        make_room: impl Fn(u16) -> R,
        stop: &CancellationToken,
    ) -> Result<Vec<Covered>, BackupError> {
        let attachments = Arc::new(self.attachments.clone());
        let writer = self.writer()?;
        let means = self.means.ended_by(stop.clone());
        let accounts = self.accounts(volumes);
        let own_names = |number| (!accounts.is_empty()).then_some(number);
        let runs = volumes.iter().zip(0u16..).map(|(volume, index)| {
            let number = usize::from(index);
            let made_room = make_room(index);
            let run = VolumeRun {
                volume,
                disks: volumes.len(),
                maker: self.maker,
                namespace: &self.namespace,
                writer,
                backup: self.id,
                attachments: &attachments,
                own_names: own_names(number),
                means: match accounts.get(number) {
                    Some(own) => means.charging(own),
                    None => means.clone(),
                },
                farewells: &self.farewells,
            };
            async move {
                let covered = volume_run::run(run, made_room).await;
                if covered.is_err() {
                    stop.cancel();
                }
                covered.map_err(|source| (volume.source.name.clone(), source))
            }
        });
        let ended = futures_util::future::join_all(runs).await;
        if self.means.cancel.is_cancelled() {
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
        let sees = self.maker.component.world == World::Provider && self.maker.provider.grant.read;
        if sees || volumes.len() < 2 {
            return Vec::new();
        }
        let sizes: Vec<u64> = volumes.iter().map(|volume| volume.source.size).collect();
        let accounts = self.means.account.split(&sizes);
        accounts.into_iter().map(Arc::new).collect()
    }

    /// Reads back what the provider claims.
    pub async fn prove(&self, covered: &[Covered]) -> Result<(), BackupError> {
        let writer = self.writer()?;
        for volume in covered {
            let proving = Proving {
                covered: volume,
                maker: self.maker,
                writer,
                backup: self.id,
                means: &self.means,
            };
            prove::prove(proving).await.map_err(|source| match source {
                ProofError::Cancelled => BackupError::Cancelled { left: false },
                source => BackupError::Proof {
                    volume: volume.name.clone(),
                    source,
                },
            })?;
        }
        if self.means.cancel.is_cancelled() {
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
            () = given_up(&self.means.cancel) => {
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
        let why = match removed.await {
            Some(Ok(Ok(()))) => return None,
            Some(Ok(Err(error))) => with_causes(&error),
            Some(Err(error)) => with_causes(&error),
            None => "a task of the job still writes, or the archive does not answer".into(),
        };
        Some(format!("what backup {} stored: {why}", self.id))
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
                name: self.maker.name.into(),
                component,
                world: self.maker.component.world,
                settings: self.maker.provider.settings.to_string(),
                limits: volume_run::guest_limits(&self.maker.provider.limits),
            },
            host_version: env!("CARGO_PKG_VERSION").into(),
            volumes,
            attachments: Vec::new(),
            kept: self.kept.clone(),
            moment: self.moment,
            left_out: self.left_out.clone(),
        }
    }
}
