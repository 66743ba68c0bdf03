//! A tenant as it stands in the configuration. Everything here is refused, denied or enforced elsewhere; nothing is
//! only read.

use super::Limits;
use crate::archive::ComponentId;
use crate::contract::Wasi;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;

/// `[tenant.NAME]`: what belongs together and apart from all others. The operator assigns the name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tenant {
    /// Names of its VMs. A VM belongs to one tenant.
    pub vms: Vec<String>,
    /// Names of the archives that its backups may go to.
    pub archives: Vec<String>,
    /// Its part of each archive, which no other tenant has. Default: its name.
    pub namespace: Option<String>,
    /// Backups, restores and verifies that may run at the same time, over all processes of this host. Default: any
    /// number.
    pub jobs_at_once: Option<NonZeroU32>,
    /// Its providers.
    #[serde(default)]
    pub provider: BTreeMap<String, TenantProvider>,
    /// What each provider may do on which VM.
    #[serde(default)]
    pub grant: Vec<Rule>,
}

/// `[tenant.NAME.provider.NAME]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TenantProvider {
    /// The component's file.
    pub component: PathBuf,
    /// The only bytes that may be run, by their digest.
    #[serde(deserialize_with = "pin")]
    pub sha256: ComponentId,
    /// Handed to the provider as TOML.
    #[serde(default)]
    pub settings: toml::Table,
}

/// `[[tenant.NAME.grant]]`: one provider on some VMs. What it leaves out is denied; limits have their defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// One of the tenant's providers.
    pub provider: String,
    /// Some of the tenant's VMs.
    pub vms: Names,
    /// The disks that may be backed up, by device id, drive id or node name.
    pub volumes: Names,
    /// `content.reader`: the bytes of the disk.
    #[serde(default)]
    pub read: bool,
    /// `volume.discarder`: giving snapshot space back early.
    #[serde(default)]
    pub discard: bool,
    /// Parts of WASI that the component may import.
    #[serde(default)]
    pub wasi: BTreeSet<Wasi>,
    /// Which of the VM's attachments the provider may ask for.
    #[serde(default)]
    pub attachments: Names,
    /// How much of it all.
    #[serde(default)]
    pub limits: Limits,
}

/// The digest that a component's bytes must have.
pub(crate) fn pin<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ComponentId, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| {
        de::Error::custom(format!(
            "'{}' is no SHA-256 in 64 lower-case hexadecimal digits; `sha256sum FILE` prints one",
            text.escape_debug()
        ))
    })
}

/// As [`pin`], for a key that may be left out.
pub(crate) fn optional_pin<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<ComponentId>, D::Error> {
    pin(deserializer).map(Some)
}

impl Tenant {
    /// Its namespace as it was written or follows from `name`, the tenant's own.
    pub fn namespace<'a>(&'a self, name: &'a str) -> &'a str {
        self.namespace.as_deref().unwrap_or(name)
    }

    /// The rule for `provider` on `vm` with its number; there is at most one in a file without contradictions.
    pub fn rule(&self, vm: &str, provider: &str) -> Option<(usize, &Rule)> {
        let owned = self.vms.iter().any(|owned| owned == vm);
        self.grant
            .iter()
            .enumerate()
            .find(|(_, rule)| owned && rule.provider == provider && rule.vms.covers(vm))
    }
}

/// `"all"`, or a list of names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// Whatever there is.
    All,
    /// These and no others.
    Only(Vec<String>),
}

impl Names {
    /// Whether `name` is one of them.
    pub fn covers(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.iter().any(|known| known == name),
        }
    }

    /// The names that were written, in order.
    pub fn listed(&self) -> &[String] {
        match self {
            Self::All => &[],
            Self::Only(names) => names,
        }
    }
}

impl Default for Names {
    /// None at all: what is left out is denied.
    fn default() -> Self {
        Self::Only(Vec::new())
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Only(names) if names.is_empty() => f.write_str("none"),
            Self::Only(names) => f.write_str(&names.join(", ")),
        }
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => serializer.serialize_str("all"),
            Self::Only(names) => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Names;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"all\" or a list of names")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Names, E> {
                match text {
                    "all" => Ok(Names::All),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = seq.next_element()? {
                    names.push(name);
                }
                Ok(Names::Only(names))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
