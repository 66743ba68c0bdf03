//! `fleecebox export`.

use super::progress::Progress;
use super::vm::{self, VmArguments, check_name};
use super::{Failure, Session, Status, Telling, places, text, words};
use crate::contract::with_causes;
use crate::job::audit::{Job, Record};
use crate::job::export::{self, Ended, ExportPlaces, ExportRequest, Held, Mechanism, Verdict};
use crate::job::subject::{Folders, VmAccess};
use anyhow::{Context, anyhow};
use cap_std::ambient_authority;
use cap_std::fs::Dir;
use clap::{Args, Subcommand};
use std::cell::Cell;
use std::io::{self, Write as _};
use std::sync::Arc;

/// Hold a point in time of a VM for a tool that is trusted.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
Examples:
  fleecebox export web                                 every disk, until ^C
  fleecebox export web --tracking nightly --json       from the second time on, what changed is told besides
  fleecebox export web --mechanism file-handle         each disk as a file
  fleecebox export end web --success                   in another shell, once the tool has all of it

Prints where the disks can be read, one line each (name, NBD URI or file, dirty bitmap or regions), and holds the point \
in time until `fleecebox export end` or a signal. With --tracking NAME, the next export of that name marks as dirty \
what changed since the last one that ended with --success; a signal, like --failure, leaves tracking as if this one \
had not been. NBD clients may give back what they have read (NBD_CMD_TRIM), but for the first 64 KiB of each disk; \
files cannot be discarded (no hole can be punched), so the fleecing image keeps all that the VM overwrites."
)]
pub(super) struct Export {
    #[command(subcommand)]
    end: Option<Ending>,
    #[command(flatten)]
    vm: VmArguments,
    /// Track changes for a tool of this name, from its last success on [default: track nothing]
    #[arg(long, value_name = "NAME")]
    tracking: Option<String>,
    /// How the tool gets the disks
    #[arg(long, value_parser = words::mechanism(), default_value = "nbd")]
    mechanism: Mechanism,
    /// Mark all of every disk as dirty
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    pub(super) telling: Telling,
}

#[derive(Debug, Subcommand)]
enum Ending {
    /// End an export that is held, and say what becomes of its tracking
    End(End),
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("verdict").required(true).args(["success", "failure"])))]
struct End {
    /// The VM
    vm: String,
    /// The tool has all of it: the next export marks what changed since this one
    #[arg(long)]
    success: bool,
    /// The tool has not: the next export marks these changes too
    #[arg(long)]
    failure: bool,
}

impl Export {
    pub(super) async fn run(mut self, session: &Session) -> Result<(), Failure> {
        match self.end.take() {
            Some(Ending::End(end)) => end.run(session).await,
            None => self.hold(session).await,
        }
    }

    async fn hold(self, session: &Session) -> Result<(), Failure> {
        super::refuse_suspension("an export");
        let record = Record::begin(Job::Export, self.vm.which.name().into());
        let ended = self.make(session).await;
        let ended = places::audited(session, record, ended)?;
        match (ended.verdict, ended.by_signal) {
            (Verdict::Success, _) => say!("the export is ended with success"),
            (Verdict::Failure, false) => say!("the export is ended; tracking is as it was before"),
            (Verdict::Failure, true) => {
                say!("a signal ended the export; tracking is as it was before");
            }
        }
        match &ended.left[..] {
            [] if ended.missing.is_empty() => Ok(()),
            [] => Err(Failure::Told(
                Status::Incomplete,
                anyhow!(
                    "disks of the VM were left out: {}; `exclude` says that they are not wanted",
                    ended.missing.join(", ")
                ),
            )),
            left => Err(clean_up_left(left)),
        }
    }

