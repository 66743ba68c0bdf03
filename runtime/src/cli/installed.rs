//! Providers that were installed: `providers/NAME.wasm` in the state folder.

use super::{Failure, Session, places};
use crate::config::{ConfigError, Provider};
use anyhow::{Context, anyhow};
use cap_std::fs::Dir;
use std::io;
use std::path::PathBuf;

const FOLDER: &str = "providers";
const SUFFIX: &str = ".wasm";

/// The folder, made where it is not there.
pub(super) fn folder(session: &Session) -> Result<(Dir, PathBuf), Failure> {
    places::folder(&session.state.join(FOLDER))
}

/// The file of a provider.
pub(super) fn file(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// Checks a name: it becomes a file's, and by default a namespace's.
pub(super) fn check_name(name: &str) -> Result<(), Failure> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(Failure::Mistake(anyhow!(
            "'{}' cannot name a provider: use 1 to 64 letters, digits, '-', '_' and '.', not '.' first; --name gives another",
            name.escape_debug()
        )));
    }
    Ok(())
}

/// The names of all, in order.
pub(super) fn names(session: &Session) -> Result<Vec<String>, Failure> {
    let path = session.state.join(FOLDER);
    let entries = match std::fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries,
    };
    let mut names = entries
        .and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<Vec<_>>>()
        })
        .with_context(|| format!("the folder {} cannot be read", path.display()))
        .map_err(Failure::Failed)?;
    names.retain_mut(|name| match name.strip_suffix(SUFFIX) {
        Some(stem) if check_name(stem).is_ok() => {
            *name = stem.to_owned();
            true
        }
        _ => false,
    });
    names.sort_unstable();
    Ok(names)
}

/// A provider by its name in the configuration, by that of an installed one, or by its component file.
pub(super) fn provider(session: &Session, wanted: &str) -> Result<(String, Provider), Failure> {
    let found = session.config.provider(wanted);
    match found {
        Ok((name, provider)) if session.config.provider.contains_key(&name) => {
            let installed = session.state.join(FOLDER).join(file(&name));
            let same = || {
                std::fs::canonicalize(&provider.component).ok()
                    == std::fs::canonicalize(&installed).ok()
            };
            if installed.exists() && !same() {
                return Err(Failure::Mistake(anyhow!(
                    "the name '{name}' means two providers: {} of the configuration, and {}, which was installed; name the file of the one that is meant, or remove or rename one",
                    provider.component.display(),
                    installed.display()
                )));
            }
            Ok((name, provider))
        }
        found => {
            let installed = names(session)?;
            if installed.iter().any(|name| name == wanted) {
                let path = session.state.join(FOLDER).join(file(wanted));
                return Ok((wanted.to_owned(), Provider::of(path)));
            }
            match found {
                Err(ConfigError::Unknown { known, .. }) if !installed.is_empty() => {
                    let list = installed.join(", ");
                    Err(Failure::Mistake(anyhow!(
                        "there is no provider named '{}'{known} (installed: {list}); name one of these, or a component file such as ./chunked.wasm",
                        wanted.escape_debug()
                    )))
                }
                found => Ok(found?),
            }
        }
    }
}
