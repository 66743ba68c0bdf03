//! What exists inside QEMU at this moment: block nodes, jobs, exports. Fields and enum values that
//! are not needed stay unread, so that those of other versions do no harm.

use super::machine::qdev_id;
use super::monitor::{Monitor, MonitorError};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeSet;

/// `BlockDeviceInfo` of qapi/block-core.json.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Node {
    #[serde(rename = "node-name", default)]
    pub(super) name: String,
    #[serde(rename = "drv")]
    pub(super) driver: String,
    #[serde(rename = "file", default)]
    pub(super) filename: String,
    #[serde(rename = "ro", default)]
    pub(super) read_only: bool,
    /// From QEMU 10.0 on.
    #[serde(default)]
    pub(super) active: Option<bool>,
    pub(super) image: Image,
    #[serde(rename = "dirty-bitmaps", default)]
    pub(super) bitmaps: Vec<DirtyInfo>,
}

/// `ImageInfo`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Image {
    #[serde(rename = "virtual-size")]
    pub(super) virtual_size: u64,
    /// What its file takes up; block devices and network storage have none.
    #[serde(rename = "actual-size", default)]
    pub(super) actual_size: u64,
    #[serde(rename = "backing-filename", default)]
    pub(super) backing: Option<String>,
    /// Differs from driver to driver.
    #[serde(rename = "format-specific", default)]
    pub(super) format_specific: serde_json::Value,
}

/// `BlockDirtyInfo`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct DirtyInfo {
    /// QEMU's own bitmaps, such as a mirror's, have none.
    #[serde(default)]
    pub(super) name: String,
    /// Dirty bytes.
    pub(super) count: u64,
    pub(super) granularity: u32,
    pub(super) recording: bool,
    pub(super) busy: bool,
    #[serde(default)]
    pub(super) persistent: bool,
    #[serde(default)]
    pub(super) inconsistent: bool,
}

/// `BlockInfo`: one device and what is plugged into it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Device {
    /// The drive's id, empty with `-blockdev`.
    #[serde(rename = "device", default)]
    pub(super) drive: String,
    /// The id of the device in QEMU's tree, or its path there.
    #[serde(default)]
    pub(super) qdev: Option<String>,
    #[serde(default)]
    pub(super) inserted: Option<Node>,
    /// What whoever manages the VM calls the disk, such as `vda`. QEMU does not know it.
    #[serde(skip)]
    pub(super) target: Option<String>,
}

impl Device {
    /// The id that its user gave it.
    pub(super) fn id(&self) -> Option<&str> {
        self.qdev.as_deref().and_then(qdev_id)
    }
}

/// `JobInfo`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) status: String,
    #[serde(default)]
    pub(super) error: Option<String>,
}

/// `BlockJobInfo`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct BlockJob {
    #[serde(rename = "device")]
    pub(super) id: String,
    #[serde(rename = "io-status", default)]
    pub(super) io_status: String,
}

/// `BlockExportInfo`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Export {
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(rename = "node-name", default)]
    pub(super) node: String,
    #[serde(rename = "shutting-down", default)]
    pub(super) shutting_down: bool,
}

/// Bytes that the image of node `name` holds at most, where QEMU knows: nothing below it holds more.
pub(super) async fn held(monitor: &Monitor, name: &str) -> Result<Option<u64>, MonitorError> {
    let nodes = nodes(monitor).await?;
    let image = nodes.into_iter().find(|node| node.name == name);
    let image = image.map(|node| node.image);
    let known = image.filter(|image| image.actual_size > 0 && image.backing.is_none());
    Ok(known.map(|image| image.actual_size))
}

/// Every named node, without its backing chain repeated inside it.
pub(super) async fn nodes(monitor: &Monitor) -> Result<Vec<Node>, MonitorError> {
    monitor
        .query("query-named-block-nodes", json!({ "flat": true }))
        .await
}

/// Whether there are iothreads, whatever uses them. The storage daemon of QEMU 7.2 has no `/objects` as long as
/// there is no object.
pub(super) async fn has_iothreads(monitor: &Monitor) -> Result<bool, MonitorError> {
    #[derive(Deserialize)]
    struct Property {
        #[serde(rename = "type")]
        kind: String,
    }
    let objects = json!({ "path": "/objects" });
    let objects: Vec<Property> = match monitor.query("qom-list", objects).await {
        Err(error) if error.is_not_found() => return Ok(false),
        listed => listed?,
    };
    Ok(objects
        .iter()
        .any(|object| object.kind == "child<iothread>"))
}

