//! A point in time without the product, for tests of the harness.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::Qmp;
use serde_json::{Value, json};

const EVENT_LIMIT: Duration = Duration::from_secs(10);

/// A point in time made by hand, with the product's own sequence of commands.
pub(crate) struct PointInTime {
    qmp: Qmp,
    nodes: Vec<String>,
}

impl PointInTime {
    /// `disks` are node names and sizes in bytes; the NBD server must run. Exports `snapshot-NODE`.
    pub(crate) fn take(monitor: &Path, disks: &[(&str, u64)], folder: &Path) -> Result<Self> {
        let mut qmp = Qmp::connect(monitor)?;
        for (node, size) in disks {
            let path = folder.join(format!("fleece-{node}.raw"));
            std::fs::File::create(&path)?.set_len(*size)?;
            let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
            let name = format!("fl-{node}");
            let fleece =
                json!({"driver": "raw", "node-name": name, "discard": "unmap", "file": file});
            qmp.execute("blockdev-add", fleece)?;
        }
        let nodes: Vec<String> = disks.iter().map(|(node, _)| node.to_string()).collect();
        qmp.execute("transaction", json!({"actions": transaction(&nodes)}))?;
        for node in &nodes {
            let snapshot = json!({"driver": "snapshot-access", "node-name": format!("sa-{node}"),
                "file": format!("cbw-{node}"), "discard": "unmap"});
            qmp.execute("blockdev-add", snapshot)?;
            let export = json!({"type": "nbd", "id": format!("exp-{node}"), "writable": true,
                "node-name": format!("sa-{node}"), "name": format!("snapshot-{node}")});
            qmp.execute("block-export-add", export)?;
        }
        Ok(Self { qmp, nodes })
    }

    /// Leaves nothing behind, the bitmaps included.
    pub(crate) fn tear_down(mut self) -> Result<()> {
        let qmp = &mut self.qmp;
        for node in &self.nodes {
            let export = format!("exp-{node}");
            qmp.execute("block-export-del", json!({"id": export, "mode": "hard"}))?;
            qmp.event("BLOCK_EXPORT_DELETED", EVENT_LIMIT, |event| {
                event["data"]["id"] == export
            })?;
            qmp.execute("blockdev-del", json!({"node-name": format!("sa-{node}")}))?;
            let job = format!("job-{node}");
            qmp.execute("block-job-cancel", json!({"device": job}))?;
            qmp.event("BLOCK_JOB_CANCELLED", EVENT_LIMIT, |event| {
                event["data"]["device"] == job
            })?;
            qmp.execute("job-dismiss", json!({"id": job}))?;
            qmp.execute("blockdev-del", json!({"node-name": format!("fl-{node}")}))?;
            let bitmap = json!({"node": node, "name": "S1"});
            qmp.execute("block-dirty-bitmap-remove", bitmap)?;
        }
        Ok(())
    }
}

/// The actions for raw and qcow2 disks alike: jobs first, bitmaps after them.
pub(crate) fn transaction(nodes: &[String]) -> Vec<Value> {
    let backups = nodes.iter().map(|node| {
        json!({"type": "blockdev-backup", "data": {"job-id": format!("job-{node}"),
            "device": node, "target": format!("fl-{node}"), "sync": "none",
            "filter-node-name": format!("cbw-{node}"), "auto-dismiss": false}})
    });
    let bitmaps = nodes.iter().map(
        |node| json!({"type": "block-dirty-bitmap-add", "data": {"node": node, "name": "S1"}}),
    );
    backups.chain(bitmaps).collect()
}

/// libnbd's own tool, which knows nothing of us.
pub(crate) fn nbdcopy(socket: &Path, export: &str, to: &Path) -> Result<()> {
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    let output = Command::new("nbdcopy")
        .arg(uri)
        .arg(to)
        .output()
        .context("cannot run nbdcopy (Debian's package libnbd-bin)")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
