//! From the file to what one job may do.

use crate::archive::{ComponentId, NamespaceName};
use crate::config::{Config, ConfigError, Grant, Limits, Names, Provider, Rule, Tenant};
use crate::contract::Wasi;
use std::collections::BTreeSet;
use std::num::NonZeroU32;

/// What a backup of one VM by one provider may do. Without tenants: everything that was asked for.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Whose job it is.
    pub tenant: Option<Tenancy>,
    /// The provider's name.
    pub provider_name: String,
    /// The provider, with the limits and grants of the rule.
    pub provider: Provider,
    /// The provider's part of each archive.
    pub namespace: NamespaceName,
    /// Disks that may be backed up.
    pub volumes: Names,
    /// Attachments that the provider may ask for.
    pub attachments: Names,
    archives: Names,
    /// The VM's name.
    vm: String,
    /// Where the rule begins.
    line: usize,
}

/// The tenant of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenancy {
    /// Its name.
    pub name: String,
    /// How many of its jobs may run at the same time on this host.
    pub jobs_at_once: Option<NonZeroU32>,
}

/// What is not granted.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    /// With tenants, a VM is somebody's.
    #[error(
        "denied: no tenant owns the VM '{vm}' (where the configuration has tenants, what is not granted is denied; add it to the `vms` of one)"
    )]
    VmOfNobody {
        /// As it was given.
        vm: String,
    },
    /// With tenants, only their own providers are run.
    #[error(
        "denied: tenant {tenant} (line {line}), who owns the VM, has no provider '{provider}' (it has {known})"
    )]
    NoProvider {
        /// Who owns the VM.
        tenant: String,
        /// As it was given.
        provider: String,
        /// The tenant's providers.
        known: Names,
        /// Of the tenant.
        line: usize,
    },
    /// No rule names the provider and the VM.
    #[error(
        "denied: tenant {tenant} (line {line}) grants the provider '{provider}' nothing on the VM '{vm}'; add a [[tenant.{tenant}.grant]] for both"
    )]
    NoRule {
        /// Who owns the VM.
        tenant: String,
        /// As it was given.
        provider: String,
        /// As it was given.
        vm: String,
        /// Of the tenant.
        line: usize,
    },
    /// The rule names other disks.
    #[error(
        "denied: the provider '{provider}' may not back up the disk '{volume}' of the VM '{vm}' (line {line} grants {granted})"
    )]
    Volume {
        /// The provider.
        provider: String,
        /// As it was given.
        volume: String,
        /// The VM.
        vm: String,
        /// Of the rule.
        line: usize,
        /// What it grants.
        granted: Names,
    },
    /// The rule names no disk at all.
    #[error(
        "denied: the rule in line {line} grants the provider '{provider}' no disk of the VM '{vm}'"
    )]
    NoVolume {
        /// The provider.
        provider: String,
        /// The VM.
        vm: String,
        /// Of the rule.
        line: usize,
    },
    /// The tenant's backups go elsewhere.
    #[error(
        "denied: backups of tenant {tenant} may not go to the archive '{archive}' (line {line} grants {granted})"
    )]
    Archive {
        /// The tenant.
        tenant: String,
        /// As it was given.
        archive: String,
        /// Of the tenant's list.
        line: usize,
        /// What it grants.
        granted: Names,
    },
    /// None was named, and it is not clear which is meant.
    #[error("name an archive of tenant {tenant} with --archive (line {line} grants {granted})")]
    NoArchive {
        /// The tenant.
        tenant: String,
        /// Of the tenant's list.
        line: usize,
        /// What it grants.
        granted: Names,
    },
    /// The component is another one than the pinned one.
    #[error(
        "denied: the component {file} of the provider '{provider}' has the SHA-256 {actual}, and only {expected} may be run (line {line})"
    )]
    Digest {
        /// The component's file.
        file: String,
        /// The provider.
        provider: String,
        /// Of its bytes.
        actual: ComponentId,
        /// As pinned.
        expected: ComponentId,
        /// Of the pin.
        line: usize,
    },
    /// A backup's own provider may not be asked for what it claimed.
    #[error(
        "denied: no tenant with the namespace '{namespace}' grants the provider '{provider}' anything on the VM '{vm}', so it is not run to give back what it claimed; add a rule for both"
    )]
    Restore {
        /// Where the backup lies.
        namespace: String,
        /// As the manifest names it.
        provider: String,
        /// As the manifest names it.
        vm: String,
    },
    /// A name that the configuration does not have.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The namespace follows from a provider's name or was written, and is no plain name.
    #[error(
        "'{namespace}' cannot name a namespace: use 1 to 128 letters, digits, '-', '_' and '.'"
    )]
    Namespace {
        /// As it was given.
        namespace: String,
    },
}

