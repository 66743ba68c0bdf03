//! What QEMU shows, before and after: nothing of the product may stay behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::{Monitors, Qmp, QmpError};

/// What `query-named-block-nodes` says of a node that may change by itself while a disk is in
/// use: counters, allocation, and the bitmaps, which are compared apart.
const VOLATILE_OF_NODE: [&str; 2] = ["dirty-bitmaps", "image"];

/// A dirty bitmap on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bitmap {
    /// The node that it is on.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Whether it records writes.
    pub recording: bool,
    /// Whether the disk's file keeps it.
    pub persistent: bool,
    /// Whether a crash spoilt it.
    pub inconsistent: bool,
}

/// Nodes, jobs, exports and devices of the block layer, dirty bitmaps, and what the process has
/// open, as far as it must be the same after a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuState {
    /// By what has them, as in `node disk-a`: the values in JSON by their path, as in `.cache.direct`.
    things: BTreeMap<String, BTreeMap<String, String>>,
    bitmaps: BTreeSet<Bitmap>,
}

impl QemuState {
    /// Asks QEMU (`query-named-block-nodes`, `query-jobs`, `query-block-exports`, and
    /// `query-block` and `query-status` where they exist), and the kernel for the files and
    /// listening sockets that its process has open: QEMU itself cannot be asked whether its NBD
    /// server runs.
    ///
    /// # Errors
    /// When QEMU is gone or another user's.
    pub fn read(monitors: &Monitors) -> Result<Self> {
        let mut qmp = Qmp::connect(&monitors.control)?;
        let mut state = Self {
            things: BTreeMap::new(),
            bitmaps: BTreeSet::new(),
        };
        for node in list(&mut qmp, "query-named-block-nodes", json!({"flat": true}))? {
            state.add_node(node);
        }
        for job in list(&mut qmp, "query-jobs", json!({}))? {
            // A job's progress is no state that anybody leaves behind; its type and phase are.
            let name = format!("job {}", text(&job["id"]));
            state.add(
                &name,
                &json!({"type": job["type"], "status": job["status"]}),
            );
        }
        for export in list(&mut qmp, "query-block-exports", json!({}))? {
            state.add(&format!("export {}", text(&export["id"])), &export);
        }
        for device in list(&mut qmp, "query-block", json!({}))? {
            let inserted = json!({"node-name": device["inserted"]["node-name"]});
            let name = format!(
                "device {}{}",
                text(&device["device"]),
                text(&device["qdev"])
            );
            state.add(
                &name,
                &json!({"inserted": inserted, "io-status": device["io-status"]}),
            );
        }
        match qmp.execute("query-status", json!({})) {
            Ok(status) => state.add("machine", &json!({"status": status["status"]})),
            Err(error) if is_unknown_command(&error) => {}
            Err(error) => return Err(error.into()),
        }
        for open in open_files(qmp.peer_pid()?)? {
            state.things.insert(open, BTreeMap::new());
        }
        Ok(state)
    }

    /// All bitmaps, by node and name.
    pub fn bitmaps(&self) -> impl Iterator<Item = &Bitmap> {
        self.bitmaps.iter()
    }

    /// What is different from `before`, one readable line each, best shown through
    /// [`QemuState::assert_restored`]. Bitmaps that `may_change` accepts are left out on both sides.
    pub fn differences(&self, before: &Self, may_change: impl Fn(&Bitmap) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        for (thing, old) in &before.things {
            match self.things.get(thing) {
                None => lines.push(format!("- {thing}{}", summary(old))),
                Some(new) => lines.extend(changes(thing, old, new)),
            }
        }
        for (thing, new) in &self.things {
            if !before.things.contains_key(thing) {
                lines.push(format!("+ {thing}{}", summary(new)));
            }
        }
        for bitmap in before
            .bitmaps
            .difference(&self.bitmaps)
            .filter(|bitmap| !may_change(bitmap))
        {
            lines.push(format!("- {bitmap}"));
        }
        for bitmap in self
            .bitmaps
            .difference(&before.bitmaps)
            .filter(|bitmap| !may_change(bitmap))
        {
            lines.push(format!("+ {bitmap}"));
        }
        lines
    }

    /// Panics with the differences from `before` if there are any.
    #[track_caller]
    pub fn assert_restored(&self, before: &Self, may_change: impl Fn(&Bitmap) -> bool) {
        let differences = self.differences(before, may_change);
        assert!(
            differences.is_empty(),
            "QEMU is not as it was (- before, + now):\n{}",
            differences.join("\n")
        );
    }

