//! The configuration: VMs, archives and providers by name, in one TOML file. Unknown keys are refused.
//!
//! Each can be given on the command line instead, so that one long command works without a file; both end up in
//! the same types here. A file with tenants is a policy besides: what becomes of it is told there.

mod limits;
mod lines;
pub mod size;
mod tenant;

pub use limits::{Grant, Limits};
pub use lines::Lines;
pub use tenant::{Names, Rule, Tenant, TenantProvider};

use crate::archive::{BELIEVED, ComponentId, Recheck, ZstdLevel};
use crate::qemu::agent::Freeze;
use crate::qemu::libvirt::{self, Uri};
use crate::qemu::snapshot::FleecingFormat;
use crate::qemu::{Address, Form};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tenant::optional_pin;

/// Where the configuration is looked for unless a file is named.
pub const DEFAULT_PATH: &str = "/etc/fleecebox.toml";

/// The whole file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Where journals, locks and compiled components are kept. Default: see [`state_folder`].
    pub state: Option<PathBuf>,
    /// Virtual machines.
    #[serde(default)]
    pub vm: BTreeMap<String, Vm>,
    /// Archives.
    #[serde(default)]
    pub archive: BTreeMap<String, Archive>,
    /// Providers.
    #[serde(default)]
    pub provider: BTreeMap<String, Provider>,
    /// Tenants. With any of them, what they do not grant is denied.
    #[serde(default)]
    pub tenant: BTreeMap<String, Tenant>,
    /// Where each key stands in the file.
    #[serde(skip)]
    pub lines: Lines,
}

/// One virtual machine.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Vm {
    /// QEMU's QMP socket.
    pub qmp: Option<PathBuf>,
    /// Instead of that socket: the domain of libvirt's, by name or UUID. Its agent, start and stop are libvirt's then, too.
    pub libvirt: Option<String>,
    /// That libvirt's connection URI. Default: `qemu:///system`.
    pub libvirt_uri: Option<Uri>,
    /// The guest agent's socket on this host; without one the guest is not frozen.
    pub agent: Option<PathBuf>,
    /// Whether the guest must be frozen: `required`, the default where there is an agent, `if-available`, `never`.
    pub freeze: Option<Freeze>,
    /// Folder for fleecing images; QEMU must be able to open files in it.
    pub fleecing: Option<PathBuf>,
    /// What fleecing images are: `raw`, the default, or `qcow2`.
    #[serde(default)]
    pub fleecing_format: FleecingFormat,
    /// Most bytes that the fleecing images of a backup may take up together; past it the backup is given up.
    #[serde(
        default,
        alias = "fleecing-max-bytes",
        deserialize_with = "size::optional"
    )]
    pub fleecing_bytes: Option<u64>,
    /// Most seconds that a backup may hold its snapshot; past it the backup is given up.
    #[serde(alias = "snapshot-max-seconds")]
    pub snapshot_seconds: Option<u64>,
    /// Most bytes of the disks that a backup may read in a second, over the whole job. A provider's limit holds too.
    #[serde(default, deserialize_with = "size::optional")]
    pub bandwidth: Option<NonZeroU64>,
    /// The disks to back up, by device id, qdev id or node name. Default: all that QEMU reports by device.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Disks that are not to be backed up, named likewise: without them a backup is complete.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Socket of the NBD server that already runs in this QEMU; without one Fleecebox starts its own.
    pub nbd: Option<PathBuf>,
    /// Command that starts the VM paused when it does not run: program and arguments. It is stopped afterwards.
    #[serde(default)]
    pub start: Vec<String>,
    /// Command that ends a VM that `start` started. Default: QEMU is told to quit.
    #[serde(default)]
    pub stop: Vec<String>,
    /// How the point in time is taken. Default: by jobs.
    pub point_in_time: Option<Form>,
    /// Further volumes by name: a device or block node of the VM, or the absolute path of a file.
    #[serde(default)]
    pub extra: BTreeMap<String, String>,
    /// The provider to use when the command names none.
    pub provider: Option<String>,
    /// The archive to use when the command names none.
    pub archive: Option<String>,
    /// Files handed to the provider as `job.context.attachment`, by name.
    #[serde(default)]
    pub attachments: BTreeMap<String, PathBuf>,
}

