//! A stored backup, found by its id.

use crate::archive::{self, Archive, BackupId, Manifest, Namespace, NamespaceName};
use crate::contract::with_causes;
use std::sync::Arc;

/// A backup, and the part of the archive that holds it.
pub struct StoredBackup {
    /// That part.
    pub namespace: Arc<Namespace>,
    /// The backup.
    pub manifest: Arc<Manifest>,
    /// Parts that cannot be looked into, and why.
    pub unseen: Vec<String>,
}

/// Why there is no such backup.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The archive has no such part.
    #[error(
        "the archive has no namespace '{}' (there is {})",
        wanted.escape_debug(),
        known.join(", ")
    )]
    NoNamespace {
        /// As it was named.
        wanted: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// More than one part holds it.
    #[error(
        "several namespaces hold a backup {backup} ({}): name one with --namespace",
        namespaces.join(", ")
    )]
    Several {
        /// The id.
        backup: BackupId,
        /// Those that hold it.
        namespaces: Vec<String>,
    },
    /// No part holds it.
    #[error("the archive holds no backup {backup}; `fleecebox list` shows what it holds")]
    NotHeld {
        /// The id.
        backup: BackupId,
    },
    /// None that can be looked into holds it.
    #[error(
        "no backup {backup} was found, and not all of the archive can be looked into: {}",
        unseen.join("; ")
    )]
    NotSeen {
        /// The id.
        backup: BackupId,
        /// Parts that cannot be looked into, and why.
        unseen: Vec<String>,
    },
    /// It is there and cannot be read.
    #[error("backup {backup}")]
    Unreadable {
        /// The id.
        backup: BackupId,
        /// Why.
        source: archive::Error,
    },
    /// The archive does not say what it has.
    #[error(transparent)]
    Archive(#[from] archive::Error),
}

/// The committed backup `id` in `wanted`, or in any part of the archive.
///
/// An id is random, but folders can be copied: where several hold it, none is chosen by its name.
///
/// # Errors
/// Any [`FindError`].
pub fn find(
    archive: &Archive,
    id: BackupId,
    wanted: Option<&str>,
) -> Result<StoredBackup, FindError> {
    let mut unseen = Vec::new();
    let mut found = Vec::new();
    for name in namespaces(archive, wanted)? {
        let looked = archive.namespace(&name);
        match looked.map(|namespace| (namespace.manifest(id), namespace)) {
            Ok((Err(archive::Error::NotFound { .. }), _)) => {}
            Ok((manifest, namespace)) => found.push((name, namespace, manifest)),
            Err(error) => unseen.push(format!("namespace {name}: {}", with_causes(&error))),
        }
    }
    if found.len() > 1 {
        let names = found.iter().map(|(name, ..)| name.to_string());
        return Err(FindError::Several {
            backup: id,
            namespaces: names.collect(),
        });
    }
    match found.pop() {
        Some((_, namespace, manifest)) => Ok(StoredBackup {
            namespace: Arc::new(namespace),
            manifest: Arc::new(
                manifest.map_err(|source| FindError::Unreadable { backup: id, source })?,
            ),
            unseen,
        }),
        None if unseen.is_empty() => Err(FindError::NotHeld { backup: id }),
        None => Err(FindError::NotSeen { backup: id, unseen }),
    }
}

fn namespaces(archive: &Archive, wanted: Option<&str>) -> Result<Vec<NamespaceName>, FindError> {
    let all = archive.namespaces()?;
    let Some(wanted) = wanted else {
        return Ok(all);
    };
    match all.iter().find(|name| name.as_str() == wanted) {
        Some(name) => Ok(vec![name.clone()]),
        None => Err(FindError::NoNamespace {
            wanted: wanted.to_owned(),
            known: all.iter().map(ToString::to_string).collect(),
        }),
    }
}
