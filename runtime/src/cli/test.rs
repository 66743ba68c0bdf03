//! `fleecebox provider test`.

use super::{Failure, Sandboxes, Session, Status, installed, places, recording, text};
use crate::conformance::{self, Case, CaseReport, Need, Needs, Outcome, Subject};
use crate::contract::Wasi;
use crate::event::Events;
use crate::job::component::Component;
use anyhow::{Context, anyhow};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Try a provider with simulated disks: backups, restores, and everything that may go wrong.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox provider test ./mirror.wasm
  fleecebox provider test ./mirror.wasm --only incremental --only any-order --seed 7
  fleecebox provider test ./mirror.wasm --json >report.json
  fleecebox provider test ./mirror.wasm --replay case.jsonl

The provider runs in the same sandbox and through the same code as in a backup of a real VM; neither QEMU nor a \
hypervisor is needed. Exit status: 0 all passed, 1 the provider does something wrong, 2 the file is no provider.")]
pub(super) struct Test {
    /// The provider, by name or component file
    #[arg(value_name = "NAME|FILE")]
    provider: String,
    /// Only this case; may be repeated [default: all]
    #[arg(long, value_enum, value_name = "CASE")]
    only: Vec<Case>,
    /// What the disks hold and how they change: the same seed tries the same [default: random, and printed]
    #[arg(long)]
    seed: Option<u64>,
    /// A TOML file with the provider's settings
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Instead of the cases: give it the answers of a recording (`fleecebox backup --record`), and say where it first
    /// asks something else
    #[arg(long, value_name = "FILE", conflicts_with_all = ["only", "seed", "settings"])]
    replay: Option<PathBuf>,
    #[command(flatten)]
    sandboxes: Sandboxes,
}

impl Test {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let (name, mut provider) = installed::provider(session, &self.provider)?;
        if let Some(path) = &self.settings {
            provider.settings = places::settings(path)?;
        }
        let bytes = bytes::Bytes::from(places::read(&provider.component, "provider's component")?);
        let shown = provider.component.display().to_string();
        let cache = places::cache(session)?;
        let program = self.sandboxes.program();
        let (events, _) = Events::channel();
        let component = Component::load(bytes.clone(), &program, &cache, Wasi::ALL.into(), &events)
            .await
            .map_err(|error| {
                let failure = match error.is_refusal() {
                    true => Failure::Mistake,
                    false => Failure::Failed,
                };
                failure(anyhow!(error).context(shown.clone()))
            })?;
        if let Some(path) = &self.replay {
            return recording::replay(session, path, &component, &program).await;
        }
        let sha256 = hex::encode(component.compiled.sha256);
        let (world, size) = (component.world, component.compiled.size);
        let seed = match self.seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(places::failed)?,
        };
        let scratch = tempfile::Builder::new()
            .prefix("fleecebox-test-")
            .tempdir()
            .context("no temporary folder can be made")
            .map_err(Failure::Failed)?;
        let subject = Subject::new(
            name,
            bytes,
            provider,
            component,
            program,
            cache,
            session.cancel.clone(),
            scratch.path().to_owned(),
            seed,
        );
        if !session.json {
            show!("{shown}: world {}, seed {seed}\n", world.name());
        }
        let tell = |case: &CaseReport| {
            if !session.json {
                show_case(case);
            }
        };
        let chosen = match &self.only[..] {
            [] => &Case::ALL[..],
            only => only,
        };
        let report = conformance::run(&subject, chosen, tell)
            .await
            .map_err(Failure::of)?;
        if session.json {
            let result = json!({
                "file": shown,
                "sha256": sha256,
                "size": size,
                "world": world,
                "passed": report.passed(),
                "seed": report.seed,
                "cases": report.cases,
                "needs": report.needs,
            });
            show!("{result:#}");
        } else if let Some(needs) = &report.needs {
            show_needs(needs);
        }
        if report.passed() {
            return Ok(());
        }
        let failed = |it: &&CaseReport| matches!(it.outcome, Outcome::Failed { .. });
        let count = report.cases.iter().filter(failed).count();
        Err(Failure::Told(
            Status::Failed,
            anyhow!(
                "{shown} fails {count} of {} cases; --seed {seed} tries the same again",
                report.cases.len()
            ),
        ))
    }
}

fn show_case(case: &CaseReport) {
    let name = case.case.name();
    let row = |result: &str, words: &str| {
        show!("{name:<16} {result:<9} {}", text::one_line(words));
    };
    match &case.outcome {
        Outcome::Passed { detail } => row("passed", &format!("{detail} ({:.1} s)", case.seconds)),
        Outcome::NotTried { reason } => row("not tried", reason),
        Outcome::Failed { mistakes } => {
            for mistake in mistakes {
                row("FAILED", &mistake.what);
                for (label, words) in [("means", &mistake.means), ("do", &mistake.remedy)] {
                    show!("{:<26} {label}: {}", "", text::one_line(words));
                }
            }
        }
    }
}

fn show_needs(needs: &Needs) {
    let need = |need| match need {
        Need::Required => "required",
        Need::Used => "used, works without",
        Need::Unused => "not used",
    };
    let memory = match needs.memory {
        Some(bytes) => format!("{} were enough", text::size(bytes)),
        None => "more than what was tried".into(),
    };
    show!(
        "\nneeds: read {}; discard {}; objects {} for a volume; memory {memory}",
        need(needs.reader),
        need(needs.discarder),
        needs.objects
    );
}
