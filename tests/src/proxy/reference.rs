//! The truth about a point in time, made by QEMU alone: a second `blockdev-backup`, with
//! `sync=full`, of the same disk in the same transaction.
//!
//! It works for point in time by `blockdev-backup` jobs inside a `transaction`, in the storage
//! daemon and in the emulator. `blockdev-backup` actions come before the bitmaps' actions, and
//! ours go right behind the product's, so their order keeps its meaning.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{Qmp, eventually};

const COPY_LIMIT: Duration = Duration::from_secs(120);
/// Comes before a number in the names of our nodes and jobs, which are the same.
const PREFIX: &str = "reference-";

/// What a disk held at a point in time.
#[derive(Clone, Debug)]
pub struct ReferenceImage {
    /// The disk, as the product named it in its `blockdev-backup`.
    pub device: String,
    /// A raw image of the disk's size; it goes with the proxy.
    pub path: PathBuf,
}

/// A node that waits for its transaction, then the job of the same name.
#[derive(Debug)]
pub(super) struct Prepared {
    name: String,
    image: ReferenceImage,
}

#[derive(Debug)]
pub(super) struct References {
    monitor: PathBuf,
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: u32,
    running: Vec<Prepared>,
    failure: Option<anyhow::Error>,
}

impl References {
    pub(super) fn new(monitor: &Path, folder: &Path) -> Self {
        Self {
            monitor: monitor.into(),
            folder: folder.into(),
            state: Mutex::default(),
        }
    }

    /// Adds a reference for each point-in-time job in `command`. If that is not possible the
    /// command stays as it is and [`References::finish`] says why.
    pub(super) fn add_to(&self, command: &mut Value) -> Vec<Prepared> {
        if command["execute"] != "transaction" {
            return Vec::new();
        }
        let Some(actions) = command["arguments"]["actions"].as_array_mut() else {
            return Vec::new();
        };
        let is_backup = |action: &Value| action["type"] == "blockdev-backup";
        let Some(last_backup) = actions.iter().rposition(is_backup) else {
            return Vec::new();
        };
        let devices: Vec<String> = actions
            .iter()
            .filter(|action| is_backup(action) && action["data"]["sync"] == "none")
            .filter_map(|action| action["data"]["device"].as_str().map(String::from))
            .collect();
        let prepared = match self.prepare(devices) {
            Ok(prepared) => prepared,
            Err(failure) => {
                self.lock().failure = Some(failure);
                return Vec::new();
            }
        };
        let ours = prepared.iter().map(|Prepared { name, image }| {
            json!({"type": "blockdev-backup", "data": {
                "job-id": name, "device": image.device, "target": name, "sync": "full",
                "auto-dismiss": false,
            }})
        });
        let behind = last_backup + 1;
        actions.splice(behind..behind, ours.collect::<Vec<_>>());
        prepared
    }

    /// The transaction was done, or may have been.
    pub(super) fn keep(&self, prepared: Vec<Prepared>) {
        self.lock().running.extend(prepared);
    }

    /// The transaction failed as a whole.
    pub(super) fn give_up(&self, prepared: Vec<Prepared>) {
        if prepared.is_empty() {
            return;
        }
        let removed = Qmp::connect(&self.monitor)
            .map_err(anyhow::Error::from)
            .and_then(|mut qmp| {
                prepared
                    .iter()
                    .try_for_each(|reference| remove_node(&mut qmp, &reference.name))
            });
        if let Err(failure) = removed {
            self.lock().failure = Some(failure);
        }
    }

    pub(super) fn finish(&self) -> Result<Vec<ReferenceImage>> {
        let (running, failure) = {
            let mut state = self.lock();
            (std::mem::take(&mut state.running), state.failure.take())
        };
        if let Some(failure) = failure {
            return Err(failure.context("a reference could not be made"));
        }
        let mut qmp = Qmp::connect(&self.monitor)?;
        let mut images = Vec::new();
        for Prepared { name, image } in running {
            let job = eventually("a reference copy", COPY_LIMIT, || {
                let jobs = qmp.execute("query-jobs", json!({}))?;
                match jobs
                    .as_array()
                    .into_iter()
                    .flatten()
                    .find(|job| job["id"] == name)
                {
                    Some(job) if job["status"] == "concluded" => Ok(Some(Some(job.clone()))),
                    Some(_) => Ok(None),
                    None => Ok(Some(None)),
                }
            })?;
            // No job: the connection broke before QEMU had read the transaction.
            if let Some(job) = &job {
                qmp.execute("job-dismiss", json!({"id": name}))?;
                if let Some(error) = job["error"].as_str() {
                    bail!("the reference copy of {} failed: {error}", image.device);
                }
            }
            remove_node(&mut qmp, &name)?;
            if job.is_some() {
                images.push(image);
            }
        }
        Ok(images)
    }

    fn prepare(&self, devices: Vec<String>) -> Result<Vec<Prepared>> {
        let mut qmp = Qmp::connect(&self.monitor)?;
        devices
            .into_iter()
            .map(|device| self.prepare_one(&mut qmp, device))
            .collect()
    }

    fn prepare_one(&self, qmp: &mut Qmp, device: String) -> Result<Prepared> {
        let size = size_of(qmp, &device)?;
        let number = {
            let mut state = self.lock();
            state.last += 1;
            state.last
        };
        let name = format!("{PREFIX}{number}");
        let path = self.folder.join(format!("{name}-{device}.raw"));
        File::create(&path)?.set_len(size)?;
        let file = json!({"driver": "file", "filename": path});
        let node = json!({"driver": "raw", "node-name": name, "file": file});
        qmp.execute("blockdev-add", node)?;
        Ok(Prepared {
            name,
            image: ReferenceImage { device, path },
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No value here is left half-changed by a panic.
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// `device` is a node's name, or a device's where there are devices.
fn size_of(qmp: &mut Qmp, device: &str) -> Result<u64> {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    let node = nodes
        .as_array()
        .into_iter()
        .flatten()
        .find(|node| node["node-name"] == device);
    if let Some(node) = node {
        return node["image"]["virtual-size"]
            .as_u64()
            .context("a node without a size");
    }
    let devices = qmp.execute("query-block", json!({}))?;
    devices
        .as_array()
        .into_iter()
        .flatten()
        .find(|entry| entry["device"] == device)
        .and_then(|entry| entry["inserted"]["image"]["virtual-size"].as_u64())
        .with_context(|| format!("no node or device {device}"))
}

fn remove_node(qmp: &mut Qmp, name: &str) -> Result<()> {
    qmp.execute("blockdev-del", json!({"node-name": name}))?;
    Ok(())
}
