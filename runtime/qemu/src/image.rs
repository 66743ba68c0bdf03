//! What a disk is made of: its image, and the images that this one builds on.
//!
//! A bitmap knows what was written through its own node. What a guest reads comes from the whole chain, so whoever
//! believes a bitmap has to know which images are in it, and whether they are still those of the last backup.

use super::identity::{self, Identity};
use super::machine::{self, Bitmap, Disk};
use super::monitor::{Monitor, MonitorError};
use super::present::{self, Graph, Node};
use std::collections::BTreeMap;

/// Drivers of nodes that hold no data of their own: they show what is below them.
const FILTERS: [&str; 9] = [
    "blkdebug",
    "blklogwrites",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "throttle",
];

/// Most images in a chain that are looked at. QEMU itself copes with a few hundred.
const DEEPEST: usize = 1000;

/// One image of a chain, as QEMU shows it and as far as this host can see its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The driver of its node, such as `qcow2`.
    pub format: String,
    /// Its file as QEMU names it: a path as QEMU sees it, a URI, or `json:{…}`.
    pub name: String,
    /// In bytes, as the guest sees it.
    pub size: u64,
    /// Its file.
    pub identity: Identity,
    /// Where its bytes are, if they are not in its own file.
    pub data_file: Option<DataFile>,
}

/// A file that holds an image's bytes beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// As QEMU names it.
    pub name: String,
    /// The file.
    pub identity: Identity,
    /// Whether it is the disk itself, byte for byte, as who writes it by other means than QEMU sees it.
    pub raw: bool,
}

impl Image {
    /// What its node alone tells.
    pub(super) fn of(node: &Node) -> Self {
        Self {
            format: node.driver.clone(),
            name: node.filename.clone(),
            size: node.image.virtual_size,
            identity: Identity::Unknown,
            data_file: None,
        }
    }
}

/// An image below another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its block node.
    pub node: String,
    /// The image.
    pub image: Image,
    /// All named bitmaps on the node.
    pub bitmaps: Vec<Bitmap>,
}

impl Layer {
    /// The bitmap of that name.
    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }
}

/// Tells of each disk what it is made of, and whether others may write to it.
///
/// # Errors
/// Those of [`Monitor::query`].
pub async fn describe(monitor: &Monitor, disks: &mut [Disk]) -> Result<(), MonitorError> {
    let graph = present::graph(monitor).await?;
    // After the graph, so that a node that is gone from one of the two shows.
    let nodes = present::nodes(monitor).await?;
    let files = nodes.iter().filter(|node| is_file(node));
    let names = files.map(|file| file.filename.clone()).collect();
    let chains = Chains {
        graph: &graph,
        nodes: &nodes,
        files: &identity::identities(monitor, names).await,
    };
    let devices = present::devices(monitor).await?;
    for disk in disks {
        let mut layers = chains.below(&disk.node).into_iter();
        if let Some(active) = layers.next() {
            disk.image = active.image;
        }
        disk.below = layers.collect();
        for device in &devices {
            let inserted = device.inserted.as_ref().map(|node| &*node.name);
            let Some((qdev, node)) = device.qdev.as_deref().zip(inserted) else {
                continue;
            };
            if chains.unfiltered(node) == chains.unfiltered(&disk.node) {
                disk.shared |= machine::is_shared(monitor, qdev).await?;
            }
        }
    }
    Ok(())
}

fn is_file(node: &Node) -> bool {
    ["file", "host_device"].contains(&&*node.driver)
}

struct Chains<'a> {
    graph: &'a Graph,
    nodes: &'a [Node],
    files: &'a BTreeMap<String, Identity>,
}

impl<'a> Chains<'a> {
    /// The image of `node`, then each one below it.
    fn below(&self, node: &str) -> Vec<Layer> {
        let mut layers = Vec::new();
        let mut next = Some(self.unfiltered(node));
        while let Some(node) = next.and_then(|name| self.node(name)) {
            layers.push(Layer {
                node: node.name.clone(),
                image: self.image(node),
                bitmaps: machine::bitmaps(node),
            });
            next = self.graph.child(&node.name, "backing");
            next = next.map(|below| self.unfiltered(below));
            if layers.len() == DEEPEST {
                break;
            }
        }
        layers
    }

    fn node(&self, name: &str) -> Option<&'a Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The node that a filter shows, or `name` itself.
    fn unfiltered<'n>(&self, mut name: &'n str) -> &'n str
    where
        'a: 'n,
    {
        for _ in 0..DEEPEST {
            let is_filter = |node: &Node| FILTERS.contains(&&*node.driver);
            let shown = (self.node(name).is_some_and(is_filter))
                .then(|| {
                    let child = |edge| self.graph.child(name, edge);
                    child("file").or_else(|| child("backing"))
                })
                .flatten();
            match shown {
                Some(shown) => name = shown,
                None => break,
            }
        }
        name
    }

    fn image(&self, node: &Node) -> Image {
        let file = self.protocol(node);
        let data_file = self.graph.child(&node.name, "data-file");
        let data_file = data_file.and_then(|child| self.node(child)).map(|child| {
            let data = self.protocol(child);
            DataFile {
                name: data.filename.clone(),
                identity: self.identity(data),
                raw: node.image.format_specific["data"]["data-file-raw"] == true,
            }
        });
        Image {
            name: file.filename.clone(),
            identity: self.identity(file),
            data_file,
            ..Image::of(node)
        }
    }

    fn identity(&self, file: &Node) -> Identity {
        match is_file(file) {
            true => self
                .files
                .get(&file.filename)
                .cloned()
                .unwrap_or(Identity::Unknown),
            false => Identity::Unseen,
        }
    }

    /// Where the bytes of `node` are at last: of a file, a device, a connection.
    fn protocol(&self, node: &'a Node) -> &'a Node {
        let mut file = node;
        for _ in 0..DEEPEST {
            let below = self.graph.child(&file.name, "file");
            match below.and_then(|below| self.node(below)) {
                Some(below) => file = below,
                None => break,
            }
        }
        file
    }
}
