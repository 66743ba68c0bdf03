//! Reads one volume of a backup completely, each block compared with its digest: what restore and verify share.
//!
//! What the host placed comes from the archive alone. What a provider claimed is asked of that provider's `image` of
//! the very backup in which it was claimed, run from the component that the archive keeps, and as it was asked when that
//! backup was proven ([`claims`]).

use super::claims::{self, Claims, ClaimsError, Question, segment_of};
use super::component::{Component, ComponentError};
use super::means::Means;
use super::reading::Reading;
use super::volume_run::guest_limits;
use crate::access::{Placed, PlacedError};
use crate::archive::{
    self, BackupId, Manifest, Namespace, ObjectName, Run, RunContent, VolumeRecord,
};
use crate::contract::GuestLimits;
use crate::digest::{self, Digest};
use crate::event::{Event, Events};
use crate::extent::Extent;
use crate::grants::image::{ImageError, Purpose};
use crate::policy::Denied;
use crate::sandbox::Cache;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

/// Runs of the block table that wait to be read.
const QUEUE: usize = 64;

/// Blocks whose claims wait until so many are known: they are then asked for backup by backup, so that each manifest and
/// component is read once for all of them. They take some 4 MiB.
const WAITING: u64 = 1 << 16;

/// Images open at once, each with a process and the memory that its provider may have. They share no budget as those of a
/// backup do: an image that is refused what another one holds would fail a restore that each alone lets succeed.
const IMAGES: usize = 4;

/// Backups whose claims are known at once. Each holds a list of objects and a receipt.
const BACKUPS: usize = 16;

/// Findings that are listed one by one; a backup with more is as lost as one with these.
pub const FINDINGS: usize = 100;

/// What to read, and where to.
pub struct ReadBack<'a> {
    /// The backup.
    pub reading: &'a Reading<'a>,
    /// Its volume.
    pub volume: &'a VolumeRecord,
    /// Where its bytes go; zero blocks are not written, so a file must be sparse and an image zeroed before.
    pub output: Option<Arc<File>>,
    /// Compiled components.
    pub cache: &'a Cache,
    /// The job's.
    pub means: &'a Means,
    /// Whether to go on after a finding.
    pub all_findings: bool,
}

