//! Which of the VM's disks are taken, and which are not.

use super::beside::Beside;
use super::machine::{
    Choice, Disk, Disks, MachineError, Other, SkipReason, Skipped, disk, fitness, qdev_path,
    refuse_doubles,
};
use super::monitor::{Monitor, MonitorError};
use super::names::{Inventory, Meant};
use super::present::{self, Device, Graph, Node};
use serde_json::json;
use std::collections::BTreeSet;

/// The driver of a filter that limits what a disk's users may do.
const THROTTLE: &str = "throttle";

/// Drivers of devices that pass SCSI commands to the host's device, around bitmaps and filters.
const PASS_THROUGH: [&str; 2] = ["scsi-block", "scsi-generic"];

/// The disks of the VM (QMP `query-block`, `query-named-block-nodes`, and the tree of devices).
///
/// A device whose top node is a filter of somebody else, such as `throttle`, shows that node: see [`below_limits`].
///
/// # Errors
/// Any [`MachineError`].
pub async fn disks(monitor: &Monitor, choice: &Choice) -> Result<Disks, MachineError> {
    let inventory = Inventory::ask(monitor).await?;
    let mut found = Disks::default();
    let (names, excluded): (Option<&[String]>, &[String]) = match choice {
        Choice::All => (None, &[]),
        Choice::AllBut(excluded) => (None, excluded),
        Choice::Named(names) => (Some(names), &[]),
        Choice::NamedBut(names, excluded) => (Some(names), excluded),
    };
    let excluded = Excluded::of(monitor, &inventory, excluded).await?;
    match names {
        None => take_all(monitor, &inventory, &excluded, &mut found).await?,
        Some(names) => take_named(monitor, &inventory, names, &excluded, &mut found).await?,
    }
    refuse_doubles(&found.disks)?;
    for disk in &found.disks {
        let names = inventory.names_of(&disk.node);
        found.names.insert(disk.node.clone(), names);
    }
    found.others = others(monitor, &inventory, &excluded, &found).await?;
    Ok(found)
}

/// Goes from the filters that limit the I/O of a guest to what these show: only there a bitmap can be stored in the image,
/// and what reads there uses up nothing of the guest's limit. Proxmox VE has such a filter above every disk.
///
/// # Errors
/// Those of [`Monitor::query`].
pub async fn below_limits(monitor: &Monitor, disks: &mut [Disk]) -> Result<(), MonitorError> {
    if !disks.iter().any(|disk| disk.format == THROTTLE) {
        return Ok(());
    }
    let graph = present::graph(monitor).await?;
    let nodes = present::nodes(monitor).await?;
    for limited in disks {
        while limited.format == THROTTLE
            && let Some(below) = graph.child(&limited.node, "file")
            && let Some(node) = nodes.iter().find(|node| node.name == below)
        {
            *limited = disk(std::mem::take(&mut limited.name), node);
        }
    }
    Ok(())
}

/// What is not to be taken, as it was resolved.
#[derive(Default)]
struct Excluded {
    /// Block nodes.
    nodes: BTreeSet<String>,
    /// Names of devices without one.
    beside: BTreeSet<String>,
}

impl Excluded {
    /// A name that means nothing at this time excludes nothing.
    async fn of(
        monitor: &Monitor,
        inventory: &Inventory,
        names: &[String],
    ) -> Result<Self, MachineError> {
        let mut excluded = Self::default();
        for name in names {
            match inventory.find(monitor, name).await? {
                Some(Meant::Beside(beside)) => {
                    excluded.beside.insert(beside.name.clone());
                }
                Some(meant) => excluded
                    .nodes
                    .extend(meant.node().map(|node| node.name.clone())),
                None => {}
            }
        }
        Ok(excluded)
    }

    fn has(&self, meant: Meant<'_>) -> bool {
        match meant {
            Meant::Beside(beside) => self.beside.contains(&beside.name),
            meant => meant
                .node()
                .is_some_and(|node| self.nodes.contains(&node.name)),
        }
    }
}

