//! An opened `restore.image`: the claimed ranges of one volume of one backup, asked of the provider that wrote them.
//!
//! What it gives back is a claim like any other; whoever reads here compares it with the digests.

use super::account::Account;
use super::provider_log;
use super::provider_log::ProviderLog;
use crate::archive::StoredObjects;
use crate::channel::{Answer, Call, Failure, ImageRead, OpenImage, Order, Outcome};
use crate::contract::{ErrorCode, MAX_READ};
use crate::event::Events;
use crate::extent::Extent;
use crate::sandbox::{self, Compiled, Process, Program};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Longest time for one call of `image` in a proof, waits included: one that gives nothing back for this long gives back
/// nothing.
const CALL_TIME: Duration = Duration::from_secs(300);

/// Slowest that an image may be on the whole in a proof, in bytes per second, waits included: without it, one that takes
/// its time for each call would take a year for a disk. No storage that backups are kept on is as slow.
const SLOWEST: u64 = 256 << 10;

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To see whether it gives back what was claimed, before the backup is committed.
    Proof,
    /// To verify or restore.
    Restore,
}

impl Purpose {
    /// So much of time, of the processor's and of the clock's alike, for what a proof has this much for. What was proven
    /// just in time must not fail on a machine that is slower, or busier.
    pub fn extended(self, time: u64) -> u64 {
        match self {
            Self::Proof => time,
            Self::Restore => time.saturating_mul(2),
        }
    }
}

/// How long an image may still take.
#[derive(Debug)]
struct Pace {
    call_time: Duration,
    slowest: u64,
    spent: Duration,
    given: u64,
}

impl Pace {
    fn new(purpose: Purpose) -> Self {
        Self {
            call_time: Duration::from_secs(purpose.extended(CALL_TIME.as_secs())),
            slowest: SLOWEST / purpose.extended(1),
            spent: Duration::ZERO,
            given: 0,
        }
    }

    /// For the next call: what one may take, or less where the calls before took more than their bytes are worth.
    fn left(&self) -> Duration {
        let earned = Duration::from_secs(self.given / self.slowest);
        (self.call_time + earned)
            .saturating_sub(self.spent)
            .min(self.call_time)
    }

    /// Why it is of no more use after `left` has passed.
    fn over(&self, left: Duration) -> ImageError {
        match left < self.call_time {
            true => ImageError::TooSlow {
                least: self.slowest,
            },
            false => ImageError::TimedOut {
                seconds: self.call_time.as_secs(),
            },
        }
    }
}

/// Why an image does not give back its bytes.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The sandbox process died or broke the protocol.
    #[error("its sandbox")]
    Sandbox(#[from] sandbox::Error),
    /// The provider's code trapped or passed a limit.
    #[error(transparent)]
    Guest(Failure),
    /// The provider returned an error.
    #[error("it answered with the error '{0}'")]
    Answered(ErrorCode),
    /// It gave back more or fewer bytes.
    #[error("it gave back {actual} bytes instead of {expected}")]
    Length {
        /// As many as were asked for.
        expected: u64,
        /// As many as came.
        actual: u32,
    },
    /// It answered something that its order does not end with.
    #[error("its sandbox broke the protocol: it answered with something else")]
    Protocol,
    /// It takes too long on the whole.
    #[error("it gives back less than {} KiB a second", .least >> 10)]
    TooSlow {
        /// Bytes a second.
        least: u64,
    },
    /// It took too long.
    #[error("it did not answer within {seconds} s")]
    TimedOut {
        /// The limit.
        seconds: u64,
    },
}

impl ImageError {
    /// Whether the instance cannot be asked again. One that answers with an error, or wrongly, is whole.
    pub fn has_ended_it(&self) -> bool {
        !matches!(self, Self::Answered(_) | Self::Length { .. })
    }
}

/// One opened image, in a sandbox process of its own.
pub struct Image {
    pub(super) process: Process,
    pub(super) objects: Arc<StoredObjects>,
    log: ProviderLog,
    pace: Pace,
    account: Arc<Account>,
}

