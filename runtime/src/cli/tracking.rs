//! `fleecebox tracking`.

use super::vm::{self, monitor_of};
use super::{Failure, Session, places, text};
use crate::job::journal::Journal;
use crate::job::tracking::{self, TrackingError};
use crate::qemu::bitmap::Own;
use crate::qemu::{Monitor, MonitorError};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Whose bitmaps.
#[derive(Debug, Args)]
struct Whose {
    #[command(flatten)]
    vm: vm::Which,
}

/// List the dirty bitmaps of Fleecebox's in a VM, and the archive and backup that each belongs to.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox tracking list web")]
pub(super) struct List {
    #[command(flatten)]
    whose: Whose,
}

/// Drop dirty bitmaps of Fleecebox's from a VM. The next backup to their archive reads the disks in full.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox tracking drop web --all              so that the VM can be reverted to an internal snapshot
  fleecebox tracking drop web --archive old      for an archive that is not used any more, or its id where it is gone

No bitmap is dropped while a job is running on the VM.")]
pub(super) struct Drop {
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Those of this archive, by name, folder, or id
    #[arg(long, value_name = "NAME|FOLDER|ID")]
    archive: Option<String>,
    /// Those of exports to tools
    #[arg(long)]
    exports: bool,
    /// All of them
    #[arg(long)]
    all: bool,
}

/// What the exports' records are called where an archive has its name.
const EXPORTS: &str = "exports";

impl Whose {
    async fn reach(&self, session: &Session) -> Result<Monitor, Failure> {
        let vm = self.vm.vm(session)?;
        let monitor = monitor_of(self.vm.name(), &vm)?;
        Monitor::reach(&monitor).await.map_err(failed)
    }

    /// What the archives that can be opened are called here, by their ids.
    fn known(&self, session: &Session) -> Result<BTreeMap<String, String>, Failure> {
        let mut known = BTreeMap::new();
        for name in session.config.archive.keys() {
            // One that is not there now has no name, and its bitmaps are listed by its id.
            if let Ok(archive) = places::archive(session, Some(name), false) {
                known.insert(archive.id().to_string(), name.clone());
            }
        }
        let (state, _) = places::vm_state(session, self.vm.name())?;
        if let Some(records) = places::records_if_made(&state)? {
            known.insert(records.id().to_string(), EXPORTS.into());
        }
        Ok(known)
    }
}

impl List {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let monitor = self.whose.reach(session).await?;
        let known = self.whose.known(session)?;
        let found = tracking::list(&monitor).await.map_err(failed)?;
        tell(
            session,
            &found,
            &known,
            "no bitmap of Fleecebox's is in this VM",
        );
        Ok(())
    }
}

impl Drop {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let monitor = self.whose.reach(session).await?;
        let known = self.whose.known(session)?;
        let wanted = self.which.ids(session, &known)?;
        let (state, path) = places::vm_state(session, self.whose.vm.name())?;
        let mut journal =
            Journal::open(state, path).map_err(|error| failed_to_drop(error.into()))?;
        if let Some(unreadable) = journal.take_unreadable() {
            warn!("{unreadable}");
        }
        let is_wanted = |own: &Own| {
            let archive = own.name.archive();
            wanted.as_ref().is_none_or(|id| id == archive)
        };
        let dropped = tracking::drop_bitmaps(&monitor, &journal, is_wanted).await;
        let dropped = dropped.map_err(failed_to_drop)?;
        if !session.quiet {
            say!(
                "dropped {} bitmaps; the next backup to their archive reads those disks in full",
                dropped.len()
            );
        }
        tell(session, &dropped, &known, "there was none to drop");
        Ok(())
    }
}

impl Which {
    /// The archive's id, or none where all are meant.
    fn ids(
        &self,
        session: &Session,
        known: &BTreeMap<String, String>,
    ) -> Result<Option<String>, Failure> {
        if self.exports {
            let mut exports = known.iter().filter(|(_, name)| *name == EXPORTS);
            let id = exports.next().map(|(id, _)| id.clone());
            // An id that no archive has.
            return Ok(Some(id.unwrap_or_default()));
        }
        let Some(archive) = &self.archive else {
            return Ok(None);
        };
        match archive.parse::<crate::archive::ArchiveId>() {
            Ok(id) => Ok(Some(id.to_string())),
            Err(_) => {
                places::archive(session, Some(archive), false).map(|it| Some(it.id().to_string()))
            }
        }
    }
}

fn tell(session: &Session, bitmaps: &[Own], known: &BTreeMap<String, String>, none: &str) {
    if session.json {
        let rows: Vec<_> = bitmaps.iter().map(|own| row(own, known)).collect();
        show!("{:#}", json!(rows));
        return;
    }
    for own in bitmaps {
        let archive = match known.get(own.name.archive()) {
            Some(name) if name == EXPORTS => "an export".to_owned(),
            Some(name) => format!("archive {name}"),
            None => format!("archive {} (not of this configuration)", own.name.archive()),
        };
        show!(
            "{}: since {} of {archive}, {}: {} dirty{}",
            own.node,
            own.name.backup(),
            own.name.namespace(),
            text::size(own.state.dirty),
            flags(own)
        );
    }
    if bitmaps.is_empty() && !session.quiet {
        say!("{none}");
    }
}

fn flags(own: &Own) -> String {
    let state = &own.state;
    let flags = [
        (!state.recording, "stopped"),
        (state.inconsistent, "inconsistent"),
        (state.busy, "in use"),
        (!state.persistent, "until QEMU ends"),
    ];
    let flags = flags.iter().filter(|(is, _)| *is);
    flags.map(|(_, flag)| format!(", {flag}")).collect()
}

fn row(own: &Own, known: &BTreeMap<String, String>) -> Value {
    let (name, state) = (&own.name, &own.state);
    json!({
        "node": own.node,
        "bitmap": state.name,
        "archive": name.archive(),
        "archive_name": known.get(name.archive()),
        "namespace": name.namespace(),
        "volume": name.volume(),
        "backup": name.backup(),
        "base": name.base(),
        "recording": state.recording,
        "persistent": state.persistent,
        "inconsistent": state.inconsistent,
        "busy": state.busy,
        "dirty_bytes": state.dirty,
    })
}

fn failed(error: MonitorError) -> Failure {
    match error.is_no_monitor() {
        true => Failure::Mistake(error.into()),
        false => Failure::Failed(error.into()),
    }
}

fn failed_to_drop(error: TrackingError) -> Failure {
    match error {
        TrackingError::Monitor(error) => failed(error),
        error => Failure::of(error),
    }
}
