//! `fleecebox provider install`.

use super::{Failure, Session, installed, places};
use crate::contract::{MAX_COMPONENT, Wasi};
use crate::registry::{self, Reference};
use crate::sandbox::{self, Program};
use anyhow::{Context, anyhow};
use cap_tempfile::TempFile;
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::Path;
use tokio::task::spawn_blocking;

/// Keep a provider's component on this host, to be used by its name.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox provider install ./chunked.wasm
  fleecebox provider install ./chunked.wasm@sha256:0123…cdef --name tenant-a
  fleecebox provider install registry.example/acme/chunked@sha256:0123…cdef

With a digest, only a component with exactly these bytes is installed. For a registry (OCI) it is the manifest's, as \
its tools print it; nothing is fetched from there later. A provider of the same name is replaced; what it \
backed up is restored by the component that its archive keeps.")]
pub(super) struct Install {
    /// The component's file, with its digest where that must be a certain one, or an artefact in a registry
    #[arg(value_name = "FILE[@sha256:DIGEST]|HOST/NAME@sha256:DIGEST")]
    component: String,
    /// What it is called from now on [default: the file's name without .wasm]
    #[arg(long)]
    name: Option<String>,
}

impl Install {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Source {
            shown,
            name,
            bytes,
            digest,
        } = Source::read(session, &self.component).await?;
        let name = self.name.unwrap_or(name);
        installed::check_name(&name)?;
        let cache = places::cache(session)?;
        let compiled = sandbox::compile(&Program::this(), bytes.clone(), &cache)
            .await
            .map_err(|error| Failure::Mistake(anyhow!(error).context(shown.clone())))?;
        let sha256 = hex::encode(compiled.sha256);
        if let Some(digest) = digest.filter(|digest| !digest.eq_ignore_ascii_case(&sha256)) {
            return Err(Failure::Mistake(anyhow!(
                "{shown} is not what was asked for: its digest is sha256:{sha256} and not sha256:{}; nothing is installed",
                digest.escape_debug()
            )));
        }
        let world = crate::contract::world_of(&compiled.interface, &Wasi::ALL.into()).map_err(
            |refusal| {
                let refused = format!("{shown} cannot be used as a provider");
                Failure::Mistake(anyhow!(refusal).context(refused))
            },
        )?;
        let (folder, _) = installed::folder(session)?;
        let file = installed::file(&name);
        let replaced = folder.exists(&file);
        let keep = || -> std::io::Result<()> {
            let mut temporary = TempFile::new(&folder)?;
            temporary.write_all(&bytes)?;
            temporary.as_file().sync_all()?;
            temporary.replace(&file)
        };
        keep()
            .with_context(|| format!("{file} cannot be kept in the state folder"))
            .map_err(Failure::Failed)?;
        if session.json {
            let result = json!({
                "name": name, "sha256": sha256, "size": compiled.size, "world": world, "replaced": replaced,
            });
            show!("{result:#}");
        } else {
            let how = if replaced { "replaced" } else { "installed" };
            show!("{name} is {how}: world {}, sha256:{sha256}", world.name());
        }
        Ok(())
    }
}

/// A component, wherever it came from.
struct Source {
    shown: String,
    /// What it is called unless another name is given.
    name: String,
    bytes: bytes::Bytes,
    /// What its own digest has to be.
    digest: Option<String>,
}

impl Source {
    /// A file of that name comes first; a registry is only asked by digest.
    async fn read(session: &Session, wanted: &str) -> Result<Self, Failure> {
        let (path, digest) = match wanted.rsplit_once("@sha256:") {
            Some((path, digest)) => (Path::new(path), Some(digest.to_owned())),
            None => (Path::new(wanted), None),
        };
        if let (false, Ok(reference)) = (path.exists(), wanted.parse::<Reference>()) {
            return Self::fetch(session, reference).await;
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Self {
            shown: path.display().to_string(),
            name: stem.into_owned(),
            bytes: places::read(path, "component")?.into(),
            digest,
        })
    }

    async fn fetch(session: &Session, reference: Reference) -> Result<Self, Failure> {
        let shown = reference.to_string();
        let name = reference.short_name().to_owned();
        let fetching = spawn_blocking(move || registry::fetch(&reference, MAX_COMPONENT));
        let fetched = tokio::select! {
            fetched = fetching => fetched.map_err(places::failed)?,
            () = session.cancel.cancelled() => return Err(Failure::Cancelled(anyhow!("cancelled"))),
        };
        let bytes = fetched.map_err(|error| match error {
            registry::Error::Unreachable { .. } => {
                Failure::Failed(anyhow!(error).context(shown.clone()))
            }
            error => Failure::Mistake(anyhow!(error).context(shown.clone())),
        })?;
        Ok(Self {
            shown,
            name,
            bytes: bytes.into(),
            digest: None,
        })
    }
}
