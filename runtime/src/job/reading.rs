//! A stored backup that is to be read back, by a restore or a verify: whose it is, and who may be asked for what of it.

use super::audit::{Job, Record};
use crate::archive::{Manifest, Namespace};
use crate::config::Config;
use crate::contract::Wasi;
use crate::grants::account::Account;
use crate::policy::Restores;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A backup that is read back.
pub struct Reading<'a> {
    /// The part of the archive that holds it.
    pub namespace: &'a Arc<Namespace>,
    /// The backup.
    pub manifest: &'a Arc<Manifest>,
    /// Which providers may be asked.
    pub restores: Restores<'a>,
    /// What they use.
    pub account: Arc<Account>,
}

impl<'a> Reading<'a> {
    /// Under the policy of `config`; where that has no tenants, providers may import `wasi` besides.
    pub fn new(
        config: &'a Config,
        namespace: &'a Arc<Namespace>,
        manifest: &'a Arc<Manifest>,
        wasi: BTreeSet<Wasi>,
    ) -> Self {
        let made = &manifest.record;
        let restores = Restores::new(config, manifest.namespace.as_str()).allowing(wasi);
        // A provider that is denied is not run, whatever its limits.
        let limits = restores.limits(&made.vm, &made.provider.name);
        let limits = limits.ok().flatten().unwrap_or_default();
        Self {
            namespace,
            manifest,
            restores,
            account: Arc::new(Account::new(limits)),
        }
    }

    /// The audit's record of a `job` that reads it.
    pub fn record(&self, job: Job) -> Record {
        let made = &self.manifest.record;
        let mut record = Record::begin(job, made.vm.clone());
        record.tenant = self.restores.tenant().map(|tenant| tenant.name);
        record.provider = Some(made.provider.name.clone());
        record.component_sha256 = Some(made.provider.component);
        record.backup = Some(self.manifest.backup.to_string());
        record
    }
}
