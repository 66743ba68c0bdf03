//! `fleecebox provider new`.

use super::{Failure, Session};
use crate::templates::{self, Language, ProjectName};
use anyhow::{Context, anyhow};
use clap::Args;
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Write a project that builds, and passes `fleecebox provider test`, at once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox provider new mirror --lang rust --blind
  fleecebox provider new catalog --lang python

Its README.md says how to build and try it. A blind provider never sees a byte of a disk; the host restores what it \
arranged. Choose it unless the provider has to look into the bytes.")]
pub(super) struct New {
    /// The project's name, and its folder's
    name: String,
    /// What it is written in
    #[arg(long, value_enum, default_value = "rust")]
    lang: Language,
    /// One that never sees a byte
    #[arg(long)]
    blind: bool,
}

impl New {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let name: ProjectName = self
            .name
            .parse()
            .map_err(|error: templates::NotAProjectName| Failure::Mistake(error.into()))?;
        let folder = Path::new(name.as_str());
        if folder.symlink_metadata().is_ok() {
            return Err(is_there(folder));
        }
        // It appears whole: a half-made one would look like a project.
        let making = tempfile::Builder::new()
            .prefix(".fleecebox-new-")
            .permissions(fs::Permissions::from_mode(0o777))
            .tempdir_in(".")
            .with_context(|| format!("the folder {} cannot be made", folder.display()))
            .map_err(Failure::Mistake)?;
        let files = templates::project(self.lang, &name, self.blind);
        for file in &files {
            write(&making.path().join(file.path), file)
                .with_context(|| format!("{} cannot be written", folder.join(file.path).display()))
                .map_err(Failure::Failed)?;
        }
        match fs::rename(making.path(), folder) {
            Ok(()) => drop(making.keep()),
            Err(_) if folder.exists() => return Err(is_there(folder)),
            renamed => renamed
                .with_context(|| format!("the folder {} cannot be made", folder.display()))
                .map_err(Failure::Mistake)?,
        }
        if session.json {
            let paths: Vec<_> = files.iter().map(|file| folder.join(file.path)).collect();
            show!("{:#}", json!({ "folder": folder, "files": paths }));
        } else {
            show!(
                "{} is written; its README.md says how to go on",
                folder.display()
            );
        }
        Ok(())
    }
}

fn is_there(folder: &Path) -> Failure {
    Failure::Mistake(anyhow!(
        "the folder {} is there already; choose another name or remove it",
        folder.display()
    ))
}

fn write(path: &Path, file: &templates::File) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, &file.bytes)?;
    if file.executable {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