/// The node below the filter `name`.
pub(super) async fn filtered(monitor: &Monitor, name: &str) -> Result<String, MonitorError> {
    let below = graph(monitor).await?.child(name, "file").map(str::to_owned);
    let missing = || serde::de::Error::custom(format!("it has no node below {name}"));
    below.ok_or_else(|| MonitorError::Answer {
        command: GRAPH.into(),
        source: missing(),
    })
}

const GRAPH: &str = "x-debug-query-block-graph";

/// How nodes, devices and jobs hang together: no other command names the children of a node.
pub(super) async fn graph(monitor: &Monitor) -> Result<Graph, MonitorError> {
    monitor.query(GRAPH, json!({})).await
}

impl Graph {
    fn id(&self, name: &str) -> Option<u64> {
        let nodes = &mut self.nodes.iter();
        nodes
            .find(|node| node.kind == BLOCK_DRIVER && node.name == name)
            .map(|node| node.id)
    }

    /// The child of the node `name` by this edge, such as `file` or `backing`.
    pub(super) fn child(&self, name: &str, edge: &str) -> Option<&str> {
        let parent = self.id(name)?;
        let mut edges = self.edges.iter();
        let child = edges
            .find(|found| found.parent == parent && found.name == edge)?
            .child;
        let child = self.nodes.iter().find(|node| node.id == child)?;
        Some(&child.name)
    }

    /// Whether the node `name` is a part of the node `top`, however deep.
    pub(super) fn is_below(&self, name: &str, top: &str) -> bool {
        self.below(top).contains(name)
    }

    /// The names of all parts of the node `top`.
    pub(super) fn below(&self, top: &str) -> BTreeSet<String> {
        let mut next = Vec::from_iter(self.id(top));
        let mut seen = BTreeSet::new();
        while let Some(parent) = next.pop() {
            let edges = self.edges.iter().filter(|edge| edge.parent == parent);
            for child in edges.map(|edge| edge.child) {
                if seen.insert(child) {
                    next.push(child);
                }
            }
        }
        let nodes = self.nodes.iter().filter(|node| seen.contains(&node.id));
        nodes.map(|node| node.name.clone()).collect()
    }

    /// The names of the nodes, and the devices and exports, that the node `name` is a direct part of by an edge called
    /// `edge`, where that matters; jobs do not count.
    pub(super) fn users(&self, name: &str, edge: Option<&str>) -> Vec<&str> {
        const JOB: &str = "block-job";
        let Some(id) = self.id(name) else {
            return Vec::new();
        };
        let above = self
            .edges
            .iter()
            .filter(|it| it.child == id && edge.is_none_or(|edge| it.name == edge));
        let users = above.filter_map(|edge| self.nodes.iter().find(|node| node.id == edge.parent));
        let users = users.filter(|node| node.kind != JOB);
        users.map(|node| node.name.as_str()).collect()
    }

    /// Whether there is the node `name`, and neither a node nor a device, an export or a job has it.
    pub(super) fn is_unused(&self, name: &str) -> bool {
        let id = self.id(name);
        id.is_some_and(|id| !self.edges.iter().any(|edge| edge.child == id))
    }

    /// Whether the node `name` is a part of no other node.
    pub(super) fn is_top(&self, name: &str) -> bool {
        let Some(id) = self.id(name) else {
            return false;
        };
        let parents = self.edges.iter().filter(|edge| edge.child == id);
        let is_node = |id| {
            let node = self.nodes.iter().find(|node| node.id == id);
            node.is_some_and(|node| node.kind == BLOCK_DRIVER)
        };
        !parents.map(|edge| edge.parent).any(is_node)
    }
}

/// The kind of what is a block node, in [`Graph`].
const BLOCK_DRIVER: &str = "block-driver";

/// `XDbgBlockGraph`.
#[derive(Debug, Deserialize)]
pub(super) struct Graph {
    nodes: Vec<GraphNode>,
    edges: Vec<GraphEdge>,
}

#[derive(Debug, Deserialize)]
struct GraphNode {
    id: u64,
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
struct GraphEdge {
    parent: u64,
    child: u64,
    name: String,
}

pub(super) async fn devices(monitor: &Monitor) -> Result<Vec<Device>, MonitorError> {
    match monitor.query("query-block", json!({})).await {
        Err(e) if e.is_unknown_command() => Ok(Vec::new()),
        result => result,
    }
}

pub(super) async fn jobs(monitor: &Monitor) -> Result<Vec<Job>, MonitorError> {
    monitor.query("query-jobs", json!({})).await
}

pub(super) async fn block_jobs(monitor: &Monitor) -> Result<Vec<BlockJob>, MonitorError> {
    monitor.query("query-block-jobs", json!({})).await
}

pub(super) async fn exports(monitor: &Monitor) -> Result<Vec<Export>, MonitorError> {
    monitor.query("query-block-exports", json!({})).await
}