/// What a backup of `vm` by the provider `wanted` may do.
pub fn decide(config: &Config, vm: &str, wanted: &str) -> Result<Decision, Denied> {
    if config.tenant.is_empty() {
        let (name, provider) = config.provider(wanted)?;
        return Decision::of_the_operator(vm, name, provider);
    }
    let (name, tenant) = owner(config, vm)?;
    let provider = tenant
        .provider
        .get(wanted)
        .ok_or_else(|| Denied::NoProvider {
            tenant: name.to_owned(),
            provider: wanted.escape_debug().to_string(),
            known: Names::Only(tenant.provider.keys().cloned().collect()),
            line: line(config, &["tenant", name]),
        })?;
    let (number, rule) = tenant.rule(vm, wanted).ok_or_else(|| Denied::NoRule {
        tenant: name.to_owned(),
        provider: wanted.to_owned(),
        vm: vm.to_owned(),
        line: line(config, &["tenant", name]),
    })?;
    Ok(Decision {
        tenant: Some(Tenancy {
            name: name.to_owned(),
            jobs_at_once: tenant.jobs_at_once,
        }),
        provider_name: wanted.to_owned(),
        provider: Provider {
            component: provider.component.clone(),
            sha256: Some(provider.sha256),
            namespace: None,
            settings: provider.settings.clone(),
            limits: rule.limits.clone(),
            grant: granted(rule),
        },
        namespace: namespace_name(tenant.namespace(name))?,
        volumes: rule.volumes.clone(),
        attachments: rule.attachments.clone(),
        archives: Names::Only(tenant.archives.clone()),
        vm: vm.to_owned(),
        line: line(config, &["tenant", name, "grant", &number.to_string()]),
    })
}

impl Decision {
    /// Without tenants: everything that is asked for, within the provider's own limits and grants.
    pub fn of_the_operator(vm: &str, name: String, provider: Provider) -> Result<Self, Denied> {
        let namespace = provider.namespace.as_deref().unwrap_or(&name);
        Ok(Self {
            tenant: None,
            namespace: namespace_name(namespace)?,
            volumes: Names::All,
            attachments: Names::All,
            archives: Names::All,
            vm: vm.to_owned(),
            line: 0,
            provider_name: name,
            provider,
        })
    }

    /// The disks to back up where `wanted` were asked for, none meaning all. An empty answer means all, too.
    pub fn disks(&self, wanted: Vec<String>) -> Result<Vec<String>, Denied> {
        if self.volumes == Names::default() {
            return Err(Denied::NoVolume {
                provider: self.provider_name.clone(),
                vm: self.vm.clone(),
                line: self.line,
            });
        }
        if wanted.is_empty() {
            return Ok(self.volumes.listed().to_vec());
        }
        match wanted.iter().find(|name| !self.volumes.covers(name)) {
            None => Ok(wanted),
            Some(volume) => Err(self.not_granted(volume)),
        }
    }

    /// Holds a disk that QEMU showed, of that name and these other names, against the rule.
    pub fn hold(&self, volume: &str, names: &[String]) -> Result<(), Denied> {
        let mut names = names.iter().map(String::as_str).chain([volume]);
        match names.any(|name| self.volumes.covers(name)) {
            true => Ok(()),
            false => Err(self.not_granted(volume)),
        }
    }

    fn not_granted(&self, volume: &str) -> Denied {
        Denied::Volume {
            provider: self.provider_name.clone(),
            volume: volume.escape_debug().to_string(),
            vm: self.vm.clone(),
            line: self.line,
            granted: self.volumes.clone(),
        }
    }

    /// Where the rule begins in the file.
    pub fn line(&self) -> usize {
        self.line
    }

    /// The archive's name where `wanted` was asked for; a tenant with one archive need not name it.
    pub fn archive(
        &self,
        config: &Config,
        wanted: Option<String>,
    ) -> Result<Option<String>, Denied> {
        let Some(tenant) = &self.tenant else {
            return Ok(wanted);
        };
        match wanted {
            None => match self.archives.listed() {
                [only] => Ok(Some(only.clone())),
                _ => Err(Denied::NoArchive {
                    tenant: tenant.name.clone(),
                    line: line(config, &["tenant", &tenant.name, "archives"]),
                    granted: self.archives.clone(),
                }),
            },
            Some(name) if self.archives.covers(&name) => Ok(Some(name)),
            Some(name) => Err(Denied::Archive {
                tenant: tenant.name.clone(),
                archive: name.escape_debug().to_string(),
                line: line(config, &["tenant", &tenant.name, "archives"]),
                granted: self.archives.clone(),
            }),
        }
    }