impl Vm {
    /// Where its monitor is, where that is said; what is said besides is not looked at.
    pub fn address(&self) -> Option<Address> {
        let socket = self.qmp.clone().map(Address::Socket);
        let domain = self.libvirt.as_ref().map(|domain| libvirt::Address {
            uri: self.libvirt_uri.clone().unwrap_or_default(),
            domain: domain.clone(),
        });
        socket.or(domain.map(Address::Libvirt))
    }
}

/// One archive.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Archive {
    /// Its folder.
    pub path: PathBuf,
    /// For how many days stored bytes that were read and matched are believed. Those of chunks that are known already are
    /// read again after that, before a backup refers to them; with 0 always. Default: 7.
    #[serde(default = "check_days")]
    pub check_days: u32,
    /// How hard what backups store here is compressed, where the provider wants it compressed. A limit of the provider's
    /// holds too. Default: 3.
    #[serde(default)]
    pub zstd_level: ZstdLevel,
}

impl Archive {
    /// One in that folder, and all else as it is unless it is configured.
    pub fn at(path: PathBuf) -> Self {
        Self {
            path,
            check_days: check_days(),
            zstd_level: ZstdLevel::default(),
        }
    }

    /// Which stored bytes are read again.
    pub fn recheck(&self) -> Recheck {
        Recheck::OlderThan(DAY * self.check_days)
    }
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn check_days() -> u32 {
    (BELIEVED.as_secs() / DAY.as_secs()) as u32
}

/// One provider.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Provider {
    /// The component's file.
    pub component: PathBuf,
    /// The only bytes that may be run, by their digest.
    #[serde(default, deserialize_with = "optional_pin")]
    pub sha256: Option<ComponentId>,
    /// The provider's part of each archive. Default: the provider's name.
    pub namespace: Option<String>,
    /// Handed to the provider as TOML.
    #[serde(default)]
    pub settings: toml::Table,
    /// Limits on each of its runs.
    #[serde(default)]
    pub limits: Limits,
    /// Which optional handles it gets.
    #[serde(default)]
    pub grant: Grant,
}

impl Provider {
    /// A component with default settings, limits and grants.
    pub fn of(component: PathBuf) -> Self {
        Self {
            component,
            sha256: None,
            namespace: None,
            settings: toml::Table::new(),
            limits: Limits::default(),
            grant: Grant::default(),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was named cannot be read.
    #[error("cannot read the configuration {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what a configuration looks like. The message names line and key.
    #[error("the configuration {path} is wrong: {message}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        message: String,
    },
    /// A name that the configuration does not have.
    #[error("there is no {kind} named '{name}'{known}; {remedy}")]
    Unknown {
        /// `VM`, `archive` or `provider`.
        kind: &'static str,
        /// As it was given.
        name: String,
        /// The names that there are.
        known: String,
        /// What to do.
        remedy: &'static str,
    },
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] where that exists, or nothing.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let chosen = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(chosen) {
            Ok(text) => Self::parse(&text, chosen),
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read {
                path: chosen.to_owned(),
                source,
            }),
        }
    }

    /// Parses the text of `path`, which is only named in errors. It may contradict itself, which is the policy's to say.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let parsed: Result<Self, toml::de::Error> = toml::from_str(text);
        let parsed = parsed.map(|config| Self {
            lines: Lines::of(text),
            ..config
        });
        parsed.map_err(|error| {
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or_else(String::new, |before| {
                    format!("line {}: ", before.matches('\n').count() + 1)
                });
            ConfigError::Parse {
                path: path.to_owned(),
                message: format!("{line}{}", error.message().replace('\n', "; ")),
            }
        })
    }

    /// The archive of that name, or the folder of that path.
    pub fn archive(&self, name: &str) -> Result<Archive, ConfigError> {
        match self.archive.get(name) {
            Some(archive) => Ok(archive.clone()),
            None if looks_like_a_path(name) => Ok(Archive::at(name.into())),
            None => Err(unknown(
                "archive",
                name,
                self.archive.keys(),
                "name one of the configuration, or a folder such as ./backups",
            )),
        }
    }

    /// The provider of that name with its name, or the component file of that path, named after the file.
    pub fn provider(&self, name: &str) -> Result<(String, Provider), ConfigError> {
        match self.provider.get(name) {
            Some(provider) => Ok((name.to_owned(), provider.clone())),
            None if looks_like_a_path(name) || name.ends_with(".wasm") => {
                let component = PathBuf::from(name);
                let stem = component
                    .file_stem()
                    .map_or_else(|| "provider".into(), |stem| stem.to_string_lossy());
                let stem = stem.into_owned();
                Ok((stem, Provider::of(component)))
            }
            None => Err(unknown(
                "provider",
                name,
                self.provider.keys(),
                "name one of the configuration, or a component file such as ./chunked.wasm",
            )),
        }
    }
}

