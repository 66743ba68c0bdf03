//! Files and a listening socket for a QEMU that may not open them itself: one of another user, as libvirt's are.
//!
//! Each is tried by its path first. What QEMU then refuses is opened here and handed over the monitor's socket
//! (SCM_RIGHTS): a file as a set of descriptors that lives as long as its node, a socket under a name that QEMU takes at
//! once. `qemu-storage-daemon` takes neither.

use super::monitor::{Monitor, MonitorError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Names the NBD server's socket for the moment between two commands.
const SOCKET_NAME: &str = "fbx-nbd";

/// Adds a node by `blockdev-add`, whose options `file` names the file by: its path, or what stands for a descriptor.
///
/// # Errors
/// What QEMU said to the path.
pub(super) async fn add_node(
    monitor: &Monitor,
    path: &Path,
    descriptor: Option<BorrowedFd<'_>>,
    options: impl Fn(Value) -> Value,
) -> Result<(), MonitorError> {
    let by_path = monitor.execute_raw("blockdev-add", options(json!(path)));
    let refused = match by_path.await {
        Ok(_) => return Ok(()),
        Err(error) if error.is_refusal() => error,
        Err(error) => return Err(error),
    };
    let Some(descriptor) = descriptor else {
        return Err(refused);
    };
    match by_descriptor(monitor, descriptor, options).await {
        Err(error) if !error.is_refusal() => Err(error),
        // That it does not go this way either says less than why QEMU may not open the path.
        Err(_) => Err(refused),
        Ok(()) => Ok(()),
    }
}

async fn by_descriptor(
    monitor: &Monitor,
    descriptor: BorrowedFd<'_>,
    options: impl Fn(Value) -> Value,
) -> Result<(), MonitorError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Added {
        fdset_id: u64,
    }
    let owned = cloned(descriptor)?;
    let added = monitor
        .execute_with(owned, "add-fd", json!({ "opaque": "fleecebox" }))
        .await?;
    let Added { fdset_id } =
        serde_json::from_value(added).map_err(|source| MonitorError::Answer {
            command: "add-fd".into(),
            source,
        })?;
    let filename = json!(format!("/dev/fdset/{fdset_id}"));
    let opened = monitor.execute_raw("blockdev-add", options(filename)).await;
    // The node has its own copy; the set goes with that.
    let removed = monitor.execute_raw("remove-fd", json!({ "fdset-id": fdset_id }));
    let removed = removed.await;
    opened?;
    removed.map(drop)
}

/// Starts the NBD server on a socket that is made here, at `path`.
///
/// # Errors
/// Where it cannot be made, or QEMU does not take it.
pub(super) async fn start_server(monitor: &Monitor, path: &Path) -> Result<(), MonitorError> {
    let socket = UnixListener::bind(path).map_err(|source| MonitorError::Descriptor { source })?;
    let name = json!({ "fdname": SOCKET_NAME });
    monitor.execute_with(socket.into(), "getfd", name).await?;
    let address = json!({ "addr": { "type": "fd", "data": { "str": SOCKET_NAME } } });
    let started = monitor.execute_raw("nbd-server-start", address).await;
    if started.is_err() {
        // QEMU may have taken it or not.
        let _ = monitor
            .execute_raw("closefd", json!({ "fdname": SOCKET_NAME }))
            .await;
        let _ = std::fs::remove_file(path);
    }
    started.map(drop)
}

fn cloned(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, MonitorError> {
    descriptor
        .try_clone_to_owned()
        .map_err(|source| MonitorError::Descriptor { source })
}
