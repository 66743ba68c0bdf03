//! Asking a provider for what it claimed, in the one way in which it is ever asked: to prove, to verify and to restore.
//!
//! A proof is worth something only if the provider cannot tell it from a restore. So all that an instance is given and
//! asked depends on nothing but the backup in which the claims were made, never on what of them is wanted now:
//! - each [`SEGMENT`] of the volume that holds a claim of that backup has an instance of its own;
//! - it is asked in ascending order, from the segment's first claim on, for the claimed blocks of one `CELL` after
//!   another, as that backup's own block table has them. Who wants less drops the rest, or stops early;
//! - clocks stand at the backup's time, and random bytes come from a seed that is made of its id;
//! - memory is what the backup had, to the byte. Time, which an instance cannot look at, is what the proof had and more.
//!
//! What changes with none of these, such as `job.context`, the receipt and the objects, is the backup's own.

use super::component::Component;
use super::means::Means;
use crate::archive::{self, BackupId, BlockTable, RunContent, StoredObjects, TableRoot};
use crate::channel::{OpenImage, Still};
use crate::contract::{Context, GuestLimits, MAX_READ};
use crate::digest::Digest;
use crate::extent::Extent;
use crate::grants::image::{Image, ImageError, Purpose};
use std::ops::Range;
use std::sync::Arc;
use std::vec;
use tokio::task::{JoinError, spawn_blocking};

/// What one instance is asked for at most, in bytes of the volume: so much is asked again where one block of it is wanted,
/// and so often a process is started.
pub const SEGMENT: u64 = 64 << 20;

/// The grid of the questions, in bytes of the volume: no block is longer, and no question is.
const CELL: u64 = 1 << 20;

const _: () = assert!(CELL >= archive::MAX_BLOCK_SIZE as u64 && CELL <= MAX_READ as u64);

/// What one volume's provider claimed in one backup.
pub struct Claims {
    /// Of the job that asks.
    pub means: Means,
    /// The provider, as it was in that backup.
    pub component: Component,
    /// The backup.
    pub backup: BackupId,
    /// What the provider is given, from [`image`].
    pub open: OpenImage,
    /// What all volumes of that backup wrote.
    pub objects: StoredObjects,
    /// The volume's block table in that backup.
    pub table: Arc<BlockTable>,
    /// The volume's name.
    pub volume: String,
    /// What for.
    pub purpose: Purpose,
}

/// One thing that the provider is asked for: claimed blocks, all in one cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Indices of the blocks, not empty.
    pub blocks: Range<u64>,
    /// What they hold on the volume.
    pub extent: Extent,
    /// Their digests as of the point in time.
    pub digests: Vec<Digest>,
}

