//! `fleecebox list`.

use super::{Failure, Session, Status, places, text};
use crate::archive::{self, LeftOut, Moment};
use crate::contract::with_causes;
use anyhow::anyhow;
use clap::Args;
use serde_json::json;

/// List the backups in an archive.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fleecebox list --archive /srv/backups")]
pub(super) struct List {
    /// The archive, by name or folder
    #[arg(long, value_name = "NAME|FOLDER")]
    archive: Option<String>,
    /// Only backups of this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
}

impl List {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let archive = places::archive(session, self.archive.as_deref(), false)?;
        let mut rows = Vec::new();
        let mut bad = 0;
        // One that is bad must not hide the others.
        let mut warn = |what: String, error: &archive::Error| {
            bad += 1;
            say!(
                "warning: {}",
                text::one_line(&format!("{what}: {}", with_causes(error)))
            );
        };
        for name in archive.namespaces().map_err(places::failed)? {
            let opened = archive.namespace(&name);
            let opened = opened.and_then(|namespace| Ok((namespace.backups()?, namespace)));
            let (ids, namespace) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    warn(format!("namespace {name}"), &error);
                    continue;
                }
            };
            for id in ids {
                match namespace.manifest(id) {
                    Ok(manifest) if self.vm.as_ref().is_none_or(|vm| *vm == manifest.record.vm) => {
                        rows.push(manifest)
                    }
                    Ok(_) => {}
                    Err(error) => warn(format!("namespace {name}: backup {id}"), &error),
                }
            }
        }
        // Ids tell seconds; two backups of one second have an order all the same.
        rows.sort_by_key(|manifest| (manifest.record.created, manifest.backup));
        if session.json {
            let rows: Vec<_> = rows
                .iter()
                .map(|manifest| {
                    json!({
                        "backup": manifest.backup,
                        "vm": manifest.record.vm,
                        "namespace": manifest.namespace,
                        "provider": manifest.record.provider.name,
                        "created": manifest.record.created,
                        "complete": !manifest.record.is_incomplete(),
                        "moment": manifest.record.moment,
                        "left_out": manifest.record.left_out,
                        "volumes": manifest.record.volumes.iter().map(|volume| json!({
                            "name": volume.name, "size": volume.root.size(), "mode": volume.mode,
                            "dirty_bytes": volume.dirty_bytes, "base": volume.base,
                        })).collect::<Vec<_>>(),
                    })
                })
                .collect();
            show!("{:#}", json!(rows));
            return whole(bad);
        }
        show!("{:<34} {:<16} {:<14} VOLUMES", "BACKUP", "VM", "PROVIDER");
        for manifest in rows {
            let volumes: Vec<String> = manifest
                .record
                .volumes
                .iter()
                .map(|volume| {
                    let kind = if volume.base.is_some() {
                        "incremental"
                    } else {
                        "full"
                    };
                    format!(
                        "{} ({kind}, {} of {})",
                        volume.name,
                        text::size(volume.dirty_bytes),
                        text::size(volume.root.size())
                    )
                })
                .chain(manifest.record.left_out.iter().map(left_out))
                .chain((manifest.record.moment != Moment::One).then(|| "NOT OF ONE MOMENT".into()))
                .collect();
            show!(
                "{:<34} {:<16} {:<14} {}",
                manifest.backup,
                text::one_line(&manifest.record.vm),
                text::one_line(&manifest.record.provider.name),
                text::one_line(&volumes.join(", "))
            );
        }
        whole(bad)
    }
}

/// What is missing has been told of.
fn whole(bad: usize) -> Result<(), Failure> {
    match bad {
        0 => Ok(()),
        bad => Err(Failure::Told(
            Status::Incomplete,
            anyhow!("{bad} namespaces or backups could not be read and are not listed"),
        )),
    }
}

fn left_out(disk: &LeftOut) -> String {
    match disk.excluded {
        true => format!("{} excluded", disk.name),
        false => format!("{} MISSING: {}", disk.name, disk.reason),
    }
}
