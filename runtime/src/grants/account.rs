//! What a job has used of its limits and what it was refused. Charging comes before acting, and what is refused is not
//! charged.

use crate::config::Limits;
use crate::contract::{ErrorCode, LINE_COST, Quota};
use crate::sandbox::Usage;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The account of one job: all of its volumes and sandboxes charge the same, unless it was split.
#[derive(Debug)]
pub struct Account {
    limits: Limits,
    spent: Mutex<Spent>,
    /// The job's.
    used: Arc<Mutex<Used>>,
}

/// What was charged against the limits that a provider can run into.
#[derive(Debug, Default)]
struct Spent {
    output_bytes: u64,
    read_bytes: u64,
    objects: u32,
}

/// What was used, for the audit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Used {
    /// Bytes stored, before encoding.
    pub output_bytes: u64,
    /// Bytes of volumes read.
    pub read_bytes: u64,
    /// Objects created.
    pub objects: u32,
    /// Bytes logged.
    pub log_bytes: u64,
    /// Lines of log that were dropped.
    pub log_lines_dropped: u64,
    /// The longest receipt, in bytes.
    pub receipt_bytes: u64,
    /// Most memory that one sandbox process had, its runtime and the component's machine code included, in bytes.
    pub sandbox_peak_bytes: u64,
    /// Processor time of all sandbox processes, in milliseconds.
    pub sandbox_cpu_ms: u64,
    /// Most memory that a process which compiled the component had, in bytes; 0 where none had to.
    pub compile_peak_bytes: u64,
    /// Processor time of such processes, in milliseconds.
    pub compile_cpu_ms: u64,
    /// Most bytes that the fleecing images took up.
    pub fleecing_peak_bytes: u64,
    /// How long the snapshot lived, in milliseconds.
    pub snapshot_ms: u64,
    /// How often a call was answered with each error.
    pub refused: BTreeMap<String, u64>,
}