impl Image {
    /// Starts the provider and opens its image.
    #[allow(clippy::too_many_arguments)] // each is one of the things that an image needs, made by the job
    pub async fn open(
        program: &Program,
        order: OpenImage,
        compiled: &Compiled,
        objects: StoredObjects,
        account: &Arc<Account>,
        volume: &str,
        events: &Events,
        purpose: Purpose,
    ) -> Result<Self, ImageError> {
        let process = Process::start(program, &Order::OpenImage(order), &compiled.file).await?;
        events.confinement(process.missing());
        let log = ProviderLog::new(volume, events.clone(), Arc::clone(account));
        let mut image = Self {
            process,
            objects: Arc::new(objects),
            log,
            pace: Pace::new(purpose),
            account: Arc::clone(account),
        };
        match image.outcome(None).await? {
            Outcome::Opened => Ok(image),
            other => Err(unexpected(other)),
        }
    }

    /// The bytes of `extent`, at most [`MAX_READ`] of them; exactly as many.
    pub async fn read(&mut self, extent: Extent) -> Result<Vec<u8>, ImageError> {
        debug_assert!(extent.len() <= MAX_READ.into());
        let read = ImageRead {
            offset: extent.start(),
            length: extent.len() as u32,
        };
        match self.outcome(Some(read)).await? {
            Outcome::Bytes { length } if u64::from(length) == extent.len() => {
                self.pace.given += extent.len();
                Ok(self.process.take_payload(length)?)
            }
            Outcome::Bytes { length } => Err(ImageError::Length {
                expected: extent.len(),
                actual: length,
            }),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the sandbox process.
    pub async fn close(self) {
        self.account.sandbox(self.process.kill().await);
    }

    /// Asks for bytes, where they are wanted, and answers calls until the order is done.
    async fn outcome(&mut self, ask: Option<ImageRead>) -> Result<Outcome, ImageError> {
        let left = self.pace.left();
        let began = Instant::now();
        let serve = async {
            if let Some(read) = ask {
                self.process.read_image(read)?;
            }
            loop {
                let answer = match self.process.next().await? {
                    Call::Done(outcome) => return Ok(outcome),
                    Call::ObjectSize { name } => self.size(name).await,
                    Call::ObjectRead {
                        name,
                        offset,
                        length,
                    } => match self.read_object(name, offset, length).await {
                        Ok(bytes) => Answer::Bytes {
                            length: self.process.give_payload(&bytes)?,
                        },
                        Err(code) => Answer::Error(code),
                    },
                    Call::Attachment { .. } => Answer::Nothing,
                    Call::Log { level, message } => {
                        self.log.line(level, &message);
                        Answer::Unit
                    }
                    // No volume and no archive in this order.
                    _ => Answer::Error(ErrorCode::NotFound),
                };
                if let Answer::Error(code) = &answer {
                    self.account.refused(code);
                }
                self.process.answer(&answer)?;
            }
        };
        let served = timeout(left, serve).await;
        self.pace.spent += began.elapsed();
        served.unwrap_or_else(|_| Err(self.pace.over(left)))
    }
}

fn unexpected(outcome: Outcome) -> ImageError {
    match outcome {
        Outcome::GuestError(ErrorCode::Other(Some(text))) => {
            ImageError::Answered(ErrorCode::Other(Some(provider_log::harmless(&text))))
        }
        Outcome::GuestError(code) => ImageError::Answered(code),
        Outcome::Failed(failure) => ImageError::Guest(failure),
        _ => ImageError::Protocol,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_earned_by_bytes_and_never_more_than_one_call_may_take() {
        let mut pace = Pace::new(Purpose::Proof);
        assert_eq!(pace.left(), CALL_TIME);
        pace.spent = CALL_TIME;
        assert_eq!(pace.left(), Duration::ZERO);
        pace.given = SLOWEST * 60;
        assert_eq!(pace.left(), Duration::from_secs(60));
        pace.given = SLOWEST * 10_000;
        assert_eq!(pace.left(), CALL_TIME);
        pace.spent = Duration::from_secs(u64::MAX);
        assert_eq!(pace.left(), Duration::ZERO);
    }

    #[test]
    fn a_restore_has_more_time_than_the_proof_for_each_thing() {
        let (proof, mut restore) = (Pace::new(Purpose::Proof), Pace::new(Purpose::Restore));
        assert!(restore.left() > proof.left());
        assert!(restore.slowest < proof.slowest);
        restore.spent = CALL_TIME;
        assert!(!restore.left().is_zero());
        assert_eq!(Purpose::Restore.extended(u64::MAX), u64::MAX);
        assert!(Purpose::Restore.extended(1) > Purpose::Proof.extended(1));
    }
}
