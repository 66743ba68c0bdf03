//! One run of a provider on one volume: answers its calls until it returns, then looks at what it covered.

use super::account::Account;
use super::farewell::{Farewells, cancelled};
use super::pace::{Pace, TooSlow};
use super::provider_log::{ProviderLog, harmless};
use super::stream::Stream;
use super::target::{HostFailure, Target};
use crate::channel::{Answer, Call, Failure, Outcome};
use crate::contract::{ErrorCode, MAX_RECEIPT, MAX_WRITE, RawRange, World, with_causes};
use crate::extent::Extent;
use crate::sandbox::{self, Process};
use crate::volume::coverage::CoverageError;
use crate::volume::plan::Cursor;
use crate::volume::read_ahead::ReadAhead;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// What a run may use.
#[derive(Debug)]
pub struct Terms {
    /// The component's world.
    pub world: World,
    /// Whether `reader` is granted.
    pub reader: bool,
    /// Whether `discarder` is granted.
    pub discarder: bool,
    /// The volume's number, where the names of its objects are its own.
    pub own_names: Option<usize>,
    /// What the job, or this volume of it, has used of the provider's limits.
    pub account: Arc<Account>,
    /// `job.context.attachment`.
    pub attachments: Arc<BTreeMap<String, Vec<u8>>>,
    /// Where a run that is cancelled goes.
    pub farewells: Farewells,
}

/// Why a run did not back its volume up.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The host failed at what the provider rightly asked for.
    #[error(transparent)]
    Host(#[from] HostFailure),
    /// The sandbox process died or broke the protocol.
    #[error("the provider's sandbox")]
    Sandbox(#[from] sandbox::Error),
    /// The provider's code trapped or passed a limit.
    #[error("the provider failed: {0}")]
    Guest(String),
    /// The provider returned an error.
    #[error("the provider gave up: {0}")]
    GaveUp(String),
    /// The provider returned something that its order does not end with.
    #[error("the provider's sandbox broke the protocol: it ended its run with something else")]
    Protocol,
    /// `wall-seconds` passed.
    #[error(
        "the provider was stopped: it ran for longer than its limit of {seconds} s (wall-seconds)"
    )]
    WallTime {
        /// The limit.
        seconds: u64,
    },
    /// `progress-per-minute` was not kept.
    #[error(
        "the provider was stopped: it covered {covered} bytes in {seconds} s of its own time, less than its limit of {least} in a minute (progress-per-minute)"
    )]
    Trickles {
        /// Bytes of the volume.
        covered: u64,
        /// Seconds that the host waited for the provider's calls.
        seconds: u64,
        /// The limit.
        least: u64,
    },
    /// The receipt is longer than `receipt-bytes`.
    #[error(
        "the provider's receipt has {actual} bytes, more than its limit of {limit} (receipt-bytes)"
    )]
    Receipt {
        /// In bytes.
        limit: u32,
        /// In bytes.
        actual: usize,
    },
    /// It returned success without having covered everything.
    #[error(
        "the provider says it succeeded, but {bytes} bytes are in no finished object, the first at {first}"
    )]
    Uncovered {
        /// Sum of the uncovered ranges.
        bytes: u64,
        /// The first of them.
        first: Extent,
    },
    /// The job was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// How long a run that has failed waits for what is still being written. The VM's snapshot is there until then, and an
/// archive that hangs must not keep it.
const SETTLE_TIME: Duration = Duration::from_secs(5);