    /// Whether these bytes may be run.
    pub fn check_digest(&self, config: &Config, actual: ComponentId) -> Result<(), Denied> {
        match self.provider.sha256 {
            Some(expected) if expected != actual => {
                let provider = &self.provider_name;
                let path = match &self.tenant {
                    Some(tenant) => vec!["tenant", &tenant.name, "provider", provider, "sha256"],
                    None => vec!["provider", provider, "sha256"],
                };
                Err(Denied::Digest {
                    file: self.provider.component.display().to_string(),
                    provider: provider.clone(),
                    actual,
                    expected,
                    line: line(config, &path),
                })
            }
            _ => Ok(()),
        }
    }
}

/// Which providers may give back what they claimed in the backups of one namespace, and within which limits.
///
/// What the host placed needs no provider and no leave. A component is the one that made the backup, whatever is
/// pinned by now: its digest is in the manifest.
#[derive(Debug)]
pub struct Restores<'a> {
    config: &'a Config,
    namespace: &'a str,
    allowed: BTreeSet<Wasi>,
}

impl<'a> Restores<'a> {
    /// For the backups in `namespace`.
    pub fn new(config: &'a Config, namespace: &'a str) -> Self {
        Self {
            config,
            namespace,
            allowed: BTreeSet::new(),
        }
    }

    /// Where there are no tenants, with `wasi` for every provider.
    pub fn allowing(self, wasi: BTreeSet<Wasi>) -> Self {
        Self {
            allowed: wasi,
            ..self
        }
    }

    /// The parts of WASI that `provider` may use at giving back a backup of `vm`.
    pub fn wasi(&self, vm: &str, provider: &str) -> BTreeSet<Wasi> {
        if self.config.tenant.is_empty() {
            let configured = self.config.provider.get(provider);
            let granted = configured.map(|it| it.grant.wasi()).unwrap_or_default();
            return &granted | &self.allowed;
        }
        let rule = self
            .owner()
            .and_then(|(_, tenant)| tenant.rule(vm, provider));
        rule.map(|(_, rule)| granted(rule).wasi())
            .unwrap_or_default()
    }

    /// Whose backups these are.
    pub fn tenant(&self) -> Option<Tenancy> {
        let (name, tenant) = self.owner()?;
        Some(Tenancy {
            name: name.clone(),
            jobs_at_once: tenant.jobs_at_once,
        })
    }

    /// The limits on `provider` at giving back a backup of `vm`. None without tenants: those of the backup.
    pub fn limits(&self, vm: &str, provider: &str) -> Result<Option<Limits>, Denied> {
        if self.config.tenant.is_empty() {
            return Ok(None);
        }
        let rule = self
            .owner()
            .and_then(|(_, tenant)| tenant.rule(vm, provider));
        match rule {
            Some((_, rule)) => Ok(Some(rule.limits.clone())),
            None => Err(Denied::Restore {
                namespace: self.namespace.to_owned(),
                provider: provider.to_owned(),
                vm: vm.to_owned(),
            }),
        }
    }

    fn owner(&self) -> Option<(&'a String, &'a Tenant)> {
        self.config
            .tenant
            .iter()
            .find(|(name, tenant)| tenant.namespace(name) == self.namespace)
    }
}

fn owner<'a>(config: &'a Config, vm: &str) -> Result<(&'a str, &'a Tenant), Denied> {
    config
        .tenant
        .iter()
        .find(|(_, tenant)| tenant.vms.iter().any(|owned| owned == vm))
        .map(|(name, tenant)| (name.as_str(), tenant))
        .ok_or_else(|| Denied::VmOfNobody {
            vm: vm.escape_debug().to_string(),
        })
}

/// The host's own trims are no authority of the provider's.
fn granted(rule: &Rule) -> Grant {
    Grant {
        read: rule.read,
        discard: rule.discard,
        trim_finished: true,
        wasi: rule.wasi.clone(),
    }
}

fn namespace_name(namespace: &str) -> Result<NamespaceName, Denied> {
    namespace.parse().map_err(|_| Denied::Namespace {
        namespace: namespace.escape_debug().to_string(),
    })
}

fn line(config: &Config, path: &[&str]) -> usize {
    config.lines.near(path).unwrap_or(0)
}