/// Why nothing can be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClaimsError {
    /// The backup's block table cannot be read.
    #[error("the block table of its backup")]
    Table(#[from] archive::Error),
    /// The provider does not open its image.
    #[error(transparent)]
    Open(#[from] ImageError),
    /// A task of the job died.
    #[error("a task of the job died")]
    Task(#[from] JoinError),
}

/// What an instance is given to give back what was claimed in `backup`.
pub fn image(
    component: &Component,
    backup: BackupId,
    settings: String,
    receipt: Vec<u8>,
    limits: GuestLimits,
) -> OpenImage {
    OpenImage {
        wasi: component.wasi.clone(),
        limits,
        context: Context {
            id: context_id(backup),
            settings,
        },
        receipt,
        max_read: MAX_READ,
        still: Still {
            seconds: backup.seconds(),
            seed: derived("fleecebox 2026 image randomness", backup),
        },
    }
}

/// `job.context.id`: as unique as the backup's own id, and without the time of day that this begins with.
pub fn context_id(backup: BackupId) -> String {
    hex::encode(&derived("fleecebox 2026 job.context.id", backup)[..16])
}

fn derived(context: &str, backup: BackupId) -> [u8; 32] {
    blake3::derive_key(context, backup.to_string().as_bytes())
}

/// The segment that holds a byte of the volume.
pub fn segment_of(offset: u64) -> u64 {
    offset / SEGMENT
}

impl Claims {
    /// Opens a fresh instance for one segment.
    pub async fn ask(&self, segment: u64) -> Result<Asking, ClaimsError> {
        let (table, backup) = (Arc::clone(&self.table), self.backup);
        let questions = spawn_blocking(move || questions(&table, backup, segment)).await??;
        let mut order = self.open.clone();
        order.limits.cpu_ms = self.purpose.extended(order.limits.cpu_ms);
        let image = Image::open(
            &self.means.program,
            order,
            &self.component.compiled,
            self.objects.again(),
            &self.means.account,
            &self.volume,
            &self.means.events,
            self.purpose,
        )
        .await?;
        Ok(Asking {
            image,
            questions: questions.into_iter(),
        })
    }
}

/// An instance that is being asked.
pub struct Asking {
    image: Image,
    questions: vec::IntoIter<Question>,
}

impl Asking {
    /// Puts the next question; none where all were put, or the instance has ended.
    pub async fn next(&mut self) -> Option<(Question, Result<Vec<u8>, ImageError>)> {
        let question = self.questions.next()?;
        let answer = self.image.read(question.extent).await;
        if answer.as_ref().is_err_and(ImageError::has_ended_it) {
            self.questions = Vec::new().into_iter();
        }
        Some((question, answer))
    }

    /// Whether a question that is still to be put is about this byte of the volume.
    pub fn asks_for(&self, at: u64) -> bool {
        let mut to_come = self.questions.as_slice().iter().map(|it| it.extent);
        to_come.any(|extent| extent.start() <= at && at < extent.end())
    }

    /// Whether all questions were put, or the instance has ended.
    pub fn is_done(&self) -> bool {
        self.questions.as_slice().is_empty()
    }

    /// Ends the instance.
    pub async fn close(self) {
        self.image.close().await;
    }
}

/// What is asked in one segment: a function of the backup's block table alone.
fn questions(
    table: &BlockTable,
    backup: BackupId,
    segment: u64,
) -> Result<Vec<Question>, archive::Error> {
    let root = table.root();
    let block = u64::from(root.block_size());
    let first = segment.saturating_mul(SEGMENT / block).min(root.blocks());
    let end = first.saturating_add(SEGMENT / block).min(root.blocks());
    let mut cells: Vec<(Range<u64>, Vec<Digest>)> = Vec::new();
    for run in table.entries(first..end)? {
        let run = run?;
        let digests = match run.content {
            RunContent::Claimed {
                backup: by,
                digests,
            } if by == backup => digests,
            _ => continue,
        };
        for (index, digest) in run.blocks.zip(digests) {
            let begun = cells
                .last_mut()
                .filter(|(blocks, _)| blocks.end == index && !(index * block).is_multiple_of(CELL));
            match begun {
                Some((blocks, digests)) => {
                    blocks.end += 1;
                    digests.push(digest);
                }
                None => cells.push((index..index + 1, vec![digest])),
            }
        }
    }
    let question = |(blocks, digests): (Range<u64>, Vec<Digest>)| {
        let extent = extent_of(root, &blocks)?;
        Some(Question {
            blocks,
            extent,
            digests,
        })
    };
    Ok(cells.into_iter().filter_map(question).collect())
}

/// Where blocks lie on their volume; none where there are none.
pub fn extent_of(root: &TableRoot, blocks: &Range<u64>) -> Option<Extent> {
    let block = u64::from(root.block_size());
    Extent::between(blocks.start * block, (blocks.end * block).min(root.size()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{Archive, Entry};
    use cap_std::ambient_authority;
    use cap_std::fs::Dir;
    use std::slice::from_ref;
    use time::OffsetDateTime;

    const BLOCK: u64 = 64 << 10;
    const MIB: u64 = 1 << 20;

    /// The questions about a volume on which `ours` claimed the blocks of `claimed`, and another backup those of `others`.
    fn asked(
        size: u64,
        claimed: &[Range<u64>],
        others: &[Range<u64>],
        segment: u64,
    ) -> Vec<Extent> {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        let archive = Archive::create(root).unwrap();
        let namespace = archive
            .create_namespace(&"tenant".parse().unwrap())
            .unwrap();
        let id = || BackupId::random(OffsetDateTime::UNIX_EPOCH).unwrap();
        let (ours, other) = (id(), id());
        let writer = namespace.begin(ours).unwrap();
        let table = writer.block_table(size, BLOCK as u32, None).unwrap();
        for (blocks, backup) in [(claimed, ours), (others, other)] {
            for block in blocks.iter().cloned().flatten() {
                let digest = Digest::of(&block.to_le_bytes());
                table.set(block, Entry::Claimed { digest, backup }).unwrap();
            }
        }
        let table = writer.table(table.finish().unwrap());
        let questions = questions(&table, ours, segment).unwrap();
        for question in &questions {
            let digests = question
                .blocks
                .clone()
                .map(|it| Digest::of(&it.to_le_bytes()));
            assert_eq!(question.digests, digests.collect::<Vec<_>>());
        }
        questions.iter().map(|question| question.extent).collect()
    }

    fn extent(start: u64, end: u64) -> Extent {
        Extent::between(start, end).unwrap()
    }

    #[test]
    fn claims_are_cut_at_a_fixed_grid_wherever_they_begin() {
        let expected = [
            extent(BLOCK, MIB),
            extent(MIB, 2 * MIB),
            extent(2 * MIB, 2 * MIB + BLOCK),
            extent(2 * MIB + 2 * BLOCK, 2 * MIB + 3 * BLOCK),
        ];
        assert_eq!(asked(80 * MIB, &[1..33, 34..35], &[], 0), expected);
        // What others claimed is not asked for, and joins nothing.
        assert_eq!(
            asked(80 * MIB, &[1..33, 34..35], &[0..1, 33..34, 35..90], 0),
            expected
        );
        assert_eq!(asked(80 * MIB, &[], from_ref(&(0..90)), 0), []);
    }

    #[test]
    fn a_segment_ends_with_the_volume_and_knows_nothing_of_its_neighbours() {
        let size = SEGMENT + MIB + 512;
        let blocks = size.div_ceil(BLOCK);
        let all = 0..blocks;
        let first: Vec<_> = (0..64).map(|at| extent(at * MIB, (at + 1) * MIB)).collect();
        assert_eq!(asked(size, std::slice::from_ref(&all), &[], 0), first);
        let rest = [extent(SEGMENT, SEGMENT + MIB), extent(SEGMENT + MIB, size)];
        assert_eq!(asked(size, std::slice::from_ref(&all), &[], 1), rest);
        assert_eq!(asked(size, from_ref(&(1020..blocks)), &[], 1), rest);
        assert_eq!(asked(size, &[all], &[], 2), []);
    }

    #[test]
    fn what_an_instance_is_given_is_the_backups_own() {
        let [one, other] = [7, 8].map(|seconds| {
            BackupId::random(OffsetDateTime::from_unix_timestamp(seconds).unwrap()).unwrap()
        });
        assert_ne!(derived("a", one), derived("a", other));
        assert_eq!(derived("a", one), derived("a", one));
        assert_ne!(derived("a", one), derived("b", one));
        assert_eq!((one.seconds(), other.seconds()), (7, 8));
    }
}