/// Serves `process` until it is done or has to be stopped; returns its receipt. Whatever happens, the process is gone
/// when this returns, or among the `farewells` of a job that was cancelled, and no task of the run is left, unless it hangs
/// in an archive that does not answer.
pub async fn run(
    mut process: Process,
    target: Arc<Target>,
    terms: Terms,
    cancel: &CancellationToken,
) -> Result<Vec<u8>, RunError> {
    let account = Arc::clone(&terms.account);
    let wall = account.limits().wall();
    let seconds = account.limits().wall_seconds;
    let farewells = terms.farewells.clone();
    let mut run = Run::new(Arc::clone(&target), terms);
    let deadline = Instant::now() + wall;
    let mut ended = within(deadline, seconds, cancel, run.serve(&mut process)).await;
    match ended {
        Err(RunError::Cancelled) => farewells.begin(process, run.owed.take(), Arc::clone(&account)),
        _ => account.sandbox(process.kill().await),
    }
    let mut settling = pin!(run.settle());
    if ended.is_ok() {
        // What is under way is a part of what the provider did.
        let settled = async {
            settling.as_mut().await;
            Ok(())
        };
        if let Err(stopped) = within(deadline, seconds, cancel, settled).await {
            ended = Err(stopped);
        }
    }
    let before = target.take_failure();
    if ended.is_err() {
        // Nothing more is wanted from the snapshot; a server that does not answer must not hold the end up.
        target.frozen.reader.disconnect().await;
        if timeout(SETTLE_TIME, settling).await.is_err() {
            target.events.warn(format!(
                "{}: what was being read or written did not end in time and is given up",
                target.volume
            ));
        }
    }
    // What failed before the end is its reason, what failed after it is its consequence.
    if let Some(failure) = before {
        return Err(failure.into());
    }
    let receipt = ended?;
    if let Some(failure) = target.take_failure() {
        return Err(failure.into());
    }
    let uncovered = target.books().uncovered(&target.frozen.plan);
    match uncovered.iter().next() {
        Some(first) => Err(RunError::Uncovered {
            bytes: uncovered.bytes(),
            first,
        }),
        None => Ok(receipt),
    }
}

/// What `work` comes to, unless the job is told to stop or the run has had its time.
async fn within<T>(
    deadline: Instant,
    seconds: u64,
    cancel: &CancellationToken,
    work: impl Future<Output = Result<T, RunError>>,
) -> Result<T, RunError> {
    tokio::select! {
        done = timeout_at(deadline, work) => done.unwrap_or(Err(RunError::WallTime { seconds })),
        () = cancel.cancelled() => Err(RunError::Cancelled),
    }
}

pub(super) struct Run {
    pub(super) target: Arc<Target>,
    pub(super) terms: Terms,
    pub(super) account: Arc<Account>,
    pace: Option<Pace>,
    pub(super) log: ProviderLog,
    pub(super) cursor: Cursor,
    pub(super) read_ahead: ReadAhead,
    /// Bytes that `read` gave to the provider.
    pub(super) read_given: u64,
    /// Bytes that were charged for them.
    pub(super) read_charged: u64,
    pub(super) streams: BTreeMap<u32, Stream>,
    pub(super) next_stream: u32,
    pub(super) buffer: Vec<u8>,
    /// What the call that is being answered is answered if the run is cancelled meanwhile.
    owed: Option<Answer>,
}

impl Run {
    fn new(target: Arc<Target>, terms: Terms) -> Self {
        Self {
            account: Arc::clone(&terms.account),
            pace: terms.account.limits().progress_per_minute.map(Pace::new),
            log: ProviderLog::new(
                &target.volume,
                target.events.clone(),
                Arc::clone(&terms.account),
            ),
            cursor: Cursor::default(),
            read_ahead: ReadAhead::new(Arc::clone(&target.frozen)),
            read_given: 0,
            read_charged: 0,
            streams: BTreeMap::new(),
            next_stream: 0,
            buffer: Vec::new(),
            owed: None,
            target,
            terms,
        }
    }

    async fn serve(&mut self, process: &mut Process) -> Result<Vec<u8>, RunError> {
        loop {
            let call = match self.next(process).await? {
                Call::Done(Outcome::Receipt(receipt)) => return self.check_receipt(receipt),
                Call::Done(Outcome::GuestError(code)) => {
                    return Err(RunError::GaveUp(harmless(&with_causes(&code))));
                }
                Call::Done(Outcome::Failed(Failure::TooLarge { length, .. })) => {
                    return Err(self.too_long(usize::try_from(length).unwrap_or(usize::MAX)));
                }
                Call::Done(Outcome::Failed(failure)) => {
                    return Err(RunError::Guest(harmless(&with_causes(&failure))));
                }
                Call::Done(_) => return Err(RunError::Protocol),
                call => call,
            };
            self.owed = Some(cancelled(&call));
            let answer = match self.answer(call, process).await? {
                Ok(answer) => answer,
                Err(code) => {
                    self.account.refused(&code);
                    Answer::Error(code)
                }
            };
            process.answer(&answer)?;
            self.owed = None;
        }
    }

