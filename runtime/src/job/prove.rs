//! The proof of what a provider claims: every claimed block is read back through a fresh instance and compared with
//! its digest as of the point in time. Placed blocks need none: the host put them there itself.

use super::component::Component;
use super::event::{Event, Events};
use super::volume_run::{Covered, context_id, guest_limits};
use crate::archive::{self, BackupId, BackupWriter, Entry};
use crate::channel::{Context, OpenImage};
use crate::config::Provider;
use crate::digest;
use crate::extent::Extent;
use crate::grants::MAX_READ;
use crate::grants::account::Account;
use crate::grants::image::{Image, ImageError};
use crate::sandbox::Program;
use crate::volume::reader::PIECE;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// What a proof needs.
pub struct Order<'a> {
    /// The volume.
    pub covered: &'a Covered,
    /// The provider.
    pub component: &'a Component,
    /// What its sandbox process runs.
    pub program: &'a Program,
    /// Its settings and limits.
    pub provider: &'a Provider,
    /// What the job uses of them.
    pub account: &'a Arc<Account>,
    /// The backup that is being made.
    pub writer: &'a Arc<BackupWriter>,
    /// Its id.
    pub backup: BackupId,
    /// Where the job tells what it does.
    pub events: &'a Events,
    /// Ends the proof early.
    pub cancel: &'a CancellationToken,
}

impl Order<'_> {
    /// A provider that takes its time must not hold up a cancel. What is dropped here ends its sandbox.
    async fn unless_cancelled<T>(&self, future: impl Future<Output = T>) -> Result<T, ProofError> {
        self.cancel
            .run_until_cancelled(future)
            .await
            .ok_or(ProofError::Cancelled)
    }
}

/// Why a claim is not proven.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The provider does not give it back.
    #[error("the provider claims {extent} but cannot give it back: {source}")]
    NotGivenBack {
        /// What was asked for.
        extent: Extent,
        /// Why.
        source: ImageError,
    },
    /// The provider cannot open its own backup.
    #[error("the provider cannot open what it wrote: {0}")]
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
    #[error("the archive: {0}")]
    Archive(#[from] archive::Error),
    /// The job was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// Proves one volume's claims. That is a run of the provider too, and may take no longer than one.
pub async fn prove(order: Order<'_>) -> Result<(), ProofError> {
    if order.covered.claimed.is_empty() {
        return Ok(());
    }
    let limits = &order.provider.limits;
    let seconds = limits.wall_seconds;
    tokio::time::timeout(limits.wall(), read_back(order))
        .await
        .unwrap_or(Err(ProofError::WallTime { seconds }))
}

async fn read_back(order: Order<'_>) -> Result<(), ProofError> {
    let claimed = &order.covered.claimed;
    order.events.send(Event::Total {
        bytes: claimed.bytes(),
    });
    let open = OpenImage {
        wasi: order.component.wasi.clone(),
        limits: guest_limits(&order.provider.limits),
        context: Context {
            id: context_id(order.backup),
            settings: order.provider.settings.to_string(),
        },
        receipt: order.covered.receipt.clone(),
        max_read: MAX_READ,
    };
    let objects = order.writer.objects();
    let opened = Image::open(
        order.program,
        open,
        &order.component.compiled,
        objects,
        order.account,
        &order.covered.name,
        order.events,
    );
    let mut image = order
        .unless_cancelled(opened)
        .await?
        .map_err(ProofError::Open)?;
    let table = order.writer.table(order.covered.root);
    let block = order.covered.root.block_size();
    for extent in claimed.iter().flat_map(|extent| extent.pieces(PIECE)) {
        let bytes = order
            .unless_cancelled(image.read(extent))
            .await?
            .map_err(|source| ProofError::NotGivenBack { extent, source })?;
        let found = digest::of_blocks(&bytes, block);
        for (part, digest) in extent.pieces(block.into()).zip(found) {
            match table.get(part.start() / u64::from(block))? {
                // Of this very backup: a base's claim proves nothing of what changed since.
                Entry::Claimed {
                    digest: expected,
                    backup,
                } if expected == digest && backup == order.backup => {}
                _ => return Err(ProofError::Wrong { extent: part }),
            }
        }
        order.events.send(Event::Advance {
            bytes: extent.len(),
        });
    }
    image.close().await;
    Ok(())
}
