//! The commands: one file each. This one parses arguments, cares for signals, and turns errors into exit statuses.

#[macro_use]
mod output;

mod audit;
mod backup;
mod demo;
mod export;
mod inspect;
mod install;
mod installed;
mod lines;
mod list;
mod new;
mod places;
mod policy;
mod progress;
mod providers;
mod recording;
mod recover;
mod remove;
mod restore;
mod serve;
mod show;
mod socket;
mod status;
mod stored;
mod test;
mod text;
mod tracking;
mod verify;
mod vm;
mod words;

use crate::config::{self, Config, ConfigError};
use crate::contract::Wasi;
use crate::job::signals::Signals;
use crate::policy::Denied;
use crate::sandbox::Program;
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use status::Status;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Backs up running QEMU virtual machines through WebAssembly providers that nobody has to trust.
#[derive(Debug, Parser)]
#[command(
    name = "fleecebox",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = status::TABLE
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// Configuration [default: /etc/fleecebox.toml, where that exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder for journals, locks and compiled components [default: /var/lib/fleecebox for root]
    #[arg(long, global = true, value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// Print the result as one JSON document on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Print only warnings and errors on standard error
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Back up the disks of a running VM
    Backup(backup::Backup),
    /// Remove what a job that died left in a VM, and settle its bitmaps
    Recover(recover::Recover),
    /// Hold a point in time of a VM for a tool that is trusted
    Export(export::Export),
    /// Write a backup's volumes to files or block devices
    Restore(restore::Restore),
    /// Read a backup completely and compare each block with its digest
    Verify(verify::Verify),
    /// Serve a backup's volumes over NBD, read-only
    Serve(serve::Serve),
    /// List the backups in an archive
    List(list::List),
    /// Show one backup's manifest
    Show(show::Show),
    /// List and drop the dirty bitmaps that incremental backups and exports go by
    #[command(subcommand)]
    Tracking(Tracking),
    /// Write, try, look at and install providers
    #[command(subcommand)]
    Provider(Provider),
    /// Show what became of jobs, and what they used of what they were granted
    Audit(audit::Audit),
    /// Check and explain what tenants and their providers are granted
    #[command(subcommand)]
    Policy(Policy),
    /// Show the main job on a real storage daemon with a disk that is written all the while
    Demo(demo::Demo),
}

#[derive(Debug, Subcommand)]
enum Provider {
    /// Say what a component is, imports and needs, without running any of it
    Inspect(inspect::Inspect),
    /// Try one with simulated disks: backups, restores, and everything that may go wrong
    Test(test::Test),
    /// Write a project for a new one
    New(new::New),
    /// Keep one on this host, to be used by its name
    Install(install::Install),
    /// List those of the configuration and those installed
    List(providers::Providers),
    /// Remove an installed one; its backups stay
    Remove(remove::Remove),
}

#[derive(Debug, Subcommand)]
enum Tracking {
    /// Say which there are in a VM, and which archive and backup each belongs to
    List(tracking::List),
    /// Remove some, or all: the next backup reads the disks in full
    Drop(tracking::Drop),
}

#[derive(Debug, Subcommand)]
enum Policy {
    /// Find contradictions and dead rules in a configuration, each with its line
    Check(policy::Check),
    /// Say in plain words what a provider may do on a VM, and by which line
    Explain(policy::Explain),
}

/// For the commands that run providers.
#[derive(Debug, Args)]
struct Sandboxes {
    /// Fail where the system cannot confine a provider's process fully, instead of warning
    #[arg(long)]
    require_confinement: bool,
}

impl Sandboxes {
    fn program(&self) -> Program {
        Program::this().require_confinement(self.require_confinement)
    }
}

/// For the commands that run a provider on somebody's data.
#[derive(Debug, Args)]
struct AllowWasi {
    /// A part of WASI that the provider may import, besides those that the configuration grants it; may be repeated
    #[arg(
        long = "allow-wasi",
        value_parser = words::wasi(),
        value_delimiter = ',',
        value_name = "PART"
    )]
    parts: Vec<Wasi>,
}

impl AllowWasi {
    /// What was allowed, where there is no policy to say so.
    fn parts(&self, session: &Session) -> Result<BTreeSet<Wasi>, Failure> {
        if !self.parts.is_empty() && !session.config.tenant.is_empty() {
            return Err(Failure::Mistake(anyhow::anyhow!(
                "--allow-wasi means nothing where the configuration has tenants: their rules say what is granted"
            )));
        }
        Ok(self.parts.iter().copied().collect())
    }
}

