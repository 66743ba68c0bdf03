//! Which disk a name means. The ids of devices and drives and the names of block nodes live side by side in QEMU, so one
//! word may be all three, of different disks: it is looked for among all of them, and what means two disks means none.

use super::beside::{self, Beside};
use super::ids::OwnId;
use super::machine::{MachineError, fitness};
use super::monitor::{Monitor, MonitorError};
use super::present::{self, Device, Node};

/// All that a name may mean.
pub(super) struct Inventory {
    pub(super) devices: Vec<Device>,
    pub(super) nodes: Vec<Node>,
    pub(super) beside: Vec<Beside>,
}

/// What a name means.
#[derive(Clone, Copy)]
pub(super) enum Meant<'a> {
    /// A device, and the disk in it, if there is one.
    Device(&'a Device),
    /// A block node that no device has.
    Node(&'a Node),
    /// A device whose disk QEMU's block layer does not have.
    Beside(&'a Beside),
}

impl<'a> Meant<'a> {
    pub(super) fn node(self) -> Option<&'a Node> {
        match self {
            Self::Device(device) => device.inserted.as_ref(),
            Self::Node(node) => Some(node),
            Self::Beside(_) => None,
        }
    }

    fn is(self, other: Self) -> bool {
        match (self, other) {
            (Self::Device(one), Self::Device(other)) if std::ptr::eq(one, other) => true,
            (Self::Beside(one), Self::Beside(other)) => std::ptr::eq(one, other),
            _ => match (self.node(), other.node()) {
                (Some(one), Some(other)) => one.name == other.name,
                _ => false,
            },
        }
    }
}

impl Inventory {
    pub(super) async fn ask(monitor: &Monitor) -> Result<Self, MonitorError> {
        let mut devices = present::devices(monitor).await?;
        let mut known = monitor.described().await?.unwrap_or_default().disks;
        for device in &mut devices {
            device.target = device.id().and_then(|id| known.remove(id));
        }
        Ok(Self {
            devices,
            nodes: present::nodes(monitor).await?,
            beside: beside::find(monitor).await?,
        })
    }

    /// What `chosen` means; nothing where it means nothing.
    ///
    /// # Errors
    /// [`MachineError::Ambiguous`] where it means more than one disk.
    pub(super) async fn find(
        &self,
        monitor: &Monitor,
        chosen: &str,
    ) -> Result<Option<Meant<'_>>, MachineError> {
        let mut found: Vec<(String, Meant)> = Vec::new();
        for (what, meant) in self.all_named(chosen) {
            if !found.iter().any(|(_, other)| other.is(meant)) {
                found.push((what, meant));
            }
        }
        if found.len() > 1 {
            self.drop_parts(monitor, &mut found).await?;
        }
        match &found[..] {
            [] => Ok(None),
            [(_, only)] => Ok(Some(*only)),
            [(first, _), (second, _), ..] => Err(MachineError::Ambiguous {
                name: chosen.into(),
                first: first.clone(),
                second: second.clone(),
            }),
        }
    }

    /// All that bears the name, with words for it.
    fn all_named<'a>(&'a self, chosen: &str) -> Vec<(String, Meant<'a>)> {
        if chosen.is_empty() {
            return Vec::new();
        }
        let mut all = Vec::new();
        for device in &self.devices {
            let node = device.inserted.as_ref();
            let node = node.map_or("empty".into(), |node| format!("block node {}", node.name));
            let id = device.id();
            if id == Some(chosen) {
                all.push((
                    format!("the device {chosen} ({node})"),
                    Meant::Device(device),
                ));
            } else if device.target.as_deref() == Some(chosen) {
                let what = format!("{chosen}, the device {} ({node})", id.unwrap_or_default());
                all.push((what, Meant::Device(device)));
            } else if device.drive == chosen {
                let whose = id.map_or_else(String::new, |id| format!(" of the device {id}"));
                all.push((
                    format!("the drive {chosen}{whose} ({node})"),
                    Meant::Device(device),
                ));
            }
        }
        for beside in self.beside.iter().filter(|beside| beside.name == chosen) {
            let what = format!("the device {chosen} ({})", beside.driver);
            all.push((what, Meant::Beside(beside)));
        }
        for node in self.nodes.iter().filter(|node| node.name == chosen) {
            // A device that is chosen by its node has the name that it has otherwise.
            let meant = match self.devices_with(&node.name).next() {
                Some(device) => Meant::Device(device),
                None => Meant::Node(node),
            };
            all.push((format!("the block node {chosen}"), meant));
        }
        all
    }

    /// A node below a device's disk is a part of that disk, such as the file of an image: the device is meant.
    async fn drop_parts(
        &self,
        monitor: &Monitor,
        found: &mut Vec<(String, Meant<'_>)>,
    ) -> Result<(), MonitorError> {
        let tops: Vec<String> = found
            .iter()
            .filter(|(_, meant)| matches!(meant, Meant::Device(_)))
            .filter_map(|(_, meant)| Some(meant.node()?.name.clone()))
            .collect();
        let graph = present::graph(monitor).await?;
        found.retain(|(_, meant)| match meant {
            Meant::Node(node) => !tops.iter().any(|top| graph.is_below(&node.name, top)),
            _ => true,
        });
        Ok(())
    }

    pub(super) fn devices_with<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Device> {
        self.devices.iter().filter(move |device| {
            let inserted = device.inserted.as_ref();
            inserted.is_some_and(|inserted| inserted.name == node)
        })
    }

    /// All names of the disk on a block node.
    pub(super) fn names_of(&self, node: &str) -> Vec<String> {
        let mut names = vec![node.to_owned()];
        for device in self.devices_with(node) {
            names.extend(device.target.clone());
            names.extend(device.id().map(Into::into));
            names.push(device.drive.clone());
        }
        names.retain(|name| !name.is_empty());
        names
    }

    /// The device's stable name: what whoever manages the VM calls its disk, or its id, else the first of its other names
    /// that no other device has.
    pub(super) fn name_of(&self, device: &Device) -> String {
        if let Some(name) = device.target.as_deref().or(device.id()) {
            return name.into();
        }
        let node = device.inserted.as_ref().map(|node| node.name.as_str());
        let names = [Some(device.drive.as_str()), node, device.qdev.as_deref()];
        let mut names = names.into_iter().flatten().filter(|name| !name.is_empty());
        let taken = |name: &str| {
            let meant = self.all_named(name);
            meant
                .iter()
                .any(|(_, meant)| !meant.is(Meant::Device(device)))
        };
        names.find(|name| !taken(name)).unwrap_or_default().into()
    }

    /// What a user may choose from: devices where there are any, and the nodes that somebody named.
    pub(super) fn available(&self) -> Vec<String> {
        let given =
            |node: &&Node| !node.name.starts_with('#') && OwnId::parse(&node.name).is_none();
        let devices = self.devices.iter();
        let devices = devices.filter(|device| fitness(device.inserted.as_ref()).is_ok());
        let mut names: Vec<_> = devices.map(|device| self.name_of(device)).collect();
        let nodes = self.nodes.iter().filter(|node| fitness(Some(node)).is_ok());
        for node in nodes.filter(given) {
            if !names.contains(&node.name) {
                names.push(node.name.clone());
            }
        }
        names
    }
}
