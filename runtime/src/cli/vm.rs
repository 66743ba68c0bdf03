//! The VM that a command is for, from its name and what the command line changes of its configuration.

use super::{Failure, Session, places};
use crate::config::Vm;
use crate::job::extra::{Extra, Source};
use crate::qemu::Address;
use crate::qemu::agent::Freeze;
use crate::qemu::libvirt::Uri;
use anyhow::{Context, anyhow};
use clap::Args;
use std::path::PathBuf;

/// The VM of a command, and how it is reached where the configuration does not say so.
#[derive(Debug, Clone, Args)]
pub(super) struct Which {
    /// The VM, by its name in the configuration, or any name along with --qmp or --libvirt [default: the domain's]
    #[arg(value_name = "VM", required_unless_present = "libvirt")]
    name: Option<String>,
    #[command(flatten)]
    way: Way,
}

/// How a VM is reached, instead of as the configuration says.
#[derive(Debug, Clone, Args)]
pub(super) struct Way {
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET", conflicts_with = "libvirt")]
    qmp: Option<PathBuf>,
    /// The domain of libvirt's, by name or UUID: monitor, guest agent, start and stop are libvirt's
    #[arg(long, value_name = "DOMAIN")]
    libvirt: Option<String>,
    /// That libvirt's connection URI [default: qemu:///system]
    #[arg(long, value_name = "URI")]
    libvirt_uri: Option<Uri>,
}

impl Which {
    /// The VM's name.
    pub(super) fn name(&self) -> &str {
        let named = self.name.as_ref().or(self.way.libvirt.as_ref());
        named.map_or("", String::as_str)
    }

    /// Its configuration, with what was said besides.
    pub(super) fn vm(&self, session: &Session) -> Result<Vm, Failure> {
        check_name(self.name())?;
        let mut vm = places::vm(session, self.name(), self.way.is_whole())?;
        self.way.clone().lead(&mut vm);
        Ok(vm)
    }
}

impl Way {
    /// Whether it says where the monitor is.
    pub(super) fn is_whole(&self) -> bool {
        self.qmp.is_some() || self.libvirt.is_some()
    }

    /// The domain's name, where that was given.
    pub(super) fn domain(&self) -> Option<&str> {
        self.libvirt.as_deref()
    }

    /// To the VM, instead of the way that is configured.
    pub(super) fn lead(self, vm: &mut Vm) {
        if let Some(qmp) = self.qmp {
            vm.qmp = Some(qmp);
            vm.libvirt = None;
        }
        if let Some(domain) = self.libvirt {
            vm.libvirt = Some(domain);
            vm.qmp = None;
            vm.agent = None;
            vm.start.clear();
            vm.stop.clear();
        }
        vm.libvirt_uri = self.libvirt_uri.or(vm.libvirt_uri.take());
    }
}

/// Arguments of every command that takes a point in time.
#[derive(Debug, Args)]
pub(super) struct VmArguments {
    #[command(flatten)]
    pub(super) which: Which,
    /// The guest agent's socket: the guest's file systems are frozen at the point in time
    #[arg(long, value_name = "SOCKET")]
    agent: Option<PathBuf>,
    /// Whether the guest must be frozen, where it has an agent [default: required]
    #[arg(long, value_parser = super::words::freeze(), value_name = "WHEN")]
    freeze: Option<Freeze>,
    /// A disk to take, by device id, drive id or node name; may be repeated [default: all]
    #[arg(long = "disk", value_name = "NAME")]
    disks: Vec<String>,
    /// A disk not to take, named likewise; may be repeated. Without it the backup is complete all the same
    #[arg(long, value_name = "NAME")]
    exclude: Vec<String>,
    /// Folder for fleecing images, which QEMU must be able to use [default: in the state folder]
    #[arg(long, value_name = "FOLDER")]
    fleecing: Option<PathBuf>,
    /// Socket of the NBD server that this QEMU already runs
    #[arg(long, value_name = "SOCKET")]
    nbd: Option<PathBuf>,
}