/// For the commands that run jobs.
#[derive(Debug, Args)]
struct Telling {
    /// How to tell on standard error what happens
    #[arg(long, value_parser = words::progress(), default_value = words::TEXT, value_name = "FORM")]
    progress: Form,
}

/// In what form a command tells what happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Command {
    /// How it tells what happens, and its name.
    fn telling(&self) -> (Form, &'static str) {
        match self {
            Self::Backup(command) => (command.telling.progress, "backup"),
            Self::Export(command) => (command.telling.progress, "export"),
            Self::Restore(command) => (command.telling.progress, "restore"),
            Self::Verify(command) => (command.telling.progress, "verify"),
            _ => (Form::Text, ""),
        }
    }
}

/// How long a job may take to end when it is to end at once.
const AT_ONCE: Duration = Duration::from_secs(2);

/// For what still runs when a command has ended.
const LAST_WORK: Duration = Duration::from_secs(1);

/// How a command failed; what each means is in the table of [`Status`].
#[derive(Debug)]
enum Failure {
    /// The user can mend it.
    Mistake(anyhow::Error),
    /// None of the others.
    Failed(anyhow::Error),
    /// The archive, or a backup in it.
    Unusable(anyhow::Error),
    /// Another is at work.
    Busy(anyhow::Error),
    /// By the policy.
    Denied(anyhow::Error),
    /// By a signal.
    Cancelled(anyhow::Error),
    /// After a result that says all of it: with `--json` there is one document and not two.
    Told(Status, anyhow::Error),
}

impl Failure {
    /// A failure of the kind that the error itself, or the first of its causes that is known, belongs to.
    fn of(error: impl Into<anyhow::Error>) -> Self {
        let error = error.into();
        match Status::of(&error) {
            Status::Failed => Self::Failed(error),
            Status::Mistake => Self::Mistake(error),
            Status::Unusable => Self::Unusable(error),
            Status::Busy => Self::Busy(error),
            Status::Denied => Self::Denied(error),
            Status::Cancelled => Self::Cancelled(error),
            status @ Status::Incomplete => Self::Told(status, error),
        }
    }

    fn status(&self) -> Status {
        match self {
            Self::Mistake(_) => Status::Mistake,
            Self::Failed(_) => Status::Failed,
            Self::Unusable(_) => Status::Unusable,
            Self::Busy(_) => Status::Busy,
            Self::Denied(_) => Status::Denied,
            Self::Cancelled(_) => Status::Cancelled,
            Self::Told(status, _) => *status,
        }
    }

    fn error(&self) -> &anyhow::Error {
        match self {
            Self::Mistake(error)
            | Self::Failed(error)
            | Self::Unusable(error)
            | Self::Busy(error)
            | Self::Denied(error)
            | Self::Cancelled(error)
            | Self::Told(_, error) => error,
        }
    }

    /// For the operator.
    fn line(&self) -> String {
        text::error(self.error())
    }

    /// Whatever failed after a signal asked for the end failed because of it.
    fn cancelled_if(self, cancelled: bool) -> Self {
        match self {
            Self::Failed(error) if cancelled => Self::Cancelled(error),
            Self::Told(Status::Failed, error) if cancelled => Self::Told(Status::Cancelled, error),
            other => other,
        }
    }
}

/// What every command gets.
#[derive(Debug)]
struct Session {
    config: Config,
    state: PathBuf,
    json: bool,
    quiet: bool,
    cancel: CancellationToken,
    at_once: CancellationToken,
}

