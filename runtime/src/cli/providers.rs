//! `fleecebox provider list`.

use super::{Failure, Session, Status, installed, places};
use crate::contract::{Wasi, with_causes};
use crate::sandbox::{self, Program};
use anyhow::anyhow;
use clap::Args;
use serde_json::json;

/// List the providers of the configuration and those that were installed.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox provider list")]
pub(super) struct Providers {}

impl Providers {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut names: Vec<String> = session.config.provider.keys().cloned().collect();
        names.extend(installed::names(session)?);
        names.sort_unstable();
        names.dedup();
        let cache = places::cache(session)?;
        let mut rows = Vec::new();
        let mut bad = 0;
        for name in names {
            let configured = session.config.provider.contains_key(&name);
            let (_, provider) = installed::provider(session, &name)?;
            let looked_at = match places::read(&provider.component, "component") {
                Ok(bytes) => sandbox::compile(&Program::this(), bytes.into(), &cache)
                    .await
                    .map_err(|error| with_causes(&error)),
                Err(failure) => Err(failure.line()),
            };
            // One that is broken must not hide the others.
            let world = looked_at
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|compiled| {
                    crate::contract::world_of(&compiled.interface, &Wasi::ALL.into())
                        .map_err(|refusal| with_causes(&refusal))
                });
            bad += usize::from(world.is_err());
            let sha256 = looked_at.as_ref().ok().map(|it| hex::encode(it.sha256));
            let size = looked_at.as_ref().ok().map(|it| it.size);
            let from = if configured {
                "configuration"
            } else {
                "installed"
            };
            if session.json {
                rows.push(json!({
                    "name": name, "from": from, "component": provider.component, "sha256": sha256, "size": size,
                    "world": world.as_ref().ok(), "unusable": world.as_ref().err(),
                }));
                continue;
            }
            let shown = match &world {
                Ok(world) => world.name().to_owned(),
                Err(reason) => format!("cannot be used: {}", super::text::one_line(reason)),
            };
            let digest = sha256
                .map(|it| format!("  sha256:{it}"))
                .unwrap_or_default();
            show!("{name:<20} {from:<13} {shown}{digest}");
        }
        if session.json {
            show!("{:#}", json!(rows));
        }
        match bad {
            0 => Ok(()),
            bad => Err(Failure::Told(
                Status::Incomplete,
                anyhow!("{bad} providers cannot be used"),
            )),
        }
    }
}
