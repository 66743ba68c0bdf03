//! The VM that a command is for, from its name and what the command line changes of its configuration.

use super::{Failure, Session, places};
use crate::config::Vm;
use crate::job::extra::{Extra, Source};
use crate::qemu::agent::Freeze;
use anyhow::{Context, anyhow};
use clap::Args;
use std::path::PathBuf;

/// Arguments of every command that takes a point in time.
#[derive(Debug, Args)]
pub(super) struct VmArguments {
    /// The VM, by its name in the configuration, or any name along with --qmp
    #[arg(value_name = "VM")]
    pub(super) name: String,
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
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
    /// Its name, its configuration, and its monitor's socket.
    pub(super) fn resolve(self, session: &Session) -> Result<(String, Vm, PathBuf), Failure> {
        let mut vm = places::vm(session, &self.name, self.qmp.is_some())?;
        vm.qmp = self.qmp.or(vm.qmp);
        vm.agent = self.agent.or(vm.agent);
        vm.freeze = self.freeze.unwrap_or(vm.freeze);
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
        check_name(&self.name)?;
        let qmp = monitor_of(&self.name, &vm)?;
        Ok((self.name, vm, qmp))
    }
}

/// The socket of its monitor.
pub(super) fn monitor_of(name: &str, vm: &Vm) -> Result<PathBuf, Failure> {
    vm.qmp.clone().ok_or_else(|| {
        mistake(format!(
            "VM '{name}' has no monitor: give its QMP socket with --qmp or as `qmp` in the configuration"
        ))
    })
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
