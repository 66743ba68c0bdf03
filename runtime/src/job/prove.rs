//! The proof of what a provider claims: every claimed block is read back through fresh instances, as a restore will do it
//! ([`claims`]), and compared with its digest as of the point in time. Placed blocks need none: the host put them there
//! itself.

use super::claims::{self, Claims, ClaimsError, segment_of};
use super::means::{Maker, Means};
use super::volume_run::{Covered, guest_limits};
use crate::archive::{self, BackupId, BackupWriter};
use crate::digest;
use crate::event::Event;
use crate::extent::{Extent, ExtentSet};
use crate::grants::image::{ImageError, Purpose};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::task::JoinError;

/// One volume of a backup that is being made.
pub struct Proving<'a> {
    /// The volume.
    pub covered: &'a Covered,
    /// Who claims it.
    pub maker: Maker<'a>,
    /// The backup.
    pub writer: &'a Arc<BackupWriter>,
    /// Its id.
    pub backup: BackupId,
    /// The job's.
    pub means: &'a Means,
}

/// Why a claim is not proven.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The provider does not give it back.
    #[error("the provider claims {extent} but cannot give it back")]
    NotGivenBack {
        /// What was asked for.
        extent: Extent,
        /// Why.
        source: ImageError,
    },
    /// The provider cannot open its own backup.
    #[error("the provider cannot open what it wrote")]
    Open(#[source] ImageError),
    /// The provider gives back other bytes than the disk held.
    #[error("the provider claims {extent} but gives back other bytes than the disk held")]
    Wrong {
        /// The first wrong block.
        extent: Extent,
    },
    /// `wall-seconds` passed.
    #[error(
        "the provider was stopped: reading back what it claims took longer than its limit of {seconds} s (wall-seconds)"
    )]
    WallTime {
        /// The limit.
        seconds: u64,
    },
    /// The archive failed.
    #[error("the archive")]
    Archive(#[from] archive::Error),
    /// A task of the job died.
    #[error("a task of the job died")]
    Task(#[from] JoinError),
    /// The job was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl From<ClaimsError> for ProofError {
    fn from(error: ClaimsError) -> Self {
        match error {
            ClaimsError::Table(error) => Self::Archive(error),
            ClaimsError::Open(error) => Self::Open(error),
            ClaimsError::Task(error) => Self::Task(error),
        }
    }
}

/// Proves one volume's claims. That is a run of the provider too, and may take no longer than one.
pub async fn prove(volume: Proving<'_>) -> Result<(), ProofError> {
    if volume.covered.claimed.is_empty() {
        return Ok(());
    }
    let limits = &volume.maker.provider.limits;
    let seconds = limits.wall_seconds;
    tokio::time::timeout(limits.wall(), read_back(volume))
        .await
        .unwrap_or(Err(ProofError::WallTime { seconds }))
}

/// Segment by segment, one instance after the other: together they may have the memory of one.
async fn read_back(volume: Proving<'_>) -> Result<(), ProofError> {
    let claimed = &volume.covered.claimed;
    volume.means.events.send(Event::Total {
        volume: volume.covered.name.clone(),
        bytes: claimed.bytes(),
    });
    let claims = volume.claims();
    let mut unproven = claimed.clone();
    for segment in segments(claimed) {
        volume
            .prove_segment(&claims, segment, &mut unproven)
            .await?;
    }
    // What the books hold as claimed and the block table does not.
    match unproven.iter().next() {
        Some(extent) => Err(ProofError::Wrong { extent }),
        None => Ok(()),
    }
}

fn segments(claimed: &ExtentSet) -> BTreeSet<u64> {
    let within = |extent: Extent| segment_of(extent.start())..=segment_of(extent.end() - 1);
    claimed.iter().flat_map(within).collect()
}

impl Proving<'_> {
    /// What is asked for, in the way in which a restore will ask.
    pub fn claims(&self) -> Claims {
        let Maker {
            provider,
            component,
            ..
        } = self.maker;
        Claims {
            means: self.means.clone(),
            component: component.clone(),
            backup: self.backup,
            open: claims::image(
                component,
                self.backup,
                provider.settings.to_string(),
                self.covered.receipt.clone(),
                guest_limits(&provider.limits),
            ),
            objects: self.writer.objects(),
            table: Arc::new(self.writer.table(self.covered.root)),
            volume: self.covered.name.clone(),
            purpose: Purpose::Proof,
        }
    }

    /// A provider that takes its time must not hold up a cancel. What is dropped here ends its sandbox.
    async fn unless_cancelled<T>(&self, future: impl Future<Output = T>) -> Result<T, ProofError> {
        let done = self.means.unless_cancelled(future).await;
        done.ok_or(ProofError::Cancelled)
    }

    async fn prove_segment(
        &self,
        claims: &Claims,
        segment: u64,
        unproven: &mut ExtentSet,
    ) -> Result<(), ProofError> {
        let mut asking = self.unless_cancelled(claims.ask(segment)).await??;
        while let Some((question, answer)) = self.unless_cancelled(asking.next()).await? {
            let extent = question.extent;
            let bytes = answer.map_err(|source| ProofError::NotGivenBack { extent, source })?;
            let block = self.covered.root.block_size();
            if let Some(extent) = digest::first_wrong(&bytes, extent, block, &question.digests) {
                return Err(ProofError::Wrong { extent });
            }
            unproven.remove(extent);
            self.means.events.send(Event::Advance {
                volume: self.covered.name.clone(),
                bytes: extent.len(),
            });
        }
        asking.close().await;
        Ok(())
    }
}
