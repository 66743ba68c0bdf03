//! Which files and devices QEMU has open as images, backing files included, by the names that it opened them by.

use super::monitor::{Monitor, MonitorError};
use serde::Deserialize;
use serde_json::json;
use std::path::PathBuf;

/// Of `BlockDeviceInfo`, in qapi/block-core.json.
#[derive(Deserialize)]
struct Node {
    #[serde(rename = "file", default)]
    filename: String,
}

/// The absolute paths among them.
///
/// # Errors
/// Any [`MonitorError`].
pub async fn open_files(monitor: &Monitor) -> Result<Vec<PathBuf>, MonitorError> {
    let nodes: Vec<Node> = monitor
        .query("query-named-block-nodes", json!({ "flat": true }))
        .await?;
    let names = nodes.into_iter().map(|node| PathBuf::from(node.filename));
    Ok(names.filter(|name| name.is_absolute()).collect())
}