    fn add_node(&mut self, node: Value) {
        let name = text(&node["node-name"]);
        // Those without a name belong to a job and live exactly as long.
        let named = |bitmap: &&Value| bitmap["name"].as_str().is_some_and(|name| !name.is_empty());
        for bitmap in node["dirty-bitmaps"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(named)
        {
            self.bitmaps.insert(Bitmap {
                node: name.clone(),
                name: text(&bitmap["name"]),
                recording: bitmap["recording"] == true,
                persistent: bitmap["persistent"] == true,
                inconsistent: bitmap["inconsistent"] == true,
            });
        }
        let stable: Map<String, Value> = match node {
            Value::Object(fields) => fields
                .into_iter()
                .filter(|(field, _)| !VOLATILE_OF_NODE.contains(&field.as_str()))
                .collect(),
            _ => Map::new(),
        };
        self.add(&format!("node {name}"), &Value::Object(stable));
    }

    fn add(&mut self, thing: &str, value: &Value) {
        flatten("", value, self.things.entry(thing.into()).or_default());
    }
}

fn flatten(path: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                flatten(&format!("{path}.{field}"), value, into);
            }
        }
        other => {
            into.insert(path.into(), other.to_string());
        }
    }
}

/// What a reader wants to know of something that appeared or went.
fn summary(properties: &BTreeMap<String, String>) -> String {
    let telling = [".drv", ".file", ".type", ".status", ".node-name"];
    telling
        .iter()
        .filter_map(|path| {
            properties
                .get(*path)
                .map(|value| format!(" {}={value}", &path[1..]))
        })
        .collect()
}

fn changes(
    thing: &str,
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
) -> Vec<String> {
    let absent = "absent".to_string();
    let paths: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    paths
        .into_iter()
        .map(|path| {
            (
                path,
                old.get(path).unwrap_or(&absent),
                new.get(path).unwrap_or(&absent),
            )
        })
        .filter(|(_, old, new)| old != new)
        .map(|(path, old, new)| format!("~ {thing}{path}: {old} → {new}"))
        .collect()
}

impl fmt::Display for Bitmap {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "bitmap {} on node {}", self.name, self.node)?;
        for (is, word) in [
            (self.recording, "recording"),
            (self.persistent, "persistent"),
            (self.inconsistent, "inconsistent"),
        ] {
            if is {
                write!(formatter, ", {word}")?;
            }
        }
        Ok(())
    }
}

/// The storage daemon lacks the commands about devices; it then has none.
fn list(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<Vec<Value>> {
    match qmp.execute(command, arguments) {
        Ok(Value::Array(entries)) => Ok(entries),
        Ok(other) => anyhow::bail!("{command} answered {other}, not a list"),
        Err(error) if is_unknown_command(&error) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

fn is_unknown_command(error: &QmpError) -> bool {
    matches!(error, QmpError::Refused { class, .. } if class == "CommandNotFound")
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_string()
}

/// Regular files and listening unix sockets, as `file PATH` and `socket PATH`.
fn open_files(pid: u32) -> Result<BTreeSet<String>> {
    let listening = listening_sockets()?;
    let folder = format!("/proc/{pid}/fd");
    let mut open = BTreeSet::new();
    for descriptor in std::fs::read_dir(&folder).with_context(|| folder.clone())? {
        // Descriptors come and go while we look.
        let Ok(target) = std::fs::read_link(descriptor?.path()) else {
            continue;
        };
        let target = target.to_string_lossy();
        if let Some(inode) = target.strip_prefix("socket:[") {
            if let Some(path) = listening.get(inode.trim_end_matches(']')) {
                open.insert(format!("socket {path}"));
            }
        } else if target.starts_with('/') && !target.starts_with("/dev/") {
            open.insert(format!("file {target}"));
        }
    }
    Ok(open)
}

/// Paths by inode, from `/proc/net/unix`: `Num RefCount Protocol Flags Type St Inode Path`.
fn listening_sockets() -> Result<BTreeMap<String, String>> {
    /// `__SO_ACCEPTCON` of the kernel.
    const LISTENING: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix")?;
    Ok(table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let flags = fields.nth(3)?;
            let inode = fields.nth(2)?;
            let path = fields.next()?;
            (flags == LISTENING).then(|| (inode.to_string(), path.to_string()))
        })
        .collect())
}