async fn take_all(
    monitor: &Monitor,
    inventory: &Inventory,
    excluded: &Excluded,
    found: &mut Disks,
) -> Result<(), MachineError> {
    for device in &inventory.devices {
        let name = inventory.name_of(device);
        let fit = fitness(device.inserted.as_ref()).and_then(|node| match &device.qdev {
            Some(_) => Ok(node),
            None => Err(SkipReason::Unattached),
        });
        match fit {
            Ok(node) if excluded.nodes.contains(&node.name) => {}
            Ok(node) => take(monitor, device, name, node, found).await?,
            Err(reason) => found.skipped.push(Skipped { name, reason }),
        }
    }
    match found.disks.is_empty() {
        true => Err(MachineError::NoDisks {
            available: inventory.available(),
        }),
        false => Ok(()),
    }
}

async fn take_named(
    monitor: &Monitor,
    inventory: &Inventory,
    names: &[String],
    excluded: &Excluded,
    found: &mut Disks,
) -> Result<(), MachineError> {
    for chosen in names {
        let unfit = |reason| MachineError::Unfit {
            name: chosen.clone(),
            reason,
        };
        let meant = inventory.find(monitor, chosen).await?;
        if meant.is_some_and(|meant| excluded.has(meant)) {
            continue;
        }
        match meant {
            Some(Meant::Device(device)) => {
                let name = inventory.name_of(device);
                let node = fitness(device.inserted.as_ref()).map_err(unfit)?;
                take(monitor, device, name, node, found).await?;
            }
            Some(Meant::Node(node)) => {
                let node = fitness(Some(node)).map_err(unfit)?;
                found.disks.push(disk(chosen.clone(), node));
            }
            Some(Meant::Beside(beside)) => return Err(refused(beside)),
            None => {
                return Err(MachineError::Unknown {
                    name: chosen.clone(),
                    available: inventory.available(),
                });
            }
        }
    }
    match found.disks.is_empty() {
        true => Err(MachineError::NoDisks {
            available: inventory.available(),
        }),
        false => Ok(()),
    }
}

fn refused(beside: &Beside) -> MachineError {
    MachineError::Beside {
        name: beside.name.clone(),
        driver: beside.driver.clone(),
    }
}

/// A disk that another device has already, as with multipath, is the same disk: it is taken once.
async fn take(
    monitor: &Monitor,
    device: &Device,
    name: String,
    node: &Node,
    found: &mut Disks,
) -> Result<(), MachineError> {
    refuse_pass_through(monitor, device, &name).await?;
    let first = found.disks.iter().find(|disk| disk.node == node.name);
    match first {
        Some(first) if first.name != name => found.doubles.push((name, first.name.clone())),
        _ => found.disks.push(disk(name, node)),
    }
    Ok(())
}

/// The disks that were not taken. Where there are no devices, as in a storage daemon, they are the block nodes that are
/// part of no other.
async fn others(
    monitor: &Monitor,
    inventory: &Inventory,
    excluded: &Excluded,
    found: &Disks,
) -> Result<Vec<Other>, MachineError> {
    let mut others: Vec<Other> = Vec::new();
    let mut seen = BTreeSet::new();
    let taken = |node: &Node| found.disks.iter().any(|disk| disk.node == node.name);
    for device in inventory.devices.iter().filter(|it| it.qdev.is_some()) {
        let Ok(node) = fitness(device.inserted.as_ref()) else {
            continue;
        };
        if !taken(node) && seen.insert(&node.name) {
            others.push(Other {
                name: inventory.name_of(device),
                node: Some(node.name.clone()),
                excluded: excluded.nodes.contains(&node.name),
                beside: None,
            });
        }
    }
    if inventory.devices.is_empty()
        && let Some(graph) = graph_if_told(monitor).await?
    {
        let named = inventory.nodes.iter().filter(|node| {
            fitness(Some(node)).is_ok() && !node.name.starts_with('#') && !taken(node)
        });
        for node in named.filter(|node| graph.is_top(&node.name)) {
            others.push(Other {
                name: node.name.clone(),
                node: Some(node.name.clone()),
                excluded: excluded.nodes.contains(&node.name),
                beside: None,
            });
        }
    }
    for beside in &inventory.beside {
        others.push(Other {
            name: beside.name.clone(),
            node: None,
            excluded: excluded.beside.contains(&beside.name),
            beside: Some(beside.driver.clone()),
        });
    }
    Ok(others)
}

