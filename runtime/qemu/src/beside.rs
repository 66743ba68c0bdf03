//! Devices whose disk is none of QEMU's block layer: another process, the kernel or the hardware serves it. `query-block`
//! does not show them, and QEMU can neither track nor freeze them, so they are found in the tree of devices by their types.

use super::monitor::{Monitor, MonitorError};
use serde::Deserialize;
use serde_json::{Value, json};

/// A device that holds a disk which cannot be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Beside {
    /// The device's id, or its path in QEMU's tree.
    pub name: String,
    /// Its type, such as `vhost-user-blk-pci`.
    pub driver: String,
}

/// Where QEMU keeps the devices that its user added, with an id and without.
const PLACES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Types, without what names their bus, that hold a disk whatever they are told.
const DISKS: [&str; 6] = [
    "vhost-user-blk",
    "vhost-user-scsi",
    "vhost-scsi",
    // A disk as memory: its writes are no requests.
    "virtio-pmem",
    "nvdimm",
    // Of mainframes: mostly a DASD.
    "vfio-ccw",
];

/// Types that are whatever their other side is: a disk where that says so by its virtio id.
const ANY_VIRTIO: [&str; 3] = [
    "vhost-vdpa-device",
    "vhost-user-device",
    "vhost-user-test-device",
];

/// Virtio's ids of a block device and of a SCSI host (Virtual I/O Device specification, section 5).
const VIRTIO_DISKS: [u64; 2] = [2, 8];

/// PCI's class of mass storage, NVMe included, as sysfs writes it.
const MASS_STORAGE: &str = "0x01";

/// Looks for them.
///
/// # Errors
/// Those of [`Monitor::query`].
pub(super) async fn find(monitor: &Monitor) -> Result<Vec<Beside>, MonitorError> {
    #[derive(Deserialize)]
    struct Child {
        name: String,
        #[serde(rename = "type")]
        kind: String,
    }
    let mut found = Vec::new();
    for place in PLACES {
        let listed = monitor.query::<Vec<Child>>("qom-list", json!({ "path": place }));
        let children = match listed.await {
            // A storage daemon has no devices.
            Err(error) if error.is_refusal() => continue,
            children => children?,
        };
        for Child { name, kind } in children {
            let driver = kind
                .strip_prefix("child<")
                .and_then(|it| it.strip_suffix('>'));
            let Some(driver) = driver else { continue };
            let path = format!("{place}/{name}");
            if holds_disk(monitor, driver, &path).await? {
                found.push(Beside {
                    name: if place == PLACES[0] { name } else { path },
                    driver: driver.into(),
                });
            }
        }
    }
    Ok(found)
}

async fn holds_disk(monitor: &Monitor, driver: &str, path: &str) -> Result<bool, MonitorError> {
    if DISKS.iter().any(|kind| is_kind(driver, kind)) {
        return Ok(true);
    }
    if ANY_VIRTIO.iter().any(|kind| is_kind(driver, kind)) {
        let id = property(monitor, path, "virtio-id").await?;
        return Ok(id.is_none_or(|id| id.as_u64().is_none_or(|id| VIRTIO_DISKS.contains(&id))));
    }
    // The hardware itself.
    if is_kind(driver, "vfio") || driver == "vfio-pci-nohotplug" {
        let host = property(monitor, path, "host").await?;
        return Ok(host.as_ref().and_then(Value::as_str).is_none_or(is_storage));
    }
    Ok(false)
}

/// Whether `driver` is `kind` on whatever bus.
fn is_kind(driver: &str, kind: &str) -> bool {
    const BUSES: [&str; 5] = [
        "",
        "-pci",
        "-pci-transitional",
        "-pci-non-transitional",
        "-ccw",
    ];
    let bus = driver.strip_prefix(kind);
    bus.is_some_and(|bus| BUSES.contains(&bus))
}

/// Whether the PCI device at that address is mass storage; one that cannot be looked at may be.
fn is_storage(address: &str) -> bool {
    let class = std::fs::read_to_string(format!("/sys/bus/pci/devices/{address}/class"));
    class.map_or(true, |class| class.starts_with(MASS_STORAGE))
}

async fn property(
    monitor: &Monitor,
    path: &str,
    property: &str,
) -> Result<Option<Value>, MonitorError> {
    let arguments = json!({ "path": path, "property": property });
    match monitor.query("qom-get", arguments).await {
        Err(error) if error.is_refusal() => Ok(None),
        value => value.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_known_on_each_bus_and_no_other_type_is() {
        for driver in [
            "vhost-user-blk-pci",
            "vhost-user-blk-pci-non-transitional",
            "vhost-scsi-ccw",
            "nvdimm",
        ] {
            assert!(DISKS.iter().any(|kind| is_kind(driver, kind)), "{driver}");
        }
        for driver in [
            "virtio-blk-pci",
            "vhost-user-fs-pci",
            "vhost-vsock-pci",
            "virtio-scsi-pci",
            "pc-dimm",
        ] {
            assert!(!DISKS.iter().any(|kind| is_kind(driver, kind)), "{driver}");
        }
    }
}
