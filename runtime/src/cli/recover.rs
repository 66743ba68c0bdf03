//! `fleecebox recover`.

use super::progress::Progress;
use super::vm::{Way, check_name, monitor_of};
use super::{Failure, Session, Status, places, text};
use crate::config::Vm;
use crate::job::recover::{self, Patient, Recovered};
use crate::sandbox;
use anyhow::anyhow;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Remove what a job that died left in a VM, and settle its bitmaps.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("one").args(["vm", "libvirt"]).multiple(true)), after_help = "\
Examples:
  fleecebox recover
  fleecebox recover web --qmp /run/web.qmp --archive /srv/backups

A backup does this by itself first. What a live job owns is never touched: a VM that is backed up just now is left alone \
and said.")]
pub(super) struct Recover {
    /// The VM, by its name in the configuration, or any name along with --qmp or --libvirt [default: all of the configuration]
    vm: Option<String>,
    #[command(flatten)]
    way: Way,
    /// Folder of the fleecing images [default: in the state folder]
    #[arg(long, value_name = "FOLDER", requires = "one")]
    fleecing: Option<PathBuf>,
    /// Socket of the NBD server that this QEMU runs by itself: it is not stopped
    #[arg(long, value_name = "SOCKET", requires = "one")]
    nbd: Option<PathBuf>,
    /// The archive, by name or folder, whose bitmaps are settled; not needed for a VM that was only exported
    #[arg(long, value_name = "NAME|FOLDER", requires = "one")]
    archive: Option<String>,
}

impl Recover {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        places::find_dead(session)?;
        sandbox::remove_dead_groups();
        let name = self.vm.clone();
        let Some(name) = &name.or_else(|| self.way.domain().map(Into::into)) else {
            return match self.way.is_whole() {
                true => Err(Failure::Mistake(anyhow!("name the VM to recover"))),
                false => all(session).await,
            };
        };
        let mut vm = places::vm(session, name, self.way.is_whole())?;
        self.way.lead(&mut vm);
        vm.fleecing = self.fleecing.or(vm.fleecing);
        vm.nbd = self.nbd.or(vm.nbd);
        vm.archive = self.archive.or(vm.archive);
        let recovered = one(session, name, vm).await?;
        let results = [(name.clone(), Ok(recovered))];
        tell(session, &results);
        unsettled(&results)
    }
}

/// A VM's name, and what came of it.
type Outcome = (String, Result<Recovered, Failure>);

/// One that fails does not keep the others from being cleaned up.
async fn all(session: &Session) -> Result<(), Failure> {
    let mut results = Vec::new();
    for (name, vm) in &session.config.vm {
        let result = one(session, name, vm.clone()).await;
        results.push((name.clone(), result));
    }
    if results.is_empty() {
        return Err(Failure::Mistake(anyhow!(
            "the configuration has no VM: name one, with --libvirt or --qmp and its archive as --archive"
        )));
    }
    tell(session, &results);
    let failures = results
        .iter()
        .filter_map(|(_, result)| result.as_ref().err());
    let failed: Vec<Status> = failures.map(Failure::status).collect();
    let Some(first) = failed.first().copied() else {
        return unsettled(&results);
    };
    let status = if failed.len() < results.len() {
        Status::Incomplete
    } else if failed.iter().all(|status| *status == first) {
        first
    } else {
        Status::Failed
    };
    Err(Failure::Told(
        status,
        anyhow!(
            "{} of {} VMs could not be cleaned up",
            failed.len(),
            results.len()
        ),
    ))
}

/// What could not be looked into has been told of.
fn unsettled(results: &[Outcome]) -> Result<(), Failure> {
    let each = results
        .iter()
        .filter_map(|(_, result)| result.as_ref().ok());
    let unsettled: usize = each.map(|recovered| recovered.unsettled.len()).sum();
    match unsettled {
        0 => Ok(()),
        _ => Err(Failure::Told(
            Status::Incomplete,
            anyhow!("{unsettled} namespaces could not be looked into"),
        )),
    }
}

async fn one(session: &Session, name: &str, vm: Vm) -> Result<Recovered, Failure> {
    check_name(name)?;
    let monitor = monitor_of(name, &vm)?;
    let state = places::vm_state(session, name)?;
    let exports = places::records_if_made(&state.0)?;
    let archive = match vm.archive {
        None if exports.is_some() && session.config.archive.is_empty() => None,
        name => Some(places::archive(session, name.as_deref(), false)?),
    };
    let archives: Vec<_> = archive.iter().chain(&exports).collect();
    let fleecing = vm
        .fleecing
        .unwrap_or_else(|| session.state.join("fleecing"));
    let (fleecing, fleecing_path) = places::folder(&fleecing)?;
    let patient = Patient {
        vm: name,
        monitor: &monitor,
        state,
        fleecing: &fleecing,
        nbd: vm.nbd.as_deref(),
        stop: &vm.stop,
        fleecing_path: &fleecing_path,
        archives: &archives,
    };
    let (events, progress) = Progress::start(session.quiet);
    let found = recover::recover_vm(patient, &events, &session.signals()).await;
    drop(events);
    progress.finish().await;
    found.map_err(Failure::of)
}

fn tell(session: &Session, results: &[Outcome]) {
    let mut rows = Vec::new();
    for (vm, result) in results {
        match result {
            Ok(Recovered { found, unsettled }) => {
                for unsettled in unsettled {
                    warn!("{vm}: {}", text::one_line(unsettled));
                }
                if !session.quiet {
                    let what = if *found {
                        "cleaned up"
                    } else {
                        "nothing of a dead job is left"
                    };
                    say!("{vm}: {what}");
                }
                rows.push(json!({ "vm": vm, "found": found, "unsettled": unsettled }));
            }
            Err(failure) => {
                let why = failure.line();
                say!("{vm}: {why}");
                rows.push(json!({ "vm": vm, "error": why }));
            }
        }
    }
    if session.json {
        show!("{:#}", json!(rows));
    }
}
