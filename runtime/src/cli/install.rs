//! `fleecebox provider install`.

use super::{Failure, Session, installed, target};
use crate::sandbox::{self, Program};
use anyhow::{Context, anyhow};
use cap_tempfile::TempFile;
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// Keep a provider's component on this host, to be used by its name.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox provider install ./chunked.wasm
  fleecebox provider install ./chunked.wasm@sha256:0123…cdef --name tenant-a

With a digest, only a component with exactly these bytes is installed. A provider of the same name is replaced; what it \
backed up is restored by the component that its archive keeps.")]
pub(super) struct Install {
    /// The component's file, and its digest where that must be a certain one
    #[arg(value_name = "FILE[@sha256:DIGEST]")]
    component: String,
    /// What it is called from now on [default: the file's name without .wasm]
    #[arg(long)]
    name: Option<String>,
}

impl Install {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let (path, digest) = match self.component.rsplit_once("@sha256:") {
            Some((path, digest)) => (Path::new(path), Some(digest)),
            None => (Path::new(&self.component), None),
        };
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = self.name.unwrap_or_else(|| stem.into_owned());
        installed::check_name(&name)?;
        let bytes = bytes::Bytes::from(target::read(path, "component")?);
        let cache = target::cache(session)?;
        let shown = path.display();
        let compiled = sandbox::compile(&Program::this(), bytes.clone(), &cache)
            .await
            .map_err(|error| Failure::Mistake(anyhow!("{shown}: {error}")))?;
        let sha256 = hex::encode(compiled.sha256);
        if let Some(digest) = digest.filter(|digest| !digest.eq_ignore_ascii_case(&sha256)) {
            return Err(Failure::Mistake(anyhow!(
                "{shown} is not what was asked for: its digest is sha256:{sha256} and not sha256:{}; nothing is installed",
                digest.escape_debug()
            )));
        }
        let world = sandbox::world_of(&compiled.interface).map_err(|refusal| {
            Failure::Mistake(anyhow!("{shown} cannot be used as a provider: {refusal}"))
        })?;
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
