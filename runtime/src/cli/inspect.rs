//! `fleecebox provider inspect`.

use super::{Failure, Session, target};
use crate::sandbox::{self, Program};
use anyhow::anyhow;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Say what a component is, imports and needs, without running any of it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox provider inspect ./chunked.wasm")]
pub(super) struct Inspect {
    /// The component's file
    file: PathBuf,
}

impl Inspect {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let bytes = target::read(&self.file, "component")?;
        let cache = target::cache(session)?;
        let name = self.file.display();
        let compiled = sandbox::compile(&Program::this(), bytes.into(), &cache)
            .await
            .map_err(|error| Failure::Mistake(anyhow!("{name}: {error}")))?;
        let world = sandbox::world_of(&compiled.interface);
        let sha256 = hex::encode(compiled.sha256);
        if session.json {
            let result = json!({
                "file": self.file,
                "sha256": sha256,
                "size": compiled.size,
                "world": world.as_ref().ok(),
                "refused": world.as_ref().err().map(ToString::to_string),
                "imports": compiled.interface.imports,
                "exports": compiled.interface.exports,
            });
            show!("{result:#}");
        } else {
            show!("sha256   {sha256}");
            show!("size     {} bytes", compiled.size);
            if let Ok(world) = &world {
                show!("world    {}", world.name());
            }
            for import in &compiled.interface.imports {
                show!("imports  {}", import.escape_debug());
            }
            for export in &compiled.interface.exports {
                show!("exports  {}", export.escape_debug());
            }
        }
        match world {
            Ok(_) => Ok(()),
            Err(refusal) => Err(Failure::Mistake(anyhow!(
                "{name} cannot be used as a provider: {refusal}"
            ))),
        }
    }
}