    /// The next call, from a provider that keeps its pace.
    async fn next(&mut self, process: &mut Process) -> Result<Call, RunError> {
        loop {
            let Some(pace) = &mut self.pace else {
                return Ok(process.next().await?);
            };
            let since = Instant::now();
            let call = tokio::time::timeout(pace.patience(), process.next()).await;
            let judged = pace.judge(since.elapsed(), self.target.covered_bytes());
            if let Err(TooSlow { covered, seconds }) = judged {
                let target = &self.target;
                if !target.books().uncovered(&target.frozen.plan).is_empty() {
                    return Err(RunError::Trickles {
                        covered,
                        seconds,
                        least: self.account.limits().progress_per_minute.unwrap_or(0),
                    });
                }
                // Nothing is left that it could be slow at.
                self.pace = None;
            }
            if let Ok(call) = call {
                return Ok(call?);
            }
        }
    }

    fn check_receipt(&self, receipt: Vec<u8>) -> Result<Vec<u8>, RunError> {
        self.account.receipt(receipt.len());
        if receipt.len() > self.receipt_limit() as usize {
            return Err(self.too_long(receipt.len()));
        }
        Ok(receipt)
    }

    /// The policy's, which cannot give more than the contract.
    fn receipt_limit(&self) -> u32 {
        self.account.limits().receipt_bytes.min(MAX_RECEIPT as u32)
    }

    fn too_long(&self, actual: usize) -> RunError {
        RunError::Receipt {
            limit: self.receipt_limit(),
            actual,
        }
    }

    /// The outer error ends the run; the inner one is for the provider.
    async fn answer(
        &mut self,
        call: Call,
        process: &mut Process,
    ) -> Result<Result<Answer, ErrorCode>, RunError> {
        Ok(match call {
            Call::NextRegions { limit: 0 } => Err(ErrorCode::OutOfRange),
            Call::NextRegions { limit } => Ok(self.next_regions(limit)),
            Call::Discard(range) => self.discard(range).await,
            Call::Read { offset, length } => match self.read(offset, length).await {
                Ok(()) => Ok(Answer::Bytes {
                    length: process.give_payload(&self.buffer)?,
                }),
                Err(code) => Err(code),
            },
            Call::Put(range, encoding) => self.put(range, encoding).await,
            Call::Create { name, encoding } => self.create(&name, encoding).await,
            Call::Write { stream, length } => {
                if length > MAX_WRITE {
                    return Ok(Err(ErrorCode::TooLarge));
                }
                self.write(stream, process.take_payload(length)?).await
            }
            Call::Splice { stream, range } => self.splice(stream, range).await,
            Call::Claim { stream, range } => self.claim(stream, range).await,
            Call::Finish { stream } => self.finish(stream).await,
            Call::DropStream { stream } => self.drop_stream(stream).await,
            Call::Attachment { name } => Ok(self.attachment(&name, process)?),
            Call::Log { level, message } => Ok(self.log(level, &message)),
            // The process's own budget has answered it.
            Call::Grow { .. } => Err(ErrorCode::TooLarge),
            // `stored` is not of this world's run.
            Call::ObjectSize { .. } | Call::ObjectRead { .. } => Err(ErrorCode::NotFound),
            Call::Done(_) => return Err(RunError::Protocol),
        })
    }

    /// Waits for everything that is under way; streams that were not finished are gone.
    async fn settle(mut self) {
        for (number, stream) in std::mem::take(&mut self.streams) {
            stream.discard().await;
            self.target.books().drop_stream(number);
        }
        self.target.tasks.close();
        self.target.tasks.wait().await;
    }

    pub(super) fn whole_blocks(&self, range: RawRange) -> Result<Extent, ErrorCode> {
        self.target
            .frozen
            .plan
            .whole_blocks(range.offset, range.length)
            .ok_or(ErrorCode::OutOfRange)
    }

    /// A failure of an earlier call shows in a later one.
    pub(super) fn check_host(&self) -> Result<(), ErrorCode> {
        if self.target.has_failed() {
            Err(ErrorCode::Io)
        } else {
            Ok(())
        }
    }

    pub(super) fn failed(&self, failure: HostFailure) -> ErrorCode {
        self.target.fail(failure);
        ErrorCode::Io
    }
}

pub(super) fn refused(error: CoverageError) -> ErrorCode {
    use CoverageError::{Covered, NotDirty, Unfinished};
    match error {
        NotDirty(_) | Covered(_) | Unfinished(_) => ErrorCode::NotDirty,
    }
}
