//! What administrators and their tools do to the images beneath a backup: snapshots, commits, pulls, mirrors, reverts,
//! copies that are put back, bitmaps that are cleared.

use crate::world::World;
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Qmp, eventually};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A block job over a few MiB, on a busy machine.
const JOB: Duration = Duration::from_secs(120);

/// The one block job of a step.
const JOB_ID: &str = "administrator";

/// One disk's images.
#[derive(Debug)]
pub(crate) struct Images {
    /// The disk, which is also what its node is called whenever QEMU starts.
    pub(crate) disk: String,
    /// Where it lies among the daemon's disks.
    number: usize,
    /// Nodes that this QEMU has by name, the active one last.
    nodes: Vec<String>,
    /// Image files that lie below the active one, the nearest last.
    below: Vec<PathBuf>,
    /// A copy of the active image, made while no QEMU ran.
    copy: Option<PathBuf>,
}

impl Images {
    pub(crate) fn new(disk: &str, number: usize) -> Self {
        Self {
            disk: disk.into(),
            number,
            nodes: vec![disk.into()],
            below: Vec::new(),
            copy: None,
        }
    }

    /// The node that the disk's users are on.
    pub(crate) fn active(&self) -> &str {
        self.nodes.last().map_or(&self.disk, |node| node)
    }

    pub(crate) fn daemon_disk(&self) -> usize {
        self.number
    }

    /// QEMU started anew: it knows the active image by the disk's name, and those below by none.
    pub(crate) fn restarted(&mut self) {
        self.nodes = vec![self.disk.clone()];
    }
}

/// What is done to one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Change {
    /// An external snapshot; with the bitmaps' names on the overlay as libvirt does it, or without.
    Snapshot,
    /// The active image is committed into the one below.
    Commit,
    /// All that lies below is pulled into the active image.
    Pull,
    /// The disk moves to another image.
    Mirror,
    /// The active image is thrown away while QEMU is off, and the one below used again.
    Revert,
    /// The image is copied while QEMU is off, or an older copy is put back.
    PutBack,
    /// Somebody clears a bitmap of ours.
    Clear,
}

impl World {
    /// Does it to a random disk that can have it; else a snapshot, which each can.
    pub(crate) fn change_images(&mut self, change: Change) -> Result<()> {
        self.settle_litter()?;
        let number = self.random_images();
        let images = &self.images()[number];
        let change = match change {
            Change::Commit if images.nodes.len() < 2 => Change::Snapshot,
            Change::Pull | Change::Revert if images.below.is_empty() => Change::Snapshot,
            change => change,
        };
        match change {
            Change::Snapshot => self.snapshot(number),
            Change::Commit => self.commit(number),
            Change::Pull => self.pull(number),
            Change::Mirror => self.mirror(number),
            Change::Revert => self.revert(number),
            Change::PutBack => self.put_back(number),
            Change::Clear => self.clear(number),
        }
        .with_context(|| format!("{change:?} of {}", self.images()[number].disk))?;
        self.look_again()
    }

