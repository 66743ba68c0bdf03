//! Which process QEMU is, where the monitor's other end is not QEMU itself: libvirt says no such thing, and what it writes
//! down is for itself.
//!
//! QEMU is handed a socket to listen on. Whoever then connects is told by the kernel who called listen(2) last
//! (`SO_PEERCRED`, unix(7)), by an id that counts here, wherever QEMU runs and whoever started it.

use super::descriptor;
use super::monitor::Monitor;
use rustix::net::sockopt::socket_peercred;
use serde_json::json;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

/// Names the socket for the moment between two commands.
const SOCKET_NAME: &str = "fbx-process";

/// The process, if it can be told.
pub(super) async fn behind(monitor: &Monitor) -> Option<i32> {
    // A name that is no file, and nobody else's.
    let name = format!("{SOCKET_NAME}-{:016x}", getrandom::u64().ok()?);
    let address = SocketAddr::from_abstract_name(&name).ok()?;
    let listener = UnixListener::bind_addr(&address).ok()?;
    let socket = json!({ "type": "fd", "data": { "str": SOCKET_NAME } });
    let data = json!({ "addr": socket, "server": true, "wait": false });
    let device = json!({ "id": name, "backend": { "type": "socket", "data": data } });
    let listener = listener.into();
    let added = descriptor::with_socket(monitor, listener, SOCKET_NAME, "chardev-add", device);
    added.await.ok()?;
    let listens = UnixStream::connect_addr(&address).and_then(|it| Ok(socket_peercred(&it)?));
    let removed = monitor.execute_raw("chardev-remove", json!({ "id": name }));
    // It goes with QEMU at the latest.
    let _ = removed.await;
    let process = listens.ok()?.pid.as_raw_nonzero().get();
    // It was this one until QEMU took the socket.
    (process.cast_unsigned() != std::process::id()).then_some(process)
}
