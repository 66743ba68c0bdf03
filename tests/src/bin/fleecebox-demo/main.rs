//! `fleecebox demo`: the main job on a real QEMU, shown to a stranger.
//!
//! It plays the VM, its disk and hostile providers; everything else is the product, run by its own commands. It says
//! only what it has looked up, and fails when anything is not as it should be.

mod attacks;
mod command;
mod held;
mod processes;
mod scene;
mod screen;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use scene::Kind;
use screen::Screen;

/// For processes that were told to end.
const END_LIMIT: Duration = Duration::from_secs(10);
/// What a shell reports of a program that a Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// The demonstration; `fleecebox demo` runs it.
#[derive(Debug, Parser)]
struct Arguments {
    /// The folder of the built providers
    #[arg(long)]
    components: PathBuf,
    /// On a booted Linux guest
    #[arg(long)]
    vm: bool,
}

enum Ending {
    Told(Result<Screen>),
    Signal,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fleecebox demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let components = arguments
        .components
        .canonicalize()
        .with_context(|| arguments.components.display().to_string())?;
    let kind = if arguments.vm {
        Kind::Guest
    } else {
        Kind::Daemon
    };
    processes::adopt_orphans();
    let folder = tempfile::TempDir::with_prefix("fleecebox-demo-")?;
    // What the storage daemon, the guest and the proxy make goes in there too.
    let _ = tempfile::env::override_temp_dir(folder.path());
    let (ending, ended) = channel();
    tell_signals(ending.clone())?;
    let path = folder.path().to_owned();
    let started = Instant::now();
    // On a thread of its own, so that this one can end it: with its processes gone, it fails at once.
    let story = std::thread::spawn(move || {
        let told = story::tell(kind, &components, &path);
        let _ = ending.send(Ending::Told(told));
    });
    match ended.recv() {
        Ok(Ending::Told(Ok(screen))) => {
            folder
                .close()
                .context("removing the demonstration's folder")?;
            Ok(conclude(screen, started))
        }
        Ok(Ending::Told(Err(error))) => {
            processes::kill_all();
            Err(error)
        }
        Ok(Ending::Signal) => {
            let deadline = Instant::now() + END_LIMIT;
            while !story.is_finished() && Instant::now() < deadline {
                processes::kill_all();
                match ended.recv_timeout(Duration::from_millis(20)) {
                    Err(RecvTimeoutError::Timeout) | Ok(Ending::Signal) => {}
                    _ => break,
                }
            }
            processes::kill_all();
            folder
                .close()
                .context("removing the demonstration's folder")?;
            eprintln!("\nfleecebox demo: interrupted; QEMU is ended and all files are removed");
            Ok(ExitCode::from(INTERRUPTED))
        }
        Err(_) => {
            processes::kill_all();
            anyhow::bail!("the demonstration broke")
        }
    }
}

/// The last words, which only hold once everything is gone.
fn conclude(mut screen: Screen, started: Instant) -> ExitCode {
    let left = processes::left_after(END_LIMIT);
    let names: Vec<_> = left.iter().map(|left| &left.command_line[..]).collect();
    screen.check(
        left.is_empty(),
        &match names[..] {
            [] => "Nothing is left: QEMU has ended, its sockets and all files are removed.".into(),
            _ => format!("no process is left, but these are: {}", names.join("; ")),
        },
    );
    screen.gap();
    let seconds = started.elapsed().as_secs_f64();
    match screen.broken() {
        [] => {
            let checks = screen.checks();
            screen.say(&format!("All {checks} checks held, in {seconds:.0} s."));
            ExitCode::SUCCESS
        }
        broken => {
            let broken = broken.len();
            screen.say(&format!(
                "{broken} of {} checks did not hold.",
                screen.checks()
            ));
            ExitCode::FAILURE
        }
    }
}

/// Tells every signal that asks for the end.
fn tell_signals(ending: Sender<Ending>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
    ];
    let signals = {
        let _context = runtime.enter();
        kinds
            .map(signal)
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            for mut signal in signals {
                let ending = ending.clone();
                tokio::spawn(async move {
                    while signal.recv().await.is_some() {
                        let _ = ending.send(Ending::Signal);
                    }
                });
            }
            std::future::pending::<()>().await;
        });
    });
    Ok(())
}
