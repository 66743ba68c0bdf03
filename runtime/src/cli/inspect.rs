//! `fleecebox provider inspect`.

use super::{Failure, Session, installed, places};
use crate::contract::{Wasi, World, with_causes};
use crate::sandbox::{self, Program};
use anyhow::anyhow;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Say what a component is, imports and needs, without running any of it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox provider inspect ./chunked.wasm")]
pub(super) struct Inspect {
    /// The component's file, or the name of a provider that is installed or configured
    #[arg(value_name = "NAME|FILE")]
    provider: String,
}

impl Inspect {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let file = match Path::new(&self.provider).is_file() {
            true => PathBuf::from(&self.provider),
            false => installed::provider(session, &self.provider)?.1.component,
        };
        let bytes = places::read(&file, "component")?;
        let cache = places::cache(session)?;
        let name = file.display().to_string();
        let compiled = sandbox::compile(&Program::this(), bytes.into(), &cache)
            .await
            .map_err(|error| Failure::Mistake(anyhow!(error).context(name.clone())))?;
        let world = crate::contract::world_of(&compiled.interface, &Wasi::ALL.into());
        let wasi = crate::contract::wasi_of(&compiled.interface);
        let sha256 = hex::encode(compiled.sha256);
        if session.json {
            let result = json!({
                "file": file,
                "sha256": sha256,
                "size": compiled.size,
                "world": world.as_ref().ok(),
                "refused": world.as_ref().err().map(|it| with_causes(it)),
                "needs": world.as_ref().ok().map(|&world| needs(world)),
                "wasi": wasi,
                "imports": compiled.interface.imports,
                "exports": compiled.interface.exports,
            });
            show!("{result:#}");
        } else {
            show!("sha256   {sha256}");
            show!("size     {} bytes", compiled.size);
            if let Ok(world) = &world {
                show!("world    {}", world.name());
                show!("needs    {}", needs(*world));
                for part in &wasi {
                    show!(
                        "needs    the part of WASI that is named `{}` to be granted",
                        part.name()
                    );
                }
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
            Err(refusal) => Err(Failure::Mistake(
                anyhow!(refusal).context(format!("{name} cannot be used as a provider")),
            )),
        }
    }
}

/// What its world alone tells; what it does with that is for `fleecebox provider test` to find out.
fn needs(world: World) -> &'static str {
    match world {
        World::Provider => {
            "to see the disk's bytes, where `read` is granted; its component gives back what it claimed"
        }
        World::BlindProvider => "no byte of any disk: the host restores what it arranged",
    }
}
