//! What a run has used of its limits. Charging comes before acting, and what is refused is not charged.

use crate::channel::{ErrorCode, Quota};
use crate::policy::Limits;

/// The use of one run.
#[derive(Debug)]
pub(super) struct Account {
    limits: Limits,
    output: u64,
    read: u64,
    objects: u32,
}

impl Account {
    /// Nothing is used yet.
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            output: 0,
            read: 0,
            objects: 0,
        }
    }

    /// Bytes to be stored, before encoding, whether or not they are known already: a blind provider must not learn
    /// which bytes are equal or how well they compress.
    pub(super) fn output(&mut self, bytes: u64) -> Result<(), ErrorCode> {
        charge(
            &mut self.output,
            bytes,
            self.limits.output_bytes,
            Quota::OutputBytes,
        )
    }

    /// Bytes read on behalf of the provider.
    pub(super) fn read(&mut self, bytes: u64) -> Result<(), ErrorCode> {
        charge(
            &mut self.read,
            bytes,
            self.limits.read_bytes,
            Quota::ReadBytes,
        )
    }

    /// Bytes that the host copies from the volume to the archive: both read and stored, or neither.
    pub(super) fn copy(&mut self, bytes: u64) -> Result<(), ErrorCode> {
        let before = self.read;
        self.read(bytes)?;
        self.output(bytes).inspect_err(|_| self.read = before)
    }

    /// One more object.
    pub(super) fn object(&mut self) -> Result<(), ErrorCode> {
        if self.objects >= self.limits.objects {
            return Err(ErrorCode::QuotaExceeded(Quota::Objects));
        }
        self.objects += 1;
        Ok(())
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
        let mut account = Account::new(limits);
        assert_eq!(
            account.output(11),
            Err(ErrorCode::QuotaExceeded(Quota::OutputBytes))
        );
        assert_eq!(account.output(10), Ok(()));
        assert_eq!(
            account.output(1),
            Err(ErrorCode::QuotaExceeded(Quota::OutputBytes))
        );
        assert_eq!(account.read(u64::MAX), Ok(()));
        assert_eq!(
            account.read(1),
            Err(ErrorCode::QuotaExceeded(Quota::ReadBytes))
        );
        assert_eq!(
            account.copy(1),
            Err(ErrorCode::QuotaExceeded(Quota::ReadBytes))
        );
        assert_eq!(account.object(), Ok(()));
        assert_eq!(
            account.object(),
            Err(ErrorCode::QuotaExceeded(Quota::Objects))
        );
    }
}
