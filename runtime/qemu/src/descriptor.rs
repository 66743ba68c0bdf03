//! Files and a listening socket that QEMU gets by descriptor, over the monitor's socket (SCM_RIGHTS): a file as a set of
//! descriptors that lives as long as its node, a socket under a name that QEMU takes at once.
//!
//! A file goes so where QEMU takes it, so that it is the one that was opened here, and a QEMU of another user, as
//! libvirt's are, need not be able to open it. `qemu-storage-daemon` takes no descriptors: it is told the path, and
//! whether it opened the same file is looked at afterwards. The socket is in a folder of the job's own, so its path is
//! tried first.

use super::monitor::{Monitor, MonitorError};
use super::opened::Look;
use rustix::fs::{Mode, OFlags};
use serde::Deserialize;
use serde_json::{Value, json};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Names the NBD server's socket for the moment between two commands.
const SOCKET_NAME: &str = "fbx-nbd";

/// Adds the node `name` by `blockdev-add`, whose options `file` names the file by: its path, or what stands for a
/// descriptor.
///
/// # Errors
/// What QEMU said to the path; [`MonitorError::OtherFile`] where it opened another file by it.
pub(super) async fn add_node(
    monitor: &Monitor,
    name: &str,
    path: &Path,
    descriptor: Option<BorrowedFd<'_>>,
    options: impl Fn(Value) -> Value,
) -> Result<(), MonitorError> {
    if let Some(descriptor) = descriptor {
        match by_descriptor(monitor, descriptor, &options).await {
            // That it does not go this way says less than why QEMU may not open the path.
            Err(error) if error.is_refusal() => {}
            done => return done,
        }
    }
    add_by_path(monitor, name, path, descriptor, options).await
}

/// As [`add_node`], for a node whose file QEMU has to show by its path.
///
/// # Errors
/// As [`add_node`].
pub(super) async fn add_by_path(
    monitor: &Monitor,
    name: &str,
    path: &Path,
    descriptor: Option<BorrowedFd<'_>>,
    options: impl Fn(Value) -> Value,
) -> Result<(), MonitorError> {
    let look = descriptor.and_then(|descriptor| Look::at(descriptor, monitor.peer()));
    let added = monitor.execute_raw("blockdev-add", options(json!(path)));
    added.await?;
    if !look.is_some_and(|look| look.saw_another()) {
        return Ok(());
    }
    let node = json!({ "node-name": name });
    monitor.execute_raw("blockdev-del", node).await?;
    Err(MonitorError::OtherFile { path: path.into() })
}

async fn by_descriptor(
    monitor: &Monitor,
    descriptor: BorrowedFd<'_>,
    options: &impl Fn(Value) -> Value,
) -> Result<(), MonitorError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Added {
        fdset_id: u64,
    }
    let owned = reopened(descriptor)?;
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
    let address = json!({ "addr": { "type": "fd", "data": { "str": SOCKET_NAME } } });
    let started = with_socket(
        monitor,
        socket.into(),
        SOCKET_NAME,
        "nbd-server-start",
        address,
    );
    let started = started.await;
    if started.is_err() {
        let _ = std::fs::remove_file(path);
    }
    started
}

/// Runs a command whose arguments mean `socket` by the `name` that it has for this moment.
///
/// # Errors
/// Where QEMU does not take it, or refuses the command.
pub(super) async fn with_socket(
    monitor: &Monitor,
    socket: OwnedFd,
    name: &str,
    command: &str,
    arguments: Value,
) -> Result<(), MonitorError> {
    let named = json!({ "fdname": name });
    monitor.execute_with(socket, "getfd", named.clone()).await?;
    let done = monitor.execute_raw(command, arguments).await;
    if done.is_err() {
        // QEMU may have taken it or not.
        let _ = monitor.execute_raw("closefd", named).await;
    }
    done.map(drop)
}

/// The same file, opened once more: a description that is shared with QEMU would share its errors of writing back, of
/// which each is told once.
fn reopened(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, MonitorError> {
    let flags = rustix::fs::fcntl_getfl(descriptor).map(|flags| flags & OFlags::RWMODE);
    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let reopened =
        flags.and_then(|flags| rustix::fs::open(link, flags | OFlags::CLOEXEC, Mode::empty()));
    match reopened {
        Ok(reopened) => Ok(reopened),
        Err(_) => descriptor
            .try_clone_to_owned()
            .map_err(|source| MonitorError::Descriptor { source }),
    }
}
