//! A verify: every block of a stored backup is read back and compared with its digest, and every object too.

use super::doubts::{self, Doubt};
use super::means::Means;
use super::read_back::{self, Finding, ReadBack, ReadBackError};
use super::reading::Reading;
use crate::archive::{self, ObjectName};
use crate::contract::with_causes;
use crate::event::Event;
use crate::sandbox::Cache;

/// What a verify came to.
#[derive(Debug)]
pub struct Verified {
    /// What is not as it was backed up.
    pub found: Vec<Found>,
    /// What may be wrong although nothing was found.
    pub doubts: Vec<Doubt>,
}

/// Something that is not as it was backed up.
#[derive(Debug)]
pub enum Found {
    /// In a volume.
    Volume {
        /// Its name.
        name: String,
        /// What.
        finding: Finding,
    },
    /// In an object.
    Object {
        /// Its name.
        name: ObjectName,
        /// What.
        error: archive::Error,
    },
    /// In what the host keeps beside the volumes.
    Kept {
        /// Its name.
        name: ObjectName,
        /// What.
        error: archive::Error,
    },
}

/// Reads all of the backup, whatever is found on the way, and keeps what was found for backups that would build on it.
///
/// # Errors
/// Where not all of it could be looked at; what is wrong with the backup is no error.
pub async fn verify(
    reading: &Reading<'_>,
    cache: &Cache,
    means: Means,
) -> Result<Verified, ReadBackError> {
    let mut found = Vec::new();
    let read = read_all(reading, cache, &means, &mut found).await;
    let by = format!("verify of {}", reading.manifest.backup);
    match reading.namespace.record_checks(&by) {
        Ok(()) => {}
        // Whoever may only read gets what was asked for.
        Err(error) if found.is_empty() => {
            let note = format!("what was found is not recorded: {}", with_causes(&error));
            means.events.note(note);
        }
        Err(error) => {
            let warning = format!("what was found is not recorded: {}", with_causes(&error));
            means.events.warn(warning);
        }
    }
    read?;
    let mut doubts = doubts::of(reading.manifest);
    doubts.retain(|doubt| !doubt.is_settled_by_verify());
    Ok(Verified { found, doubts })
}

async fn read_all(
    reading: &Reading<'_>,
    cache: &Cache,
    means: &Means,
    found: &mut Vec<Found>,
) -> Result<(), ReadBackError> {
    for volume in &reading.manifest.record.volumes {
        means.events.send(Event::Total {
            volume: volume.name.clone(),
            bytes: volume.root.size(),
        });
        let wanted = ReadBack {
            reading,
            volume,
            output: None,
            cache,
            means,
            all_findings: true,
        };
        let findings = read_back::read_back(wanted).await?.into_iter();
        found.extend(findings.map(|finding| Found::Volume {
            name: volume.name.clone(),
            finding,
        }));
    }
    let objects = read_back::check_objects(reading.namespace, reading.manifest, &means.cancel);
    let wrong = objects.await?.into_iter();
    found.extend(wrong.map(|(name, error)| Found::Object { name, error }));
    for kept in &reading.manifest.record.kept {
        if let Err(error) = reading.namespace.kept(reading.manifest.backup, kept) {
            let name = kept.name.clone();
            found.push(Found::Kept { name, error });
        }
    }
    Ok(())
}