    async fn make(self, session: &Session) -> Result<Ended, Failure> {
        let (name, vm, monitor) = self.vm.resolve(session)?;
        let tracking = self.tracking.map(|name| {
            name.parse().map_err(|_| {
                Failure::Mistake(anyhow!(
                    "'{}' cannot name what is tracked (--tracking): use letters, digits, '.', '_' and '-', not a '.' first",
                    name.escape_debug()
                ))
            })
        });
        let tracking = tracking.transpose()?;
        let extra = vm::extra(&vm)?;
        let vm_state = places::vm_state(session, &name)?;
        let fleecing = vm.fleecing.clone();
        let fleecing = fleecing.unwrap_or_else(|| session.state.join("fleecing"));
        let places = ExportPlaces {
            records: Arc::new(places::records(&vm_state.1)?),
            folders: Folders {
                state: vm_state,
                fleecing: places::folder(&fleecing)?,
            },
        };
        let request = ExportRequest {
            vm: VmAccess {
                name,
                config: vm,
                monitor,
                extra,
            },
            tracking,
            mechanism: self.mechanism,
            full: self.full,
        };
        let (events, progress) = Progress::start(session.quiet);
        let told = Cell::new(false);
        let ready = |held: &Held| {
            told.set(true);
            tell(session, held);
        };
        let ended = export::export(request, places, ready, &events, &session.signals()).await;
        drop(events);
        progress.finish().await;
        ended.map_err(|error| match Failure::of(error) {
            // The one document of --json is what the tool was given.
            Failure::Failed(error) if told.get() => Failure::Told(Status::Failed, error),
            failure => failure,
        })
    }
}

/// One line for each disk, for scripts; the reader may be waiting for it.
fn tell(session: &Session, held: &Held) {
    if session.json {
        match serde_json::to_string(held) {
            Ok(line) => show!("{line}"),
            Err(error) => warn!("{}", with_causes(&error)),
        }
    } else {
        for volume in &held.volumes {
            let (place, dirty) = match (&volume.file, &volume.regions) {
                (Some(file), Some(regions)) => {
                    (file.display().to_string(), regions.display().to_string())
                }
                _ => (
                    volume.uri.clone(),
                    volume.dirty_context.clone().unwrap_or_default(),
                ),
            };
            show!("{}\t{place}\t{dirty}", volume.name);
        }
    }
    let _ = io::stdout().flush();
    if !session.quiet {
        if held.mechanism == Mechanism::FileHandle {
            say!(
                "these files cannot be discarded: the fleecing images keep all that the VM overwrites"
            );
        }
        say!(
            "held until `fleecebox export end {} --success|--failure`, or a signal",
            held.vm
        );
    }
}

impl End {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        check_name(&self.vm)?;
        let none = || {
            Failure::Mistake(anyhow!(
                "no export of VM '{}' is held (looked in the state folder {})",
                self.vm,
                session.state.display()
            ))
        };
        let verdict = match self.success {
            true => Verdict::Success,
            false => Verdict::Failure,
        };
        let path = session.state.join("vms").join(&self.vm);
        let folder = match Dir::open_ambient_dir(&path, ambient_authority()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(none()),
            folder => folder
                .with_context(|| format!("the folder {} cannot be used", path.display()))
                .map_err(Failure::Mistake)?,
        };
        let answer = match export::end(&folder, verdict).await {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Err(none());
            }
            answer => answer
                .context("the process that held the export did not say how it ended")
                .map_err(Failure::Failed)?,
        };
        if session.json {
            show!("{}", serde_json::json!(answer));
        }
        match (&answer.error, &answer.left[..]) {
            (Some(error), _) => Err(Failure::Told(
                Status::Failed,
                anyhow!("the export counts as a failure: {}", text::one_line(error)),
            )),
            (None, []) => Ok(()),
            (None, left) => Err(clean_up_left(left)),
        }
    }
}

fn clean_up_left(left: &[String]) -> Failure {
    let said = anyhow!(
        "the export is ended, but the clean-up is incomplete and left to the next run: {}",
        left.join("; ")
    );
    Failure::Told(Status::Incomplete, said)
}
