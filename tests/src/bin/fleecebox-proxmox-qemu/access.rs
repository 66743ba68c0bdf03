//! The commands of Proxmox's QEMU, done by those of a stock QEMU: where the real one puts filters over the disks,
//! backup jobs keep the old data here, which reads the same.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fleecebox_tests::{Qmp, eventually};
use serde_json::{Value, json};

use crate::Arguments;

const COPY_LIMIT: Duration = Duration::from_secs(60);

/// What is set up.
#[derive(Debug, Default)]
pub(crate) struct Access {
    target: Option<String>,
    devices: Vec<Device>,
    told: Vec<Value>,
    /// Counts the points in time.
    number: u32,
}

#[derive(Debug)]
struct Device {
    name: String,
    node: String,
    size: u64,
    /// The device of the machine that has it.
    qdev: Option<Value>,
}

/// The daemon's schema and what Proxmox's QEMU adds to it.
pub(crate) fn schema(arguments: &Arguments) -> Result<Value> {
    let mut schema = own(arguments)?.execute("query-qmp-schema", json!({}))?;
    let member = |name: &&str| json!({"name": name, "type": "str"});
    let setup: Vec<_> = ["target-id", "devices"].iter().map(member).collect();
    let teardown: Vec<_> = ["target-id", "success"].iter().map(member).collect();
    let command = |name: &str, of: &str| json!({"name": name, "meta-type": "command", "arg-type": of, "ret-type": "any"});
    let object = |name: &str, members: &[Value]| json!({"name": name, "meta-type": "object", "members": members});
    let entities = schema.as_array_mut().context("a schema that is no list")?;
    entities.extend([
        command("query-proxmox-support", "pve-none"),
        command("query-pbs-bitmap-info", "pve-none"),
        command("backup-access-setup", "pve-setup"),
        command("backup-access-teardown", "pve-teardown"),
        object("pve-none", &[]),
        object("pve-setup", &setup),
        object("pve-teardown", &teardown),
    ]);
    Ok(schema)
}

impl Access {
    pub(crate) fn set_up(&mut self, arguments: &Arguments, given: &Value) -> Result<Value> {
        only(given, &["target-id", "devices"])?;
        let target = given["target-id"]
            .as_str()
            .context("Parameter 'target-id' is missing")?;
        if !self.devices.is_empty() {
            bail!(
                "previous backup for target '{}' not finished",
                self.target.as_deref().unwrap_or_default()
            );
        }
        let names = devices(given)?;
        if names.is_empty() {
            abort(arguments);
        }
        let mut qmp = own(arguments)?;
        let mut found = Vec::new();
        for name in names {
            let fleecing = format!("{name}-fleecing");
            let node = node_of(&mut qmp, &name)?;
            let size = size_of(&mut qmp, &node)?;
            let of_fleecing = size_of(&mut qmp, &fleecing)?;
            ensure!(
                size == of_fleecing,
                "Size mismatch for '{fleecing}' - {of_fleecing} != {size}"
            );
            let qdev = qdev_of(&mut qmp, &node)?;
            found.push(Device {
                name,
                node,
                size,
                qdev,
            });
        }
        self.number += 1;
        self.target = Some(target.into());
        self.devices = found;
        if let Err(error) = self.take(arguments, &mut qmp) {
            self.devices.clear();
            return Err(error);
        }
        let action = arguments.action.as_deref().unwrap_or("not-used");
        let told = self.devices.iter().map(|device| {
            json!({"drive": device.name, "action": action, "size": device.size, "dirty": device.size})
        });
        self.told = told.collect();
        let info = self.devices.iter().zip(0..).map(|(device, index)| {
            let mut info =
                json!({"node-name": access(index), "device": device.name, "size": device.size});
            if let Some(action) = &arguments.action {
                info["bitmap-node-name"] = json!(device.name);
                info["bitmap-name"] = json!(target);
                info["bitmap-action"] = json!(action);
            }
            info
        });
        Ok(info.collect())
    }

    /// One disk after the other: between two of them the guest writes.
    fn take(&self, arguments: &Arguments, qmp: &mut Qmp) -> Result<()> {
        for (device, index) in self.devices.iter().zip(0..) {
            let copy = arguments
                .copies
                .join(format!("{}-{}.raw", self.number, device.name));
            File::create(&copy)?.set_len(device.size)?;
            let file = json!({"driver": "file", "filename": copy});
            let node = json!({"driver": "raw", "node-name": copied(index), "file": file});
            qmp.execute("blockdev-add", node)?;
            let actions = [
                (job(index), format!("{}-fleecing", device.name), "none"),
                (copied(index), copied(index), "full"),
            ]
            .map(|(id, target, sync)| {
                let mut data = json!({"job-id": id, "device": device.node, "target": target, "sync": sync, "auto-dismiss": false});
                if sync == "none" {
                    data["filter-node-name"] = json!(filter(index));
                }
                json!({"type": "blockdev-backup", "data": data})
            });
            qmp.execute("transaction", json!({ "actions": actions }))?;
            let node = json!({"driver": "snapshot-access", "node-name": access(index), "file": filter(index), "discard": "unmap"});
            qmp.execute("blockdev-add", node)?;
            if let Some(words) = &arguments.fail {
                bail!("{words}");
            }
        }
        Ok(())
    }

