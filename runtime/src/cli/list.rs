//! `fleecebox list`.

use super::{Failure, Session, target, text};
use crate::archive::{LeftOut, Moment};
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
        let archive = target::archive(session, self.archive.as_deref(), false)?;
        let mut rows = Vec::new();
        for name in archive.namespaces().map_err(target::failed)? {
            let namespace = archive.namespace(&name).map_err(target::failed)?;
            for id in namespace.backups().map_err(target::failed)? {
                // One damaged manifest must not hide the others.
                match namespace.manifest(id) {
                    Ok(manifest) if self.vm.as_ref().is_none_or(|vm| *vm == manifest.record.vm) => {
                        rows.push(manifest)
                    }
                    Ok(_) => {}
                    Err(error) => say!("warning: backup {id}: {error}"),
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
            return Ok(());
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
                manifest.record.vm,
                manifest.record.provider.name,
                volumes.join(", ")
            );
        }
        Ok(())
    }
}

fn left_out(disk: &LeftOut) -> String {
    match disk.excluded {
        true => format!("{} excluded", disk.name),
        false => format!("{} MISSING: {}", disk.name, disk.reason),
    }
}