    fn snapshot(&mut self, number: usize) -> Result<()> {
        let mut qmp = self.daemon().control()?;
        let node = self.images()[number].active().to_owned();
        let present = node_info(&mut qmp, &node)?;
        let below = self.active_file(number);
        let (overlay, file) = self.new_image(number);
        let size = present["image"]["virtual-size"].to_string();
        create(&file, &size, Some(&below))?;
        let mut blockdev = blockdev(&overlay, &file);
        blockdev["backing"] = Value::Null;
        qmp.execute("blockdev-add", blockdev)?;
        let mut actions = Vec::new();
        if self.random().below(3) > 0 {
            actions.extend(own_bitmaps(&present).into_iter().filter(|bitmap| bitmap["recording"] == true).map(|bitmap| {
                json!({"type": "block-dirty-bitmap-add", "data": {
                    "node": overlay, "name": bitmap["name"], "persistent": true, "granularity": bitmap["granularity"],
                }})
            }));
        }
        actions
            .push(json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}));
        qmp.execute("transaction", json!({"actions": actions}))?;
        let images = self.images_mut(number);
        images.nodes.push(overlay);
        images.below.push(below);
        self.set_active_file(number, file);
        Ok(())
    }

    fn commit(&mut self, number: usize) -> Result<()> {
        let mut qmp = self.daemon().control()?;
        let images = self.images_mut(number);
        let top = images.nodes.pop().context("no active node")?;
        let base = images.active().to_owned();
        let file = images.below.pop().context("no image below")?;
        qmp.execute(
            "block-commit",
            json!({"job-id": JOB_ID, "device": top, "base-node": base}),
        )?;
        complete(&mut qmp)?;
        qmp.execute("blockdev-del", json!({"node-name": top}))?;
        self.set_active_file(number, file);
        Ok(())
    }

    fn pull(&mut self, number: usize) -> Result<()> {
        let mut qmp = self.daemon().control()?;
        let images = self.images_mut(number);
        images.below.clear();
        let top = images.nodes.pop().context("no active node")?;
        let named = std::mem::replace(&mut images.nodes, vec![top.clone()]);
        qmp.execute("block-stream", json!({"job-id": JOB_ID, "device": top}))?;
        ended(&mut qmp)?;
        for node in named.iter().rev() {
            qmp.execute("blockdev-del", json!({"node-name": node}))?;
        }
        Ok(())
    }

    fn mirror(&mut self, number: usize) -> Result<()> {
        let mut qmp = self.daemon().control()?;
        let source = self.images()[number].active().to_owned();
        let present = node_info(&mut qmp, &source)?;
        let (target, file) = self.new_image(number);
        create(&file, &present["image"]["virtual-size"].to_string(), None)?;
        qmp.execute("blockdev-add", blockdev(&target, &file))?;
        qmp.execute(
            "blockdev-mirror",
            json!({"job-id": JOB_ID, "device": source, "target": target, "sync": "full"}),
        )?;
        complete(&mut qmp)?;
        let images = self.images_mut(number);
        images.below.clear();
        for node in std::mem::replace(&mut images.nodes, vec![target])
            .iter()
            .rev()
        {
            qmp.execute("blockdev-del", json!({"node-name": node}))?;
        }
        self.set_active_file(number, file);
        Ok(())
    }

    fn revert(&mut self, number: usize) -> Result<()> {
        self.while_off(|world| {
            let file = world.images_mut(number).below.pop();
            world.set_active_file(number, file.context("no image below")?);
            Ok(())
        })
    }

    fn put_back(&mut self, number: usize) -> Result<()> {
        let in_place = self.random().below(2) == 0;
        self.while_off(|world| {
            let file = world.active_file(number);
            match world.images_mut(number).copy.take() {
                // It holds what this image, or one before it, held then; as a disk it is sound either way.
                Some(copy) if in_place => {
                    fs::copy(&copy, &file)?;
                    fs::remove_file(copy)?;
                }
                Some(copy) => fs::rename(copy, &file)?,
                None if world.images()[number].below.is_empty() => {
                    let copy = file.with_extension("copy");
                    fs::copy(&file, &copy)?;
                    world.images_mut(number).copy = Some(copy);
                }
                None => {}
            }
            Ok(())
        })
    }

    fn clear(&mut self, number: usize) -> Result<()> {
        let mut qmp = self.daemon().control()?;
        let node = self.images()[number].active().to_owned();
        let bitmaps = own_bitmaps(&node_info(&mut qmp, &node)?);
        if bitmaps.is_empty() {
            return Ok(());
        }
        let chosen = self.random().below(bitmaps.len() as u64) as usize;
        if bitmaps[chosen]["inconsistent"] != true {
            let name = &bitmaps[chosen]["name"];
            qmp.execute(
                "block-dirty-bitmap-clear",
                json!({"node": node, "name": name}),
            )?;
        }
        Ok(())
    }
}

fn node_info(qmp: &mut Qmp, node: &str) -> Result<Value> {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    let mut nodes = nodes.as_array().cloned().unwrap_or_default().into_iter();
    let found = nodes.find(|present| present["node-name"] == node);
    found.with_context(|| format!("no node {node}"))
}

fn own_bitmaps(node: &Value) -> Vec<Value> {
    let all = node["dirty-bitmaps"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let ours = |bitmap: &Value| {
        let name = bitmap["name"].as_str();
        name.is_some_and(|name| name.starts_with("fleecebox:"))
    };
    all.into_iter().filter(ours).collect()
}

fn blockdev(node: &str, file: &Path) -> Value {
    json!({
        "driver": "qcow2", "node-name": node, "discard": "unmap",
        "file": {"driver": "file", "filename": file, "discard": "unmap"},
    })
}

/// An image below is in use, so it is not opened to see whether it is there.
fn create(file: &Path, size: &str, below: Option<&Path>) -> Result<()> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]);
    if let Some(below) = below {
        create.args(["-u", "-F", "qcow2", "-b"]).arg(below);
    }
    let status = create.arg(file).arg(size).status()?;
    ensure!(status.success(), "qemu-img create: {status}");
    Ok(())
}

/// Lets a job that mirrors end with the disk at its target.
fn complete(qmp: &mut Qmp) -> Result<()> {
    eventually("the job to be ready", JOB, || {
        Ok(match status(qmp)?.as_deref() {
            Some("ready") => Some(()),
            None => anyhow::bail!("the job ended early"),
            Some(_) => None,
        })
    })?;
    qmp.execute("job-complete", json!({"id": JOB_ID}))?;
    ended(qmp)
}

fn ended(qmp: &mut Qmp) -> Result<()> {
    eventually("the job's end", JOB, || {
        Ok(status(qmp)?.is_none().then_some(()))
    })
}

fn status(qmp: &mut Qmp) -> Result<Option<String>> {
    let jobs = qmp.execute("query-jobs", json!({}))?;
    let mut jobs = jobs.as_array().cloned().unwrap_or_default().into_iter();
    let job = jobs.find(|job| job["id"] == JOB_ID);
    Ok(job.and_then(|job| job["status"].as_str().map(str::to_owned)))
}