/// Where journals, locks and compiled components are kept by default: `/var/lib/fleecebox` for root, else
/// `$XDG_STATE_HOME/fleecebox` or `$HOME/.local/state/fleecebox`.
pub fn state_folder() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/fleecebox");
    }
    std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state")))
        .unwrap_or_else(std::env::temp_dir)
        .join("fleecebox")
}

/// An error that says which names there are.
pub fn unknown<'a>(
    kind: &'static str,
    name: &str,
    known: impl Iterator<Item = &'a String>,
    remedy: &'static str,
) -> ConfigError {
    let known: Vec<&str> = known.map(String::as_str).collect();
    ConfigError::Unknown {
        kind,
        name: name.escape_debug().to_string(),
        known: if known.is_empty() {
            String::new()
        } else {
            format!(" (there is {})", known.join(", "))
        },
        remedy,
    }
}

fn looks_like_a_path(name: &str) -> bool {
    name.contains('/') || name == "." || name == ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = Config::parse(
            "[vm.web]\nqmp = '/run/web.qmp'\ndisk = ['a']\n",
            Path::new("f.toml"),
        )
        .unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("f.toml") && message.contains("line 3") && message.contains("`disk`"),
            "{message}"
        );
        assert!(Config::parse("[vms.web]\n", Path::new("f.toml")).is_err());
        assert!(
            Config::parse(
                "[provider.p]\ncomponent='x'\n[provider.p.limits]\nmemroy=1\n",
                Path::new("f")
            )
            .is_err()
        );
    }

    #[test]
    fn a_name_that_is_not_there_says_which_are() {
        let config = Config::parse("[archive.main]\npath='/srv'\n", Path::new("f")).unwrap();
        let message = config.archive("mian").unwrap_err().to_string();
        assert!(
            message.contains("'mian'") && message.contains("main"),
            "{message}"
        );
        assert_eq!(config.archive("./here").unwrap().path, Path::new("./here"));
    }

    #[test]
    fn stored_bytes_are_believed_for_as_many_days_as_the_archive_says() {
        let recheck = |text: &str| {
            let config = Config::parse(text, Path::new("f")).unwrap();
            config.archive("main").unwrap().recheck()
        };
        let one = "[archive.main]\npath='/srv'\n";
        assert_eq!(recheck(one), Recheck::OlderThan(BELIEVED));
        let never = format!("{one}check-days = 0\n");
        assert_eq!(recheck(&never), Recheck::OlderThan(Duration::ZERO));
    }

    #[test]
    fn what_is_stored_is_compressed_at_the_level_that_the_archive_says() {
        let level = |text: &str| {
            let text = format!("[archive.main]\npath='/srv'\n{text}");
            let config = Config::parse(&text, Path::new("f"))?;
            Ok::<_, ConfigError>(i64::from(config.archive("main")?.zstd_level))
        };
        assert_eq!(level("").unwrap(), 3);
        assert_eq!(level("zstd-level = 1").unwrap(), 1);
        assert_eq!(level("zstd-level = 19").unwrap(), 19);
        for wrong in ["0", "20", "-1", "'fast'"] {
            let refused = level(&format!("zstd-level = {wrong}")).unwrap_err();
            assert!(refused.to_string().contains("line 3"), "{refused}");
        }
        assert_eq!(i64::from(Archive::at("/srv".into()).zstd_level), 3);
    }

    #[test]
    fn settings_reach_the_provider_as_they_were_written() {
        let text = "[provider.p]\ncomponent='p.wasm'\n[provider.p.settings]\nchunk-size = 65536\n";
        let (name, provider) = Config::parse(text, Path::new("f"))
            .unwrap()
            .provider("p")
            .unwrap();
        assert_eq!(name, "p");
        assert_eq!(
            toml::to_string(&provider.settings).unwrap(),
            "chunk-size = 65536\n"
        );
    }
}
