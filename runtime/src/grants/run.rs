//! One run of a provider on one volume: answers its calls until it returns, then looks at what it covered.

use super::account::Account;
use super::farewell::{Farewells, cancelled};
use super::names;
use super::pace::{Pace, TooSlow};
use super::provider_log::{ProviderLog, harmless};
use super::put;
use super::stream::{Failed, Stream};
use super::target::{HostFailure, Target};
use crate::archive::{self, ObjectName};
use crate::channel::{Answer, Call, Failure, Outcome};
use crate::contract::{
    Encoding, ErrorCode, MAX_ATTACHMENT, MAX_PUT, MAX_READ, MAX_RECEIPT, MAX_REGIONS, MAX_STREAMS,
    MAX_WRITE, RawRange, World,
};
use crate::digest::{self, Digest};
use crate::extent::Extent;
use crate::sandbox::{self, Process};
use crate::volume::coverage::{Cover, CoverageError};
use crate::volume::discard;
use crate::volume::plan::Cursor;
use crate::volume::read_ahead::ReadAhead;
use crate::volume::reader::PIECE;
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
    #[error("the provider's sandbox: {0}")]
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

struct Run {
    target: Arc<Target>,
    terms: Terms,
    account: Arc<Account>,
    pace: Option<Pace>,
    log: ProviderLog,
    cursor: Cursor,
    read_ahead: ReadAhead,
    /// Bytes that `read` gave to the provider.
    read_given: u64,
    /// Bytes that were charged for them.
    read_charged: u64,
    streams: BTreeMap<u32, Stream>,
    next_stream: u32,
    buffer: Vec<u8>,
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
                    return Err(RunError::GaveUp(harmless(&code.to_string())));
                }
                Call::Done(Outcome::Failed(Failure::TooLarge { length, .. })) => {
                    return Err(self.too_long(usize::try_from(length).unwrap_or(usize::MAX)));
                }
                Call::Done(Outcome::Failed(failure)) => {
                    return Err(RunError::Guest(harmless(&failure.to_string())));
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
            Call::Attachment { name } => match self.terms.attachments.get(&name) {
                Some(bytes) => {
                    debug_assert!(bytes.len() <= MAX_ATTACHMENT);
                    Ok(Answer::Bytes {
                        length: process.give_payload(bytes)?,
                    })
                }
                None => Ok(Answer::Nothing),
            },
            Call::Log { level, message } => {
                self.log.line(level, &message);
                Ok(Answer::Unit)
            }
            // The process's own budget has answered it.
            Call::Grow { .. } => Err(ErrorCode::TooLarge),
            // `stored` is not of this world's run.
            Call::ObjectSize { .. } | Call::ObjectRead { .. } => Err(ErrorCode::NotFound),
            Call::Done(_) => return Err(RunError::Protocol),
        })
    }

    fn next_regions(&mut self, limit: u32) -> Answer {
        let regions = self
            .cursor
            .next(&self.target.frozen.plan, limit.min(MAX_REGIONS) as usize);
        Answer::Regions(
            regions
                .into_iter()
                .map(|region| (region.extent.start(), region.extent.len(), region.zero))
                .collect(),
        )
    }

    async fn discard(&mut self, range: RawRange) -> Result<Answer, ErrorCode> {
        if !self.terms.discarder {
            return Err(ErrorCode::NotFound);
        }
        let extent = self.whole_blocks(range)?;
        put::ended(&self.target, extent).await;
        self.check_host()?;
        let fresh = self
            .target
            .books()
            .begin_discard(&self.target.frozen.plan, extent)
            .map_err(refused)?;
        for part in fresh {
            discard::trim(&self.target.frozen, self.target.canary, part)
                .await
                .map_err(|error| self.failed(error.into()))?;
        }
        Ok(Answer::Unit)
    }

    async fn read(&mut self, offset: u64, length: u32) -> Result<(), ErrorCode> {
        if !self.terms.reader || self.terms.world == World::BlindProvider {
            return Err(ErrorCode::NotFound);
        }
        if length > MAX_READ {
            return Err(ErrorCode::TooLarge);
        }
        let plan = &self.target.frozen.plan;
        let extent = Extent::new(offset, length.into())
            .ok()
            .filter(|extent| extent.end() <= plan.size())
            .ok_or(ErrorCode::OutOfRange)?;
        if !plan.dirty().contains(extent) {
            return Err(ErrorCode::NotDirty);
        }
        if self.target.books().is_discarded(extent) {
            return Err(ErrorCode::Discarded);
        }
        self.charge_read(extent.len())?;
        self.buffer.clear();
        let read = self.read_ahead.read(extent, &mut self.buffer).await;
        read.map_err(|error| self.failed(error.into()))
    }

    /// Charges a read of `length` bytes: in sum no less than was given, and no less than was fetched for it. A byte here
    /// and a byte there cost the host a whole window each.
    fn charge_read(&mut self, length: u64) -> Result<(), ErrorCode> {
        let given = self.read_given.saturating_add(length);
        let due = given.max(self.read_ahead.fetched());
        self.account.read(due.saturating_sub(self.read_charged))?;
        self.read_given = given;
        self.read_charged = due.max(self.read_charged);
        Ok(())
    }

    async fn put(&mut self, range: RawRange, encoding: Encoding) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        if range.length > MAX_PUT {
            return Err(ErrorCode::TooLarge);
        }
        let extent = self.whole_blocks(range)?;
        self.reserve(Cover::Put, extent)?;
        put::start(&self.target, extent, encoding).await;
        Ok(Answer::Unit)
    }

    async fn create(&mut self, name: &str, encoding: Encoding) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        let mut name: ObjectName = name.parse().map_err(|_| ErrorCode::InvalidName)?;
        if let Some(volume) = self.terms.own_names {
            name = names::of_volume(volume, &name).map_err(|_| ErrorCode::InvalidName)?;
        }
        if self.streams.len() >= MAX_STREAMS {
            return Err(ErrorCode::QuotaExceeded(crate::contract::Quota::Objects));
        }
        self.account.object()?;
        let created = self
            .target
            .encode(move |target| match target.archive.create(&name, encoding) {
                Ok(writer) => Ok(Some(writer)),
                Err(archive::Error::Exists { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            })
            .await;
        match created {
            Ok(Some(writer)) => {
                let number = self.next_stream;
                self.next_stream += 1;
                self.streams
                    .insert(number, Stream::start(Arc::clone(&self.target), writer));
                Ok(Answer::Stream(number))
            }
            Ok(None) => Err(ErrorCode::Exists),
            Err(failure) => Err(self.failed(failure)),
        }
    }

    async fn write(&mut self, stream: u32, bytes: Vec<u8>) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        let stream = self.streams.get(&stream).ok_or(ErrorCode::NotFound)?;
        self.account.output(bytes.len() as u64)?;
        if !bytes.is_empty() {
            stream.write(bytes).await.map_err(io)?;
        }
        Ok(Answer::Unit)
    }

    async fn splice(&mut self, number: u32, range: RawRange) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        let extent = self.whole_blocks(range)?;
        if !self.streams.contains_key(&number) {
            return Err(ErrorCode::NotFound);
        }
        self.reserve(Cover::Stream(number), extent)?;
        let stream = self.streams.get(&number).ok_or(ErrorCode::NotFound)?;
        stream.splice(extent).await.map_err(io)?;
        Ok(Answer::Unit)
    }

    async fn claim(&mut self, number: u32, range: RawRange) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        if self.terms.world == World::BlindProvider {
            return Err(ErrorCode::Other(Some(
                "a blind provider cannot claim: it exports no restore".into(),
            )));
        }
        // Its proof would answer guesses at what may not be read.
        if !self.terms.reader {
            return Err(ErrorCode::Other(Some(
                "nothing can be claimed that may not be read: no reader is granted".into(),
            )));
        }
        let extent = self.whole_blocks(range)?;
        if !self.streams.contains_key(&number) {
            return Err(ErrorCode::NotFound);
        }
        let checked = self.target.books().check(&self.target.frozen.plan, extent);
        checked.map_err(refused)?;
        // Entered in the books only when every digest is in the table: a claim that fails half-way must not count.
        for piece in extent.pieces(PIECE) {
            self.enter_digests(piece).await?;
        }
        self.target
            .books()
            .begin_claim(&self.target.frozen.plan, number, extent)
            .map_err(refused)?;
        self.target.advance(extent);
        Ok(Answer::Unit)
    }

    /// Enters the digests of blocks as of the point in time: from what the provider read, else read anew.
    async fn enter_digests(&mut self, piece: Extent) -> Result<(), ErrorCode> {
        let plan = &self.target.frozen.plan;
        let block = plan.block();
        let first = piece.start() / u64::from(block);
        let count = piece.len().div_ceil(block.into());
        let known: Option<Vec<Digest>> = (first..first + count)
            .map(|index| match self.target.is_zero(index) {
                true => Some(Digest::of(&[])),
                false => self.read_ahead.take_digest(index),
            })
            .collect();
        let digests = match known {
            Some(digests) => digests,
            None => {
                self.account.read(piece.len())?;
                let held = self.target.frozen.bytes(piece).await;
                let held = held.map_err(|error| self.failed(error.into()))?;
                digest::of_blocks(&held.bytes, block)
            }
        };
        // Writing a full page of the table is file work.
        let entered = self.target.encode(move |target| {
            let mut entries = (first..).zip(digests);
            entries.try_for_each(|(index, digest)| target.claim(index, digest))
        });
        entered.await.map_err(|failure| self.failed(failure))
    }

    async fn finish(&mut self, number: u32) -> Result<Answer, ErrorCode> {
        let stream = self.streams.remove(&number).ok_or(ErrorCode::NotFound)?;
        let info = match stream.finish().await {
            Ok(info) => info,
            Err(Failed) => {
                self.target.books().drop_stream(number);
                return Err(ErrorCode::Io);
            }
        };
        let done = self.target.books().finish_stream(number);
        for extent in done.iter() {
            self.target
                .finished(extent)
                .await
                .map_err(|failure| self.failed(failure))?;
        }
        Ok(Answer::Size(info.size))
    }

    async fn drop_stream(&mut self, number: u32) -> Result<Answer, ErrorCode> {
        if let Some(stream) = self.streams.remove(&number) {
            stream.discard().await;
            self.target.books().drop_stream(number);
        }
        Ok(Answer::Unit)
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

    /// Checks, charges and enters that the host copies `extent`.
    fn reserve(&mut self, cover: Cover, extent: Extent) -> Result<(), ErrorCode> {
        let plan = &self.target.frozen.plan;
        let mut books = self.target.books();
        books.check(plan, extent).map_err(refused)?;
        self.account.copy(extent.len())?;
        books.begin(plan, cover, extent).map_err(refused)
    }

    fn whole_blocks(&self, range: RawRange) -> Result<Extent, ErrorCode> {
        self.target
            .frozen
            .plan
            .whole_blocks(range.offset, range.length)
            .ok_or(ErrorCode::OutOfRange)
    }

    /// A failure of an earlier call shows in a later one.
    fn check_host(&self) -> Result<(), ErrorCode> {
        if self.target.has_failed() {
            Err(ErrorCode::Io)
        } else {
            Ok(())
        }
    }

    fn failed(&self, failure: HostFailure) -> ErrorCode {
        self.target.fail(failure);
        ErrorCode::Io
    }
}

fn io(_: Failed) -> ErrorCode {
    ErrorCode::Io
}

fn refused(error: CoverageError) -> ErrorCode {
    use CoverageError::{Covered, NotDirty, Unfinished};
    match error {
        NotDirty(_) | Covered(_) | Unfinished(_) => ErrorCode::NotDirty,
    }
}
