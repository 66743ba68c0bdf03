//! What restore and verify have in common: whose backup it is, a place among the tenant's jobs, and the audit.

use super::{Failure, Session, target};
use crate::archive::Manifest;
use crate::contract::Wasi;
use crate::grants::account::Account;
use crate::job::audit::{Job, Record};
use crate::job::slots::Slot;
use crate::policy::Restores;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A backup that is read back.
pub(super) struct Reading<'a> {
    /// Which providers may be asked.
    pub(super) restores: Restores<'a>,
    /// What they use.
    pub(super) account: Arc<Account>,
    session: &'a Session,
    record: Record,
}

impl<'a> Reading<'a> {
    pub(super) fn begin(
        session: &'a Session,
        job: Job,
        manifest: &'a Manifest,
        wasi: BTreeSet<Wasi>,
    ) -> Self {
        let made = &manifest.record;
        let restores = Restores::new(&session.config, manifest.namespace.as_str()).allowing(wasi);
        // A provider that is denied is not run, whatever its limits.
        let limits = restores.limits(&made.vm, &made.provider.name);
        let limits = limits.ok().flatten().unwrap_or_default();
        let mut record = Record::begin(job, made.vm.clone());
        record.tenant = restores.tenant().map(|tenant| tenant.name);
        record.provider = Some(made.provider.name.clone());
        record.component_sha256 = Some(made.provider.component);
        record.backup = Some(manifest.backup.to_string());
        Self {
            restores,
            account: Arc::new(Account::new(limits)),
            session,
            record,
        }
    }

    /// A place among the tenant's jobs.
    pub(super) fn slot(&self) -> Result<Option<Slot>, Failure> {
        target::slot(self.session, self.restores.tenant().as_ref())
    }

    /// Writes down that it begins.
    pub(super) fn begun(&mut self) -> Result<(), Failure> {
        target::begun(self.session, &mut self.record)
    }

    /// What may be wrong with the backup although nothing was found.
    pub(super) fn doubt(&mut self, doubts: &[String]) {
        self.record.doubts = doubts.to_vec();
    }

    /// Writes down what became of it.
    pub(super) fn end(self, ended: Result<(), Failure>) -> Result<(), Failure> {
        let mut record = self.record;
        record.used = self.account.used();
        target::audited(self.session, record, ended)
    }
}