impl VmArguments {
    /// Its name, its configuration, and where its monitor is.
    pub(super) fn resolve(self, session: &Session) -> Result<(String, Vm, Address), Failure> {
        let mut vm = self.which.vm(session)?;
        vm.agent = self.agent.or(vm.agent);
        vm.freeze = self.freeze.or(vm.freeze);
        vm.fleecing = self.fleecing.or(vm.fleecing);
        vm.nbd = self.nbd.or(vm.nbd);
        if !self.disks.is_empty() {
            vm.disks = self.disks;
        }
        vm.exclude.extend(self.exclude);
        if let Some(both) = vm.disks.iter().find(|disk| vm.exclude.contains(disk)) {
            return Err(mistake(format!(
                "the disk '{}' is both named and excluded",
                both.escape_debug()
            )));
        }
        let name = self.which.name().to_owned();
        let monitor = monitor_of(&name, &vm)?;
        Ok((name, vm, monitor))
    }
}

/// Where its monitor is.
pub(super) fn monitor_of(name: &str, vm: &Vm) -> Result<Address, Failure> {
    let address = vm.address().ok_or_else(|| {
        mistake(format!(
            "VM '{name}' has no monitor: name its domain of libvirt's with --libvirt or as `libvirt` in the configuration, or its QMP socket with --qmp or as `qmp`"
        ))
    })?;
    let beside = [
        ("qmp", vm.qmp.is_some()),
        ("agent", vm.agent.is_some()),
        ("start", !vm.start.is_empty()),
        ("stop", !vm.stop.is_empty()),
    ];
    match beside.iter().find(|(_, is_there)| *is_there) {
        Some((key, _)) if vm.libvirt.is_some() => Err(mistake(format!(
            "VM '{name}' has `{key}` beside `libvirt`, through which monitor, guest agent, start and stop go: take one of them away"
        ))),
        _ if vm.libvirt_uri.is_some() && vm.libvirt.is_none() => Err(mistake(format!(
            "VM '{name}' has a libvirt-uri, and no domain there: name it with --libvirt or as `libvirt` in the configuration"
        ))),
        _ => Ok(address),
    }
}

/// The further volumes of a VM, each file opened.
pub(super) fn extra(vm: &Vm) -> Result<Vec<Extra>, Failure> {
    let extra = vm.extra.iter();
    extra.map(|(name, what)| one_extra(name, what)).collect()
}

/// It becomes a folder's name and part of each bitmap's name.
pub(super) fn check_name(name: &str) -> Result<(), Failure> {
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if name.is_empty() || name.len() > 64 || !plain || name.starts_with('.') {
        return Err(mistake(format!(
            "'{}' cannot name a VM: use 1 to 64 letters, digits, '-', '_' and '.'",
            name.escape_debug()
        )));
    }
    Ok(())
}

/// What has a slash is a file, anything else a device or block node of the VM.
fn one_extra(name: &str, what: &str) -> Result<Extra, Failure> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if name.is_empty() || !name.bytes().all(plain) || name.starts_with('.') {
        return Err(mistake(format!(
            "'{}' cannot name an extra volume: use letters, digits, '-', '_' and '.'",
            name.escape_debug()
        )));
    }
    let source = match what.contains('/') {
        false => Source::Node(what.into()),
        true => {
            let opened = std::fs::File::open(what)
                .and_then(|opened| Ok((std::fs::canonicalize(what)?, opened)));
            let (path, opened) = opened
                .with_context(|| format!("the extra volume {name} ({what}) cannot be opened"))
                .map_err(Failure::Mistake)?;
            Source::File { path, opened }
        }
    };
    Ok(Extra {
        name: name.into(),
        source,
    })
}

fn mistake(message: String) -> Failure {
    Failure::Mistake(anyhow!(message))
}