/// Nothing where this QEMU does not tell: the command is no stable one.
async fn graph_if_told(monitor: &Monitor) -> Result<Option<Graph>, MonitorError> {
    match present::graph(monitor).await {
        Err(error) if error.is_refusal() => Ok(None),
        graph => graph.map(Some),
    }
}

/// What the configuration adds as the volume `name`: a device's disk or a block node, also one that is read-only.
///
/// # Errors
/// As [`disks`] for a disk that is named; [`MachineError::Ambiguous`] where `name` is another disk's.
pub async fn extra(monitor: &Monitor, name: &str, chosen: &str) -> Result<Disk, MachineError> {
    let inventory = Inventory::ask(monitor).await?;
    let Some(meant) = inventory.find(monitor, chosen).await? else {
        return Err(MachineError::Unknown {
            name: chosen.into(),
            available: inventory.available(),
        });
    };
    match meant {
        Meant::Device(device) => refuse_pass_through(monitor, device, chosen).await?,
        Meant::Beside(beside) => return Err(refused(beside)),
        Meant::Node(_) => {}
    }
    let reason = match meant.node() {
        Some(node) if node.image.virtual_size > 0 => {
            refuse_name_of_another(monitor, &inventory, name, node).await?;
            return Ok(disk(name.into(), node));
        }
        Some(_) => SkipReason::Empty,
        None => SkipReason::NoMedium,
    };
    Err(MachineError::Unfit {
        name: chosen.into(),
        reason,
    })
}

/// Whether the node `name` is below the node `top`.
async fn is_part(monitor: &Monitor, name: &str, top: &str) -> Result<bool, MonitorError> {
    let graph = graph_if_told(monitor).await?;
    Ok(graph.is_some_and(|graph| graph.is_below(name, top)))
}

/// Policy grants volumes by name: one that is added must not go by the name of a disk that the VM has.
async fn refuse_name_of_another(
    monitor: &Monitor,
    inventory: &Inventory,
    name: &str,
    node: &Node,
) -> Result<(), MachineError> {
    let Some(other) = inventory.find(monitor, name).await? else {
        return Ok(());
    };
    let other = match other {
        Meant::Beside(beside) => format!("the device {} ({})", beside.name, beside.driver),
        meant => match meant.node() {
            Some(other) if other.name == node.name => return Ok(()),
            // What an overlay was put on is a part of the disk.
            Some(other) if is_part(monitor, &other.name, &node.name).await? => return Ok(()),
            Some(other) => format!("the disk of that name (block node {})", other.name),
            None => return Ok(()),
        },
    };
    Err(MachineError::Ambiguous {
        name: name.into(),
        first: format!("the extra volume (block node {})", node.name),
        second: other,
    })
}

async fn refuse_pass_through(
    monitor: &Monitor,
    device: &Device,
    name: &str,
) -> Result<(), MachineError> {
    let Some(qdev) = &device.qdev else {
        return Ok(());
    };
    let path = qdev_path(qdev);
    let arguments = json!({ "path": path, "property": "type" });
    match monitor.query::<String>("qom-get", arguments).await {
        Ok(driver) if PASS_THROUGH.contains(&driver.as_str()) => Err(MachineError::PassThrough {
            name: name.into(),
            driver,
        }),
        Ok(_) => Ok(()),
        // A device that QEMU cannot find by this path is none of SCSI's, which all have an id or a path.
        Err(e) if e.is_refusal() => Ok(()),
        Err(e) => Err(e.into()),
    }
}
