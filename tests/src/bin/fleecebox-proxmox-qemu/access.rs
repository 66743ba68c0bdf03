//! The commands of Proxmox's QEMU, done by those of a storage daemon: where the real one puts filters over the disks,
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
    size: u64,
}

/// The daemon's schema and what Proxmox's QEMU adds to it.
pub(crate) fn schema(arguments: &Arguments) -> Result<Value> {
    let mut schema = own(arguments)?.execute("query-qmp-schema", json!({}))?;
    let devices = if arguments.older {
        ["devlist", "bitmap-name"].as_slice()
    } else {
        ["devices"].as_slice()
    };
    let member = |name: &&str| json!({"name": name, "type": "str"});
    let setup: Vec<_> = ["target-id"].iter().chain(devices).map(member).collect();
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
        let known = match arguments.older {
            true => ["target-id", "devlist", "bitmap-name"].as_slice(),
            false => ["target-id", "devices"].as_slice(),
        };
        only(given, known)?;
        let target = given["target-id"]
            .as_str()
            .context("Parameter 'target-id' is missing")?;
        if !self.devices.is_empty() {
            bail!(
                "previous backup for target '{}' not finished",
                self.target.as_deref().unwrap_or_default()
            );
        }
        let names = match arguments.older {
            true => {
                let list = given["devlist"]
                    .as_str()
                    .context("Parameter 'devlist' is missing")?;
                list.split([',', ';', ':']).map(String::from).collect()
            }
            false => devices(given)?,
        };
        let mut qmp = own(arguments)?;
        let mut found = Vec::new();
        for name in names {
            let fleecing = format!("{name}-fleecing");
            let size = size_of(&mut qmp, &name)?;
            let of_fleecing = size_of(&mut qmp, &fleecing)?;
            ensure!(
                size == of_fleecing,
                "Size mismatch for '{fleecing}' - {of_fleecing} != {size}"
            );
            found.push(Device { name, size });
        }
        self.number += 1;
        self.target = Some(target.into());
        self.devices = found;
        let taken = self.take(arguments, &mut qmp);
        if let Err(error) = taken {
            self.remove(&mut qmp)?;
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

    fn take(&self, arguments: &Arguments, qmp: &mut Qmp) -> Result<()> {
        let mut actions = Vec::new();
        for (device, index) in self.devices.iter().zip(0..) {
            let copy = arguments
                .copies
                .join(format!("{}-{}.raw", self.number, device.name));
            File::create(&copy)?.set_len(device.size)?;
            let file = json!({"driver": "file", "filename": copy});
            let node = json!({"driver": "raw", "node-name": copied(index), "file": file});
            qmp.execute("blockdev-add", node)?;
            for (id, target, sync) in [
                (job(index), format!("{}-fleecing", device.name), "none"),
                (copied(index), copied(index), "full"),
            ] {
                let mut data = json!({"job-id": id, "device": device.name, "target": target, "sync": sync, "auto-dismiss": false});
                if sync == "none" {
                    data["filter-node-name"] = json!(filter(index));
                }
                actions.push(json!({"type": "blockdev-backup", "data": data}));
            }
        }
        qmp.execute("transaction", json!({ "actions": actions }))?;
        if let Some(words) = &arguments.fail {
            bail!("{words}");
        }
        for (_, index) in self.devices.iter().zip(0..) {
            let node = json!({"driver": "snapshot-access", "node-name": access(index), "file": filter(index), "discard": "unmap"});
            qmp.execute("blockdev-add", node)?;
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
        self.remove(&mut own(arguments)?)?;
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