impl Session {
    /// What signals ask of a job.
    fn signals(&self) -> Signals {
        Signals {
            end: self.cancel.clone(),
            at_once: self.at_once.clone(),
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.common.json;
    let status = match begin(&cli.command).and_then(|()| run(cli)) {
        Ok(()) => 0,
        Err(failure) => {
            let status = failure.status().code();
            let line = failure.line();
            output::fail(line.clone());
            if json && !matches!(failure, Failure::Told(..)) {
                show!(
                    "{}",
                    serde_json::json!({ "error": line, "exit_status": status })
                );
            }
            status
        }
    };
    output::end(status);
    ExitCode::from(status)
}

fn begin(command: &Command) -> Result<(), Failure> {
    match command.telling() {
        (Form::Text, _) => Ok(()),
        (Form::Json, name) => lines::begin(name)
            .context("what happens cannot be told as JSON")
            .map_err(Failure::Failed),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let config = match &cli.command {
        // The one that it is to check may be wrong, and is another one.
        Command::Policy(Policy::Check(_)) => Config::default(),
        _ => crate::policy::load(cli.common.config.as_deref())?,
    };
    let state = cli
        .common
        .state
        .or_else(|| config.state.clone())
        .unwrap_or_else(config::state_folder);
    places::check_state(&state)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(error.into()))?;
    let cancel = CancellationToken::new();
    let at_once = CancellationToken::new();
    let session = Session {
        config,
        state,
        json: cli.common.json,
        quiet: cli.common.quiet,
        cancel: cancel.clone(),
        at_once: at_once.clone(),
    };
    let ended = runtime.block_on(async {
        cancel_on_signals(cancel, at_once);
        match cli.command {
            Command::Backup(command) => command.run(&session).await,
            Command::Recover(command) => command.run(&session).await,
            Command::Export(command) => command.run(&session).await,
            Command::Restore(command) => command.run(&session).await,
            Command::Verify(command) => command.run(&session).await,
            Command::Serve(command) => command.run(&session).await,
            Command::List(command) => command.run(&session),
            Command::Show(command) => command.run(&session),
            Command::Tracking(Tracking::List(command)) => command.run(&session).await,
            Command::Tracking(Tracking::Drop(command)) => command.run(&session).await,
            Command::Provider(Provider::Inspect(command)) => command.run(&session).await,
            Command::Provider(Provider::Test(command)) => command.run(&session).await,
            Command::Provider(Provider::New(command)) => command.run(&session),
            Command::Provider(Provider::Install(command)) => command.run(&session).await,
            Command::Provider(Provider::List(command)) => command.run(&session).await,
            Command::Provider(Provider::Remove(command)) => command.run(&session),
            Command::Audit(command) => command.run(&session),
            Command::Policy(Policy::Check(command)) => command.run(&session).await,
            Command::Policy(Policy::Explain(command)) => command.run(&session),
            Command::Demo(command) => command.run(&session).await,
        }
    });
    // File work that hangs in an archive would otherwise be waited for without end.
    runtime.shutdown_timeout(LAST_WORK);
    ended.map_err(|failure| failure.cancelled_if(session.cancel.is_cancelled()))
}

/// ^Z would leave the snapshot to itself: its fleecing images grow with nobody who gives it up in time.
fn refuse_suspension(what: &'static str) {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = SignalKind::from_raw(rustix::process::Signal::TSTP.as_raw());
    let Ok(mut stops) = signal(stop) else { return };
    tokio::spawn(async move {
        while stops.recv().await.is_some() {
            say!(
                "{what} cannot be suspended, because its snapshot would go on growing; ^C ends it"
            );
        }
    });
}

/// Each of these ends the job in order: QEMU is cleaned up before the process ends. They are caught from when this
/// returns on, so nothing may be done to a VM before.
/// A second one ends it at once: what is then left in the VM is named, and its watchdog's.
fn cancel_on_signals(cancel: CancellationToken, at_once: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
    ];
    let Ok(mut signals) = kinds.into_iter().map(signal).collect::<Result<Vec<_>, _>>() else {
        return;
    };
    // A file beyond the limit on their size is to be an error that can be named (setrlimit(2)), not a sudden end.
    let _ = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()));
    tokio::spawn(async move {
        let mut next = async || {
            let waits = signals.iter_mut().map(|signal| Box::pin(signal.recv()));
            futures_util::future::select_all(waits).await;
        };
        next().await;
        cancel.cancel();
        next().await;
        at_once.cancel();
        tokio::time::sleep(AT_ONCE).await;
        output::fail(
            "ended at once by a second signal; what the job has left in the VM is removed by its watchdog as soon as that can be done without stopping the VM, or by `fleecebox recover`".into()
        );
        let status = Status::Cancelled.code();
        output::end(status);
        std::process::exit(status.into());
    });
}

impl From<Denied> for Failure {
    fn from(error: Denied) -> Self {
        Self::of(error)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Mistake(error.into())
    }
}
