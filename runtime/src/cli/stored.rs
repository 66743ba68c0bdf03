//! The stored backup that a command is for, from its id.

use super::{Failure, Session, target, text};
use crate::archive::{self, Archive, BackupId, Manifest, Namespace, NamespaceName};
use anyhow::anyhow;
use clap::Args;
use std::sync::Arc;

/// Arguments of every command that reads one backup.
#[derive(Debug, Args)]
pub(super) struct Stored {
    /// The backup's id
    backup: String,
    /// The archive, by name or folder
    #[arg(long, value_name = "NAME|FOLDER")]
    archive: Option<String>,
    /// The part of the archive to look in, where several hold a backup of that id [default: all]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
}

/// A namespace that holds the backup.
type Found = (Arc<Namespace>, Arc<Manifest>);

impl Stored {
    /// The committed backup and the part of the archive that holds it.
    ///
    /// An id is random, but folders can be copied: where several hold it, none is chosen by its name.
    pub(super) fn find(&self, session: &Session) -> Result<Found, Failure> {
        let archive = target::archive(session, self.archive.as_deref(), false)?;
        let id: BackupId = self.backup.parse().map_err(|_| {
            Failure::Mistake(anyhow!(
                "'{}' is no backup id; `fleecebox list` shows them",
                self.backup.escape_debug()
            ))
        })?;
        let mut bad = Vec::new();
        let mut found = Vec::new();
        for name in self.namespaces(&archive)? {
            let looked = archive.namespace(&name);
            match looked.map(|namespace| (namespace.manifest(id), namespace)) {
                Ok((Err(archive::Error::NotFound { .. }), _)) => {}
                Ok((manifest, namespace)) => found.push((name, namespace, manifest)),
                Err(error) => bad.push(format!("namespace {name}: {error}")),
            }
        }
        let several: Vec<_> = found.iter().map(|(name, ..)| name.as_str()).collect();
        if several.len() > 1 {
            return Err(Failure::Mistake(anyhow!(
                "several namespaces hold a backup {id} ({}): name one with --namespace",
                several.join(", ")
            )));
        }
        match found.pop() {
            Some((_, namespace, manifest)) => {
                for bad in &bad {
                    say!("warning: {}", text::one_line(bad));
                }
                let manifest = manifest.map_err(|error| {
                    Failure::of(anyhow::Error::from(error).context(format!("backup {id}")))
                })?;
                Ok((Arc::new(namespace), Arc::new(manifest)))
            }
            None if bad.is_empty() => Err(Failure::Mistake(anyhow!(
                "the archive holds no backup {id}; `fleecebox list` shows what it holds"
            ))),
            None => Err(Failure::Unusable(anyhow!(
                "no backup {id} was found, and not all of the archive can be looked into: {}",
                bad.join("; ")
            ))),
        }
    }

    fn namespaces(&self, archive: &Archive) -> Result<Vec<NamespaceName>, Failure> {
        let all = archive.namespaces().map_err(target::failed)?;
        let Some(wanted) = &self.namespace else {
            return Ok(all);
        };
        match all.iter().find(|name| name.as_str() == wanted) {
            Some(name) => Ok(vec![name.clone()]),
            None => {
                let known: Vec<_> = all.iter().map(NamespaceName::as_str).collect();
                Err(Failure::Mistake(anyhow!(
                    "the archive has no namespace '{}' (there is {})",
                    wanted.escape_debug(),
                    known.join(", ")
                )))
            }
        }
    }
}