impl Account {
    /// Nothing is used yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            spent: Mutex::default(),
            used: Arc::default(),
        }
    }

    /// One account for each of some volumes, by their sizes, for providers that must not tell time: what one of them uses
    /// shows to none of the others. Bytes are split by size, objects and memory evenly. What is used is this job's.
    pub(crate) fn split(&self, sizes: &[u64]) -> Vec<Self> {
        let all: u128 = sizes.iter().copied().map(u128::from).sum();
        let count = sizes.len().max(1);
        let limits = &self.limits;
        let part = |limit: u64, size: u64| {
            let part = u128::from(limit) * u128::from(size) / all.max(1);
            // A part is no more than the whole.
            u64::try_from(part).unwrap_or(limit)
        };
        let of_volume = |(number, &size): (usize, &u64)| Self {
            limits: Limits {
                output_bytes: part(limits.output_bytes, size),
                read_bytes: part(limits.read_bytes, size),
                objects: (limits.objects as usize + count - 1 - number) as u32 / count as u32,
                memory: limits.memory / count as u64,
                ..limits.clone()
            },
            spent: Mutex::default(),
            used: Arc::clone(&self.used),
        };
        sizes.iter().enumerate().map(of_volume).collect()
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What was used so far.
    pub fn used(&self) -> Used {
        self.entries().clone()
    }

    /// Bytes to be stored, before encoding, whether or not they are known already: a blind provider must not learn
    /// which bytes are equal or how well they compress.
    pub(super) fn output(&self, bytes: u64) -> Result<(), ErrorCode> {
        let most = self.limits.output_bytes;
        charge(
            &mut self.spent().output_bytes,
            bytes,
            most,
            Quota::OutputBytes,
        )?;
        self.entries().output_bytes += bytes;
        Ok(())
    }

    /// Bytes read on behalf of the provider.
    pub(super) fn read(&self, bytes: u64) -> Result<(), ErrorCode> {
        let most = self.limits.read_bytes;
        charge(&mut self.spent().read_bytes, bytes, most, Quota::ReadBytes)?;
        self.entries().read_bytes += bytes;
        Ok(())
    }

    /// Bytes that the host copies from the volume to the archive: both read and stored, or neither.
    pub(super) fn copy(&self, bytes: u64) -> Result<(), ErrorCode> {
        let limits = &self.limits;
        let mut spent = self.spent();
        let before = spent.read_bytes;
        charge(
            &mut spent.read_bytes,
            bytes,
            limits.read_bytes,
            Quota::ReadBytes,
        )?;
        let (output, most) = (&mut spent.output_bytes, limits.output_bytes);
        let charged = charge(output, bytes, most, Quota::OutputBytes);
        charged.inspect_err(|_| spent.read_bytes = before)?;
        let mut used = self.entries();
        used.read_bytes += bytes;
        used.output_bytes += bytes;
        Ok(())
    }

    /// One more object.
    pub(super) fn object(&self) -> Result<(), ErrorCode> {
        let mut spent = self.spent();
        if spent.objects >= self.limits.objects {
            return Err(ErrorCode::QuotaExceeded(Quota::Objects));
        }
        spent.objects += 1;
        self.entries().objects += 1;
        Ok(())
    }

    /// A line of log; whether it may be kept.
    pub(super) fn log(&self, bytes: u64) -> bool {
        let mut used = self.entries();
        let sum = used.log_bytes.saturating_add(bytes.max(LINE_COST));
        let fits = sum <= self.limits.log_bytes;
        match fits {
            true => used.log_bytes = sum,
            false => used.log_lines_dropped += 1,
        }
        fits
    }

    /// A line of log was dropped before it was looked at.
    pub(super) fn log_dropped(&self) {
        self.entries().log_lines_dropped += 1;
    }

    /// A component was compiled for this job, in a process that used this.
    pub(crate) fn compiling(&self, usage: Option<Usage>) {
        let usage = usage.unwrap_or_default();
        let mut used = self.entries();
        used.compile_peak_bytes = used.compile_peak_bytes.max(usage.peak_memory);
        used.compile_cpu_ms += usage.cpu.as_millis() as u64;
    }

    /// A call was answered with `code`. What a provider says in its own words is its log's.
    pub(super) fn refused(&self, code: &ErrorCode) {
        let name = match code {
            ErrorCode::Other(_) => "other".to_owned(),
            code => code.to_string(),
        };
        *self.entries().refused.entry(name).or_default() += 1;
    }

    /// A receipt of that length came.
    pub(super) fn receipt(&self, length: usize) {
        let mut used = self.entries();
        used.receipt_bytes = used.receipt_bytes.max(length as u64);
    }

    /// A sandbox process ended; nothing is known of one that the system does not show.
    pub(super) fn sandbox(&self, usage: Option<Usage>) {
        let usage = usage.unwrap_or_default();
        let mut used = self.entries();
        used.sandbox_peak_bytes = used.sandbox_peak_bytes.max(usage.peak_memory);
        used.sandbox_cpu_ms += usage.cpu.as_millis() as u64;
    }

    /// The snapshot is gone.
    pub(crate) fn snapshot(&self, lived: Duration, fleecing_peak: u64) {
        let mut used = self.entries();
        used.snapshot_ms = lived.as_millis() as u64;
        used.fleecing_peak_bytes = fleecing_peak;
    }

    fn spent(&self) -> MutexGuard<'_, Spent> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self) -> MutexGuard<'_, Used> {
        // Nothing panics between the two halves of an entry.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn charge(used: &mut u64, bytes: u64, limit: u64, quota: Quota) -> Result<(), ErrorCode> {
    match used.checked_add(bytes) {
        Some(sum) if sum <= limit => {
            *used = sum;
            Ok(())
        }
        _ => Err(ErrorCode::QuotaExceeded(quota)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_that_would_pass_the_limit_is_refused_and_not_counted() {
        let limits = Limits {
            output_bytes: 10,
            read_bytes: u64::MAX,
            objects: 1,
            ..Limits::default()
        };
        let account = Account::new(limits);
        let output = Err(ErrorCode::QuotaExceeded(Quota::OutputBytes));
        let read = Err(ErrorCode::QuotaExceeded(Quota::ReadBytes));
        assert_eq!(account.output(11), output);
        assert_eq!(account.copy(11), output);
        assert_eq!(account.used(), Used::default());
        assert_eq!(account.output(10), Ok(()));
        assert_eq!(account.output(1), output);
        assert_eq!(account.read(u64::MAX), Ok(()));
        assert_eq!(account.read(1), read);
        assert_eq!(account.copy(1), read);
        assert_eq!(account.object(), Ok(()));
        assert_eq!(
            account.object(),
            Err(ErrorCode::QuotaExceeded(Quota::Objects))
        );
    }

    #[test]
    fn what_was_split_is_used_up_by_each_alone_and_counted_together() {
        let limits = Limits {
            output_bytes: 100,
            read_bytes: u64::MAX,
            objects: 5,
            memory: 9,
            ..Limits::default()
        };
        let job = Account::new(limits);
        let parts = job.split(&[1, 0, 3]);
        let of = |what: fn(&Limits) -> u64| {
            let limits: Vec<u64> = parts.iter().map(|part| what(part.limits())).collect();
            limits
        };
        assert_eq!(of(|it| it.output_bytes), [25, 0, 75]);
        assert_eq!(of(|it| it.objects.into()), [2, 2, 1]);
        assert_eq!(of(|it| it.memory), [3; 3]);
        assert_eq!(parts[0].copy(25), Ok(()));
        let full = Err(ErrorCode::QuotaExceeded(Quota::OutputBytes));
        assert_eq!(parts[0].output(1), full);
        assert_eq!(parts[2].output(75), Ok(()));
        assert_eq!(parts[2].output(1), full);
        assert_eq!(parts[2].object(), Ok(()));
        let used = job.used();
        assert_eq!(
            (used.output_bytes, used.read_bytes, used.objects),
            (100, 25, 1)
        );
        assert!(
            job.split(&[0, 0])
                .iter()
                .all(|it| it.limits().output_bytes == 0)
        );
    }

    #[test]
    fn refusals_are_counted_by_their_code_and_not_by_a_providers_words() {
        let account = Account::new(Limits::default());
        account.refused(&ErrorCode::NotDirty);
        account.refused(&ErrorCode::NotDirty);
        account.refused(&ErrorCode::Other(Some("a".into())));
        account.refused(&ErrorCode::QuotaExceeded(Quota::Objects));
        let expected = [
            ("not-dirty", 2),
            ("other", 1),
            ("quota-exceeded(objects)", 1),
        ];
        let expected = expected.map(|(code, count)| (code.to_owned(), count));
        assert_eq!(account.used().refused, expected.into());
    }
}