    pub(crate) fn tear_down(&mut self, arguments: &Arguments, given: &Value) -> Result<Value> {
        only(given, &["target-id", "success"])?;
        ensure!(
            given["success"].is_boolean(),
            "Parameter 'success' is missing"
        );
        let target = given["target-id"].as_str().unwrap_or_default();
        let Some(own_target) = &self.target else {
            return Ok(json!({}));
        };
        ensure!(
            own_target == target,
            "cannot teardown backup access - got target {target} instead of {own_target}"
        );
        let mut qmp = own(arguments)?;
        let devices = devices_of(&mut qmp)?;
        let gone = |qdev: &Value| !devices.iter().any(|device| device["qdev"] == *qdev);
        let mut qdevs = self.devices.iter().filter_map(|it| it.qdev.as_ref());
        if qdevs.any(gone) {
            abort(arguments);
        }
        self.remove(&mut qmp)?;
        Ok(json!({}))
    }

    fn remove(&mut self, qmp: &mut Qmp) -> Result<()> {
        let nodes = nodes(qmp)?;
        let there = |name: &str| nodes.iter().any(|node| node["node-name"] == name);
        for (_, index) in self.devices.iter().zip(0..) {
            if there(&access(index)) {
                qmp.execute("blockdev-del", json!({"node-name": access(index)}))?;
            }
            let jobs = qmp.execute("query-jobs", json!({}))?;
            let runs = |id: &str| {
                jobs.as_array()
                    .is_some_and(|jobs| jobs.iter().any(|job| job["id"] == id))
            };
            if runs(&job(index)) {
                qmp.execute("block-job-cancel", json!({"device": job(index)}))?;
            }
            for id in [job(index), copied(index)] {
                if runs(&id) {
                    eventually("a job to conclude", COPY_LIMIT, || {
                        let jobs = qmp.execute("query-jobs", json!({}))?;
                        let mut jobs = jobs.as_array().into_iter().flatten();
                        Ok(jobs
                            .find(|job| job["id"] == id && job["status"] == "concluded")
                            .map(drop))
                    })?;
                    qmp.execute("job-dismiss", json!({ "id": id }))?;
                }
            }
            if there(&copied(index)) {
                qmp.execute("blockdev-del", json!({"node-name": copied(index)}))?;
            }
        }
        self.devices.clear();
        Ok(())
    }

    pub(crate) fn bitmap_info(&self) -> Value {
        json!(self.told)
    }
}

fn own(arguments: &Arguments) -> Result<Qmp> {
    Ok(Qmp::connect(&arguments.own)?)
}

/// QEMU refuses what it does not know.
fn only(given: &Value, known: &[&str]) -> Result<()> {
    let given = given.as_object().context("no arguments")?;
    match given.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => bail!("Parameter '{key}' is unexpected"),
        None => Ok(()),
    }
}

/// Each with a mode of its own.
fn devices(given: &Value) -> Result<Vec<String>> {
    let devices = given["devices"]
        .as_array()
        .context("Parameter 'devices' is missing")?;
    let name = |device: &Value| {
        only(device, &["device", "bitmap-mode"])?;
        let mode = device["bitmap-mode"].as_str();
        ensure!(
            mode == Some("none"),
            "this stand-in keeps no bitmaps: {device}"
        );
        Ok(device["device"]
            .as_str()
            .context("Parameter 'device' is missing")?
            .into())
    };
    devices.iter().map(name).collect()
}

fn nodes(qmp: &mut Qmp) -> Result<Vec<Value>> {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    Ok(nodes.as_array().cloned().unwrap_or_default())
}

/// Where a drive has that name it is meant, else a block node.
fn node_of(qmp: &mut Qmp, name: &str) -> Result<String> {
    let devices = devices_of(qmp)?;
    let drive = devices.iter().find(|device| device["device"] == name);
    let node = drive.and_then(|drive| drive["inserted"]["node-name"].as_str());
    Ok(node.unwrap_or(name).into())
}

fn qdev_of(qmp: &mut Qmp, node: &str) -> Result<Option<Value>> {
    let devices = devices_of(qmp)?;
    let device = devices
        .iter()
        .find(|device| device["inserted"]["node-name"] == node);
    Ok(device.map(|device| device["qdev"].clone()))
}

/// None in a storage daemon.
fn devices_of(qmp: &mut Qmp) -> Result<Vec<Value>> {
    match qmp.execute("query-block", json!({})) {
        Ok(devices) => Ok(devices.as_array().cloned().unwrap_or_default()),
        Err(error) if error.to_string().contains("has not been found") => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// What an assertion of QEMU's does to the VM.
fn abort(arguments: &Arguments) -> ! {
    if let Ok(mut qmp) = own(arguments) {
        let _ = qmp.execute("quit", json!({}));
    }
    std::process::abort();
}

fn size_of(qmp: &mut Qmp, name: &str) -> Result<u64> {
    let nodes = nodes(qmp)?;
    let node = nodes.iter().find(|node| node["node-name"] == name);
    let size = node.and_then(|node| node["image"]["virtual-size"].as_u64());
    size.with_context(|| format!("Device '{name}' not found"))
}

fn access(index: u32) -> String {
    format!("snapshot-access-{index}")
}

fn filter(index: u32) -> String {
    format!("pve-cbw-{index}")
}

fn job(index: u32) -> String {
    format!("pve-keep-{index}")
}

fn copied(index: u32) -> String {
    format!("pve-copy-{index}")
}
