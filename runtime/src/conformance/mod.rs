//! The conformance kit: tries a provider with simulated disks and a real archive, through the code of a real job, and
//! says what it does wrong.
//!
//! - `content`: what the disks hold and how they change, from a seed
//! - `stand`: a simulated VM and an archive; backups and restores between them
//! - `cases`: what is tried, one function each
//! - `diagnosis`: from a failed backup to the mistake and what to do about it
//!
//! Nothing here decides whether a backup is good: that is the host's code, the same as in a real job. The kit only looks
//! at what a provider asked and was told (`trace`), and lets single calls fail.

mod cases;
mod content;
mod diagnosis;
mod stand;
pub(crate) mod trace;

pub use diagnosis::Mistake;

use crate::archive;
use crate::config::Provider;
use crate::contract::World;
use crate::job::component::Component;
use crate::sandbox::{Cache, Program};
use bytes::Bytes;
use serde::Serialize;
use stand::Attempt;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Longest run in the kit, in seconds; its disks have a few MiB.
const WALL_SECONDS: u64 = 120;
/// Longest CPU time of a run in the kit, in seconds.
const CPU_SECONDS: u64 = 60;

/// The provider that is tried.
pub struct Subject {
    name: String,
    bytes: Bytes,
    provider: Provider,
    component: Component,
    program: Program,
    cache: Cache,
    cancel: CancellationToken,
    scratch: PathBuf,
    seed: u64,
}

impl Subject {
    /// A provider as the operator configured it, of which `bytes` is the component. `scratch` is a private folder for
    /// archives and sockets, short enough for a socket's path. Everything that is tried follows from `seed`.
    #[allow(clippy::too_many_arguments)] // each is one of the things that a trial needs, made by the command
    pub fn new(
        name: String,
        bytes: Bytes,
        mut provider: Provider,
        component: Component,
        program: Program,
        cache: Cache,
        cancel: CancellationToken,
        scratch: PathBuf,
        seed: u64,
    ) -> Self {
        provider.limits.wall_seconds = provider.limits.wall_seconds.min(WALL_SECONDS);
        provider.limits.cpu_seconds = provider.limits.cpu_seconds.min(CPU_SECONDS);
        Self {
            name,
            bytes,
            provider,
            component,
            program,
            cache,
            cancel,
            scratch,
            seed,
        }
    }

    fn attempt(&self) -> Attempt {
        Attempt {
            provider: self.provider.clone(),
            fault: None,
            cut: None,
            bad_sector: None,
            id: None,
        }
    }
}

/// Something that a provider has to do right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// Several disks in full, each restored byte for byte
    Full,
    /// Two rounds of changes; every backup restored, the old ones too
    Incremental,
    /// A second backup without any change
    Unchanged,
    /// One disk has grown and one has shrunk since the base
    Resized,
    /// The base was removed from the archive
    BaseGone,
    /// What was claimed is read back in any order
    AnyOrder,
    /// The same disks and the same job give the same calls, objects and receipts
    Reproducible,
    /// Each kind of call fails with `io`, the first and the last of its kind
    FailingCalls,
    /// Objects cannot be read back
    FailingRestore,
    /// The job is cancelled, early and half-way
    Cancelled,
    /// Each quota is one short of what the provider used
    Limits,
    /// A sector cannot be read; the next backup carries everything
    BadSector,
    /// Each optional handle is withheld; how much memory is enough
    Grants,
}

impl Case {
    /// All, in the order in which they are tried.
    pub const ALL: [Self; 13] = [
        Self::Full,
        Self::Incremental,
        Self::Unchanged,
        Self::Resized,
        Self::BaseGone,
        Self::AnyOrder,
        Self::Reproducible,
        Self::FailingCalls,
        Self::FailingRestore,
        Self::Cancelled,
        Self::Limits,
        Self::BadSector,
        Self::Grants,
    ];

    /// As it is chosen by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Unchanged => "unchanged",
            Self::Resized => "resized",
            Self::BaseGone => "base-gone",
            Self::AnyOrder => "any-order",
            Self::Reproducible => "reproducible",
            Self::FailingCalls => "failing-calls",
            Self::FailingRestore => "failing-restore",
            Self::Cancelled => "cancelled",
            Self::Limits => "limits",
            Self::BadSector => "bad-sector",
            Self::Grants => "grants",
        }
    }
}

/// How a case ended.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Outcome {
    /// All was as it should be.
    Passed {
        /// What was tried.
        detail: String,
    },
    /// The provider does something wrong.
    Failed {
        /// At least one.
        mistakes: Vec<Mistake>,
    },
    /// There is nothing to try.
    NotTried {
        /// Why.
        reason: String,
    },
}

/// One case of a report.
#[derive(Debug, Clone, Serialize)]
pub struct CaseReport {
    /// What was tried.
    pub case: Case,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
}

/// Whether a handle is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// Without it there is no backup.
    Required,
    /// It is used, but backups work without it.
    Used,
    /// It is never used.
    Unused,
}

/// What a provider needs at least: what an operator has to grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// Its world.
    pub world: World,
    /// `content.reader`.
    pub reader: Need,
    /// `volume.discarder`.
    pub discarder: Need,
    /// Most objects that it created for one of the kit's volumes.
    pub objects: u32,
    /// Memory with which a backup of the kit's smallest VM works, in bytes: the smallest of those tried.
    pub memory: Option<u64>,
}

/// What the kit found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Chosen or random: the same seed tries the same.
    pub seed: u64,
    /// Each case that was chosen.
    pub cases: Vec<CaseReport>,
    /// Where the case `grants` was tried and passed.
    pub needs: Option<Needs>,
}

impl Report {
    /// Whether no case failed.
    pub fn passed(&self) -> bool {
        let failed = |it: &CaseReport| matches!(it.outcome, Outcome::Failed { .. });
        !self.cases.iter().any(failed)
    }
}

/// Why the kit could not do its work. Never the provider's fault.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// A file, a folder or a socket.
    #[error("the kit's own files")]
    Io(#[from] std::io::Error),
    /// The archive.
    #[error("the kit's archive")]
    Archive(#[from] archive::Error),
    /// The host's side of a job.
    #[error("the host failed, not the provider: {0}")]
    Host(String),
    /// The kit itself.
    #[error("the kit is wrong: {0}")]
    Own(&'static str),
    /// A signal asked for the end.
    #[error("cancelled")]
    Cancelled,
}

/// Tries `chosen`, and tells of each case when it has ended. Where `full` is among them and fails, the rest is not
/// tried: it would only fail for the same reason.
pub async fn run(
    subject: &Subject,
    chosen: &[Case],
    mut tell: impl FnMut(&CaseReport),
) -> Result<Report, KitError> {
    let mut report = Report {
        seed: subject.seed,
        cases: Vec::new(),
        needs: None,
    };
    for &case in chosen {
        let started = Instant::now();
        let outcome = if report.passed() || case == Case::Full || !failed(&report, Case::Full) {
            cases::attempt(subject, case, &mut report.needs).await?
        } else {
            Outcome::NotTried {
                reason: "`full` has to pass first".into(),
            }
        };
        let ended = CaseReport {
            case,
            outcome,
            seconds: rounded(started.elapsed()),
        };
        tell(&ended);
        report.cases.push(ended);
    }
    Ok(report)
}

fn failed(report: &Report, case: Case) -> bool {
    report
        .cases
        .iter()
        .any(|it| it.case == case && matches!(it.outcome, Outcome::Failed { .. }))
}

/// To milliseconds.
fn rounded(took: Duration) -> f64 {
    took.as_millis() as f64 / 1000.0
}
