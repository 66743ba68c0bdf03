//! `fleecebox policy check` and `fleecebox policy explain`.

use super::{Failure, Session, Status, places};
use crate::archive::ComponentId;
use crate::config::{Config, ConfigError};
use crate::contract::{Wasi, with_causes};
use crate::policy::check::{Components, Inspected, findings};
use crate::policy::explain::{Verdict, explain};
use crate::sandbox::{self, Program};
use anyhow::anyhow;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Find contradictions and dead rules in a configuration, each with its line.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  fleecebox policy check /etc/fleecebox.toml

Components are looked into where their files are there; none of their code runs. Exit status 2 where anything is found.")]
pub(super) struct Check {
    /// The configuration
    file: PathBuf,
}

/// Say in plain words what a provider may do on a VM, and by which line.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox policy explain acme web chunked")]
pub(super) struct Explain {
    /// The tenant
    tenant: String,
    /// Its VM
    vm: String,
    /// Its provider
    provider: String,
}

impl Check {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let read = std::fs::read_to_string(&self.file).map_err(|source| ConfigError::Read {
            path: self.file.clone(),
            source,
        })?;
        let config = Config::parse(&read, &self.file)?;
        let (components, unchecked) = inspect_all(session, &config).await?;
        let found = findings(&config, &components);
        let file = self.file.display();
        if session.json {
            show!("{:#}", json!({ "findings": found, "unchecked": unchecked }));
        } else {
            for finding in &found {
                show!("{file}:{}: {}", finding.line, finding.message);
            }
            if !session.quiet {
                for unchecked in &unchecked {
                    say!("not checked: {unchecked}");
                }
            }
        }
        if found.is_empty() {
            if !session.quiet {
                say!("{file}: 0 findings");
            }
            return Ok(());
        }
        let count = found.len();
        Err(Failure::Told(
            Status::Mistake,
            anyhow!("{file}: {count} findings"),
        ))
    }
}

/// What can be known of the components, and of which nothing can be.
async fn inspect_all(
    session: &Session,
    config: &Config,
) -> Result<(Components, Vec<String>), Failure> {
    let own = config
        .provider
        .iter()
        .map(|(name, provider)| ((String::new(), name.clone()), &provider.component));
    let tenants = config.tenant.iter().flat_map(|(tenant, owner)| {
        let owned = |(name, _): (&String, _)| (tenant.clone(), name.clone());
        owner
            .provider
            .iter()
            .map(move |(name, provider)| (owned((name, ())), &provider.component))
    });
    let mut components = Components::new();
    let mut unchecked = Vec::new();
    for (key, path) in own.chain(tenants) {
        match inspect(session, path).await {
            Ok(known) => drop(components.insert(key, known)),
            Err(why) => unchecked.push(format!("provider '{}': {why}", key.1.escape_debug())),
        }
    }
    Ok((components, unchecked))
}

async fn inspect(session: &Session, path: &Path) -> Result<Inspected, String> {
    let shown = path.display();
    let length = std::fs::metadata(path)
        .map_err(|error| format!("{shown}: {}", with_causes(&error)))?
        .len();
    if length > crate::contract::MAX_COMPONENT {
        return Err(format!(
            "{shown} has {length} bytes, more than any component may have"
        ));
    }
    let bytes = std::fs::read(path).map_err(|error| format!("{shown}: {}", with_causes(&error)))?;
    let (size, id) = (bytes.len() as u64, ComponentId::of(&bytes));
    let cache = places::cache(session).map_err(|_| "the state folder cannot be used".to_owned())?;
    let compiled = sandbox::compile(&Program::this(), bytes.into(), &cache).await;
    let interface = compiled.ok().map(|compiled| compiled.interface);
    Ok(Inspected {
        size,
        id,
        world: interface
            .as_ref()
            .and_then(|interface| crate::contract::world_of(interface, &Wasi::ALL.into()).ok()),
        wasi: interface.as_ref().map(crate::contract::wasi_of),
    })
}

impl Explain {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let said = explain(&session.config, &self.tenant, &self.vm, &self.provider)?;
        if session.json {
            show!("{:#}", json!(said));
            return Ok(());
        }
        for clause in said {
            let verdict = match clause.verdict {
                Verdict::Granted => "granted",
                Verdict::Refused => "refused",
                Verdict::Limited => "limited",
            };
            let by = match clause.line {
                Some(line) => format!("line {line}"),
                None => "default".into(),
            };
            show!("{verdict}  {by:<9} {}", clause.text);
        }
        Ok(())
    }
}