/// Something that is not as it was backed up.
#[derive(Debug, thiserror::Error)]
pub enum Finding {
    /// What the host placed cannot be had.
    #[error(transparent)]
    Placed(#[from] PlacedError),
    /// The bytes are not those that were backed up.
    #[error("{extent}: the bytes are not those that were backed up ({origin})")]
    Wrong {
        /// The block.
        extent: Extent,
        /// Where they came from.
        origin: String,
    },
    /// The provider does not give back what it claimed.
    #[error("{extent}: the provider of backup {backup} does not give back what it claimed")]
    NotGivenBack {
        /// Of the volume.
        extent: Extent,
        /// Where it was claimed.
        backup: BackupId,
        /// Why.
        source: ImageError,
    },
    /// The provider of a backup cannot be asked.
    #[error("the provider of backup {backup} cannot be asked for what it claimed")]
    NoProvider {
        /// Where ranges were claimed.
        backup: BackupId,
        /// Why.
        source: Box<ProviderError>,
    },
    /// The backup that is named as the one that claimed it does not know it.
    #[error("{extent}: backup {backup}, in which it is said to be claimed, has no claim of it")]
    NotClaimed {
        /// Of the volume.
        extent: Extent,
        /// Where it should have been claimed.
        backup: BackupId,
    },
    /// The block table itself cannot be read.
    #[error("the block table")]
    Table(#[source] archive::Error),
}

impl Finding {
    /// What of the volume it is about, where that is known.
    pub fn extent(&self) -> Option<Extent> {
        match self {
            Self::Placed(
                PlacedError::Unreadable { extent, .. } | PlacedError::Wrong { extent, .. },
            )
            | Self::Wrong { extent, .. }
            | Self::NotGivenBack { extent, .. }
            | Self::NotClaimed { extent, .. } => Some(*extent),
            Self::NoProvider { .. } | Self::Table(_) => None,
        }
    }
}

/// Why a backup's own provider cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// Its manifest or component is not in the archive.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// The policy does not let it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The component does not compile.
    #[error(transparent)]
    Component(#[from] ComponentError),
    /// It cannot be asked.
    #[error(transparent)]
    Claims(#[from] ClaimsError),
    /// The manifest does not hold the volume.
    #[error("its manifest does not hold the volume")]
    NoVolume,
}

/// Why reading ended early, findings aside.
#[derive(Debug, thiserror::Error)]
pub enum ReadBackError {
    /// The output cannot be written.
    #[error("writing failed")]
    Output(#[from] io::Error),
    /// A task of the job died.
    #[error("a task of the job died")]
    Task(#[from] tokio::task::JoinError),
    /// A signal asked for the end.
    #[error("cancelled")]
    Cancelled,
}

/// Reads the volume; returns what was found wrong, at most [`FINDINGS`].
pub async fn read_back(wanted: ReadBack<'_>) -> Result<Vec<Finding>, ReadBackError> {
    let (sender, mut runs) = mpsc::channel(QUEUE);
    let namespace = Arc::clone(wanted.reading.namespace);
    let (volume, events) = (wanted.volume.clone(), wanted.means.events.clone());
    let walk = spawn_blocking(move || walk(&namespace, &volume, &sender, &events));
    let mut under_way = UnderWay {
        wanted,
        known: VecDeque::new(),
        claimed: BTreeMap::new(),
        waiting: 0,
        segment: 0,
        findings: Vec::new(),
        placed: JoinSet::new(),
        asked: JoinSet::new(),
        copied: Arc::default(),
    };
    let result = under_way.read(&mut runs).await;
    runs.close();
    under_way.placed.shutdown().await;
    under_way.asked.shutdown().await;
    let copied = under_way.copied.load(Ordering::Relaxed);
    if copied > 0 {
        under_way.wanted.means.events.warn(format!(
            "{}: {copied} damaged pieces were read from copies that a later backup stored",
            under_way.wanted.volume.name
        ));
    }
    if let Err(error) = walk.await? {
        under_way.findings.push(Finding::Table(error));
    }
    result?;
    under_way.findings.truncate(FINDINGS);
    Ok(under_way.findings)
}

/// Compares what the provider wrote of each object with its digest: also bytes that no volume's blocks lead to. Returns
/// what is not as it was, with the object's name.
pub async fn check_objects(
    namespace: &Namespace,
    manifest: &Manifest,
    cancel: &CancellationToken,
) -> Result<Vec<(ObjectName, archive::Error)>, ReadBackError> {
    let objects = Arc::new(namespace.objects(manifest));
    let mut found = Vec::new();
    for info in &manifest.objects {
        if cancel.is_cancelled() {
            return Err(ReadBackError::Cancelled);
        }
        let (objects, name) = (Arc::clone(&objects), info.name.clone());
        if let Err(error) = spawn_blocking(move || objects.verify(&name)).await? {
            if error.is_damage() {
                namespace.note_wrong_object(manifest.backup, &info.name);
            }
            found.push((info.name.clone(), error));
        }
    }
    Ok(found)
}

/// Sends the runs that hold data, cut to what is read at once. With the others nothing is left to do.
fn walk(
    namespace: &Namespace,
    volume: &VolumeRecord,
    runs: &mpsc::Sender<Run>,
    events: &Events,
) -> Result<(), archive::Error> {
    let root = volume.root;
    let table = namespace.table(root);
    for run in table.entries(0..root.blocks())? {
        let run = run?;
        if matches!(run.content, RunContent::Zero) {
            let bytes = claims::extent_of(&root, &run.blocks).map_or(0, Extent::len);
            let volume = volume.name.clone();
            events.send(Event::Advance { volume, bytes });
        } else if runs.blocking_send(run).is_err() {
            // Nobody reads any more.
            break;
        }
    }
    Ok(())
}

struct UnderWay<'a> {
    wanted: ReadBack<'a>,
    /// What providers can be asked for; what was used last comes last.
    known: VecDeque<Arc<Claims>>,
    /// What waits to be asked for, by where it was claimed and by segment.
    claimed: BTreeMap<BackupId, BTreeMap<u64, Wanted>>,
    /// Blocks in these.
    waiting: u64,
    /// Where the last one of them lies.
    segment: u64,
    findings: Vec<Finding>,
    placed: JoinSet<Result<Result<u64, Finding>, io::Error>>,
    asked: JoinSet<Result<Vec<Finding>, ReadBackError>>,
    /// Runs that were read from copies of damaged frames.
    copied: Arc<AtomicU64>,
}

/// Blocks that are wanted of one segment, by their indices.
type Wanted = BTreeMap<u64, Digest>;

impl UnderWay<'_> {
    async fn read(&mut self, runs: &mut mpsc::Receiver<Run>) -> Result<(), ReadBackError> {
        let at_once = std::thread::available_parallelism().map_or(2, std::num::NonZero::get) * 2;
        while let Some(run) = runs.recv().await {
            if self.wanted.means.cancel.is_cancelled() {
                return Err(ReadBackError::Cancelled);
            }
            match run.content {
                RunContent::Zero => {}
                RunContent::Placed { .. } => {
                    self.start_placed(run);
                    while self.placed.len() >= at_once {
                        self.next_placed().await?;
                    }
                }
                RunContent::Claimed { backup, digests } => {
                    self.want(backup, run.blocks, digests).await?;
                }
            }
            if self.enough() {
                return Ok(());
            }
        }
        while !self.placed.is_empty() && !self.enough() {
            self.next_placed().await?;
        }
        self.ask_for_claims().await
    }

    /// Notes what is to be asked for; asks once enough is known. A segment is not asked twice for what comes in a row.
    async fn want(
        &mut self,
        backup: BackupId,
        blocks: Range<u64>,
        digests: Vec<Digest>,
    ) -> Result<(), ReadBackError> {
        let block = u64::from(self.wanted.volume.root.block_size());
        for (index, digest) in blocks.zip(digests) {
            let segment = segment_of(index * block);
            if self.waiting >= WAITING && self.segment != segment {
                self.ask_for_claims().await?;
            }
            self.segment = segment;
            self.waiting += 1;
            let wanted = self.claimed.entry(backup).or_default();
            wanted.entry(segment).or_default().insert(index, digest);
        }
        Ok(())
    }

    /// Asks for all claims that wait.
    async fn ask_for_claims(&mut self) -> Result<(), ReadBackError> {
        self.waiting = 0;
        for (backup, segments) in std::mem::take(&mut self.claimed) {
            let claims = match self.claims(backup).await {
                Ok(claims) => claims,
                Err(source) => {
                    let source = Box::new(source);
                    self.findings.push(Finding::NoProvider { backup, source });
                    continue;
                }
            };
            for (segment, wanted) in segments {
                while self.asked.len() >= IMAGES {
                    self.next_asked().await?;
                }
                if self.enough() {
                    return Ok(());
                }
                let ask = Ask {
                    namespace: Arc::clone(self.wanted.reading.namespace),
                    claims: Arc::clone(&claims),
                    segment,
                    output: self.wanted.output.clone(),
                    means: self.wanted.means.clone(),
                    all_findings: self.wanted.all_findings,
                };
                self.asked.spawn(ask.give_back(wanted));
            }
        }
        while !self.asked.is_empty() && !self.enough() {
            self.next_asked().await?;
        }
        Ok(())
    }

    async fn next_asked(&mut self) -> Result<(), ReadBackError> {
        if let Some(done) = self.asked.join_next().await {
            self.findings.extend(done??);
        }
        Ok(())
    }

    /// What was claimed in a backup, from what is known already.
    async fn claims(&mut self, backup: BackupId) -> Result<Arc<Claims>, ProviderError> {
        let at = self.known.iter().position(|of| of.backup == backup);
        let claims = match at.and_then(|at| self.known.remove(at)) {
            Some(claims) => claims,
            None => {
                let &ReadBack {
                    reading,
                    volume,
                    cache,
                    means,
                    ..
                } = &self.wanted;
                Arc::new(look_up(reading, volume, backup, cache, means).await?)
            }
        };
        self.known.push_back(Arc::clone(&claims));
        while self.known.len() > BACKUPS {
            self.known.pop_front();
        }
        Ok(claims)
    }

    fn enough(&self) -> bool {
        self.findings.len()
            >= if self.wanted.all_findings {
                FINDINGS
            } else {
                1
            }
    }

    fn extent(&self, run: &Run) -> Extent {
        claims::extent_of(&self.wanted.volume.root, &run.blocks).expect("a run is not empty")
    }

    fn start_placed(&mut self, run: Run) {
        let extent = self.extent(&run);
        let namespace = Arc::clone(self.wanted.reading.namespace);
        let output = self.wanted.output.clone();
        let block = self.wanted.volume.root.block_size();
        let copied = Arc::clone(&self.copied);
        self.placed.spawn_blocking(move || {
            let RunContent::Placed {
                frame,
                skip,
                digests,
            } = run.content
            else {
                return Ok(Ok(0));
            };
            let placed = Placed {
                extent,
                skip,
                digests,
                block,
            };
            let bytes = match placed.read(&namespace, &frame) {
                Ok(bytes) => bytes,
                Err(finding) => match placed.of_a_copy(&namespace, &frame) {
                    Some(bytes) => {
                        copied.fetch_add(1, Ordering::Relaxed);
                        bytes
                    }
                    None => return Ok(Err(finding.into())),
                },
            };
            if let Some(output) = output {
                output.write_all_at(&bytes, extent.start())?;
            }
            Ok(Ok(extent.len()))
        });
    }

    async fn next_placed(&mut self) -> Result<(), ReadBackError> {
        if let Some(done) = self.placed.join_next().await {
            match done?? {
                Ok(bytes) => {
                    let volume = self.wanted.volume.name.clone();
                    let events = &self.wanted.means.events;
                    events.send(Event::Advance { volume, bytes });
                }
                Err(finding) => self.findings.push(finding),
            }
        }
        Ok(())
    }
}

/// What `volume`'s provider claimed in `backup`, ready to be asked for.
///
/// # Errors
/// Where it may not be asked, or cannot.
pub async fn look_up(
    reading: &Reading<'_>,
    volume: &VolumeRecord,
    backup: BackupId,
    cache: &Cache,
    means: &Means,
) -> Result<Claims, ProviderError> {
    let own = backup == reading.manifest.backup;
    let manifest = if own {
        Arc::clone(reading.manifest)
    } else {
        Arc::new(reading.namespace.manifest(backup)?)
    };
    let name = &volume.name;
    let volume = manifest
        .record
        .volumes
        .iter()
        .find(|volume| volume.name == *name)
        .ok_or(ProviderError::NoVolume)?;
    let (vm, provider) = (&manifest.record.vm, &manifest.record.provider);
    let granted = reading.restores.limits(vm, &provider.name)?;
    let granted = granted.map_or(0, |limits| guest_limits(&limits).cpu_ms);
    let limits = GuestLimits {
        // What it was at the proof: a provider can find out how much it may have.
        memory: provider.limits.memory,
        cpu_ms: provider.limits.cpu_ms.max(granted),
    };
    let limits = capped(limits);
    let bytes = reading.namespace.component(provider.component)?;
    let component = Component::load(
        bytes.into(),
        &means.program,
        cache,
        reading.restores.wasi(vm, &provider.name),
        &means.events,
    )
    .await?;
    Ok(Claims {
        means: means.clone(),
        backup,
        open: claims::image(
            &component,
            backup,
            provider.settings.clone(),
            volume.receipt.clone(),
            limits,
        ),
        component,
        objects: reading.namespace.objects(&manifest),
        table: Arc::new(reading.namespace.table(volume.root)),
        volume: name.clone(),
        purpose: Purpose::Restore,
    })
}

/// Asking for what is wanted of one segment.
struct Ask {
    namespace: Arc<Namespace>,
    claims: Arc<Claims>,
    segment: u64,
    output: Option<Arc<File>>,
    means: Means,
    all_findings: bool,
}

impl Ask {
    async fn give_back(self, mut wanted: Wanted) -> Result<Vec<Finding>, ReadBackError> {
        let backup = self.claims.backup;
        let mut asking = match self.unless_cancelled(self.claims.ask(self.segment)).await? {
            Ok(asking) => asking,
            Err(source) => {
                let source = Box::new(source.into());
                return Ok(vec![Finding::NoProvider { backup, source }]);
            }
        };
        let mut findings = Vec::new();
        while !wanted.is_empty() && self.goes_on(&findings) {
            let Some((question, answer)) = self.unless_cancelled(asking.next()).await? else {
                break;
            };
            let wanted_of_it = question
                .blocks
                .clone()
                .filter_map(|index| Some((index, wanted.remove(&index)?)));
            let wanted_of_it: Vec<_> = wanted_of_it.collect();
            match answer {
                // Only so that the next question comes after it, as it did at the proof.
                Ok(_) if wanted_of_it.is_empty() => {}
                Ok(bytes) => findings.extend(self.take(question, bytes, wanted_of_it).await?),
                Err(source) => {
                    let lost = if source.has_ended_it() {
                        let rest = std::mem::take(&mut wanted).into_iter();
                        wanted_of_it.into_iter().chain(rest).collect()
                    } else {
                        wanted_of_it
                    };
                    findings.extend(self.around(&lost).map(|extent| Finding::NotGivenBack {
                        extent,
                        backup,
                        source,
                    }));
                }
            }
        }
        asking.close().await;
        if self.goes_on(&findings) {
            let unknown: Vec<_> = wanted.into_iter().collect();
            let extent = self.around(&unknown);
            findings.extend(extent.map(|extent| Finding::NotClaimed { extent, backup }));
        }
        if !findings.is_empty() {
            self.namespace.note_wrong_claims(backup);
        }
        Ok(findings)
    }

    fn goes_on(&self, findings: &[Finding]) -> bool {
        findings.is_empty() || self.all_findings
    }

    /// Compares the wanted blocks of an answer, which has the length of its question, and writes them.
    async fn take(
        &self,
        question: Question,
        bytes: Vec<u8>,
        wanted: Vec<(u64, Digest)>,
    ) -> Result<Option<Finding>, ReadBackError> {
        let block = self.claims.table.root().block_size();
        let (output, events) = (self.output.clone(), self.means.events.clone());
        let volume = self.claims.volume.clone();
        let taken = spawn_blocking(move || {
            for run in wanted.chunk_by(|(before, _), (after, _)| before + 1 == *after) {
                let skip = (run[0].0 - question.blocks.start) * u64::from(block);
                let (_, rest) = bytes.split_at(skip as usize);
                let length = rest.len().min(run.len() * block as usize);
                let Ok(extent) = Extent::new(question.extent.start() + skip, length as u64) else {
                    continue;
                };
                let digests: Vec<_> = run.iter().map(|(_, digest)| *digest).collect();
                let wrong = digest::first_wrong(&rest[..length], extent, block, &digests);
                if wrong.is_some() {
                    return Ok(wrong);
                }
                if let Some(output) = &output {
                    output.write_all_at(&rest[..length], extent.start())?;
                }
                events.send(Event::Advance {
                    volume: volume.clone(),
                    bytes: extent.len(),
                });
            }
            Ok::<_, io::Error>(None)
        });
        let wrong = taken.await??;
        Ok(wrong.map(|extent| Finding::Wrong {
            extent,
            origin: format!("the provider of backup {}", self.claims.backup),
        }))
    }

    /// From the first of these blocks to the last.
    fn around(&self, blocks: &[(u64, Digest)]) -> Option<Extent> {
        let ((first, _), (last, _)) = (blocks.first()?, blocks.last()?);
        claims::extent_of(self.claims.table.root(), &(*first..last + 1))
    }

    async fn unless_cancelled<T>(
        &self,
        future: impl Future<Output = T>,
    ) -> Result<T, ReadBackError> {
        let done = self.means.unless_cancelled(future).await;
        done.ok_or(ReadBackError::Cancelled)
    }
}
/// What a manifest says that a provider may use, as far as any provider may: whoever can write to the archive may have
/// written it.
fn capped(limits: GuestLimits) -> GuestLimits {
    GuestLimits {
        memory: limits.memory.min(LARGEST_MEMORY),
        cpu_ms: limits.cpu_ms.min(LONGEST_CPU_MS),
    }
}

/// All that 32-bit WebAssembly can address.
const LARGEST_MEMORY: u64 = 4 << 30;

/// A day.
const LONGEST_CPU_MS: u64 = 24 * 3600 * 1000;
