//! Who has a job on this QEMU, seen from wherever somebody looks: two monitors, two state folders, two containers.
//!
//! A claim is a character device in QEMU, `fbx-owner-N`, whose other end is a socket of the job's process: QEMU shows it as
//! connected while that lives, and as disconnected as soon as it is gone, however it went. N is larger than that of every
//! claim that is there, and QEMU gives no id twice. A live claim with a smaller N goes before; who finds one takes its own
//! back. So one at most is the holder. The holder alone removes what dead ones left: new claims have larger numbers than
//! its own, so none that it removes can have come to life meanwhile.
//!
//! Beside it stands a device without function whose id says whose the claim is.

use super::descriptor;
use super::monitor::{Monitor, MonitorError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;
use tokio::time::sleep;

const PREFIX: &str = "fbx-owner-";

/// Names the socket for the moment between two commands.
const SOCKET_NAME: &str = "fbx-owner";

/// How QEMU begins to tell of a device whose other end is gone.
const DISCONNECTED: &str = "disconnected:";

/// How often, and with which pause, a live claim is looked at again: QEMU hears of the end of a process that was killed
/// right before in its next turn.
const LOOKS: usize = 10;
const PAUSE: Duration = Duration::from_millis(20);

/// How often the next number is tried for where others take it.
const TRIES: usize = 100;

/// Why this QEMU is not ours.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another job has it.
    #[error(
        "another job is at work in this QEMU: {owner}; wait for it to end, or end it (what it leaves then is cleaned up by itself)"
    )]
    Busy {
        /// Whose it is.
        owner: String,
    },
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

/// This process has the only job in QEMU until it is released or the process ends.
#[derive(Debug)]
pub struct Claim {
    number: u64,
    /// Open as long as the claim is alive.
    _socket: OwnedFd,
}

/// A claim in QEMU.
#[derive(Debug)]
struct Seen {
    number: u64,
    alive: bool,
    owner: Option<String>,
}

impl Claim {
    /// Claims QEMU. `folder` is one that QEMU can reach, for one that takes no descriptors. Nothing where QEMU takes no
    /// claim at all.
    ///
    /// # Errors
    /// [`ClaimError::Busy`] where another job that is alive has it.
    pub async fn make(monitor: &Monitor, folder: &Path) -> Result<Option<Self>, ClaimError> {
        for _ in 0..TRIES {
            refuse_live(monitor, u64::MAX).await?;
            let seen = match claims(monitor).await {
                Err(error) if error.is_unknown_command() => return Ok(None),
                seen => seen?,
            };
            let highest = seen.iter().map(|claim| claim.number).max();
            let number = highest.unwrap_or_default().saturating_add(1);
            match add(monitor, number, folder).await {
                Ok(socket) => {
                    let claim = Self {
                        number,
                        _socket: socket,
                    };
                    return claim.hold(monitor).await.map(Some);
                }
                Err(MonitorError::Refused { description, .. }) if description.contains(EXISTS) => {}
                Err(MonitorError::Refused { .. } | MonitorError::Descriptor { .. }) => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ClaimError::Busy {
            owner: "several that begin at the same time".into(),
        })
    }

    /// Gives way to who was before, else cleans up after those that are gone.
    async fn hold(self, monitor: &Monitor) -> Result<Self, ClaimError> {
        if let Err(busy) = refuse_live(monitor, self.number).await {
            self.release(monitor).await;
            return Err(busy);
        }
        for device in devices(monitor).await? {
            if number_of(&device.label).is_some_and(|number| number < self.number) {
                remove(monitor, &device.label).await;
            }
        }
        let whose = json!({ "id": self.owner_id(), "backend": { "type": "null", "data": {} } });
        match monitor.execute_raw("chardev-add", whose).await {
            // It is for people.
            Err(error) if error.is_refusal() => {}
            added => drop(added?),
        }
        Ok(self)
    }

    fn owner_id(&self) -> String {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        // What the id of a device may have (QEMU's `id_wellformed`), and no more than is read.
        let plain = |c: &char| c.is_ascii_alphanumeric() || "-._".contains(*c);
        let host: String = host.trim().chars().filter(plain).take(64).collect();
        let (process, user) = (std::process::id(), rustix::process::getuid().as_raw());
        format!("{PREFIX}{}.{process}.{user}.{host}", self.number)
    }

    /// Takes the claim back. What fails is left to the next holder: with this value the claim is dead.
    pub async fn release(self, monitor: &Monitor) {
        remove(monitor, &self.owner_id()).await;
        remove(monitor, &format!("{PREFIX}{}", self.number)).await;
    }
}

/// Refuses where a job that is alive has this QEMU.
///
/// # Errors
/// Any [`ClaimError`].
pub async fn refuse_claimed(monitor: &Monitor) -> Result<(), ClaimError> {
    refuse_live(monitor, u64::MAX).await
}

/// Whether it has a claim with a number below that.
async fn refuse_live(monitor: &Monitor, below: u64) -> Result<(), ClaimError> {
    let mut looks = 0;
    loop {
        let seen = match claims(monitor).await {
            Err(error) if error.is_unknown_command() => return Ok(()),
            seen => seen?,
        };
        let mut live = seen.into_iter().filter(|claim| claim.alive);
        let Some(claim) = live.find(|claim| claim.number < below) else {
            return Ok(());
        };
        looks += 1;
        if looks == LOOKS {
            let owner = claim
                .owner
                .unwrap_or_else(|| "one that does not say whose it is".into());
            return Err(ClaimError::Busy { owner });
        }
        sleep(PAUSE).await;
    }
}

/// `ChardevInfo` of qapi/char.json.
#[derive(Debug, Deserialize)]
struct Device {
    label: String,
    filename: String,
}

async fn devices(monitor: &Monitor) -> Result<Vec<Device>, MonitorError> {
    monitor.query("query-chardev", json!({})).await
}

async fn claims(monitor: &Monitor) -> Result<Vec<Seen>, MonitorError> {
    let devices = devices(monitor).await?;
    let claims = devices.iter().filter_map(|device| {
        let number = device.label.strip_prefix(PREFIX)?.parse().ok()?;
        let owner = devices.iter().find_map(|it| owner(&it.label, number));
        Some(Seen {
            number,
            alive: !device.filename.starts_with(DISCONNECTED),
            owner,
        })
    });
    Ok(claims.collect())
}

/// The number of a claim, or of the device that says whose it is.
fn number_of(label: &str) -> Option<u64> {
    let rest = label.strip_prefix(PREFIX)?;
    rest.split('.').next()?.parse().ok()
}

/// Whose the claim of that number is, where the device says so.
fn owner(label: &str, number: u64) -> Option<String> {
    let mut parts = label.strip_prefix(PREFIX)?.splitn(4, '.');
    let claim: u64 = parts.next()?.parse().ok()?;
    let (process, user, host) = (parts.next()?, parts.next()?, parts.next()?);
    (claim == number).then(|| format!("process {process} of user {user} on {host}"))
}

/// By a descriptor, which a storage daemon does not take; else by a name that is no file, which a QEMU with a network of
/// its own, as in a container, does not see; else by a path in a folder that both see.
async fn add(monitor: &Monitor, number: u64, folder: &Path) -> Result<OwnedFd, MonitorError> {
    let goes_on = |added: &Result<OwnedFd, MonitorError>| match added {
        Err(MonitorError::Refused { description, .. }) => !description.contains(EXISTS),
        _ => false,
    };
    let added = add_by_descriptor(monitor, number).await;
    if !goes_on(&added) {
        return added;
    }
    let added = add_by_name(monitor, number).await;
    if !goes_on(&added) {
        return added;
    }
    add_by_path(monitor, number, folder).await
}

/// What QEMU says of an id that is there already.
const EXISTS: &str = "already exists";

fn device(number: u64, address: &Value) -> Value {
    let data = json!({ "addr": address, "server": false });
    json!({
        "id": format!("{PREFIX}{number}"),
        "backend": { "type": "socket", "data": data },
    })
}

async fn add_by_descriptor(monitor: &Monitor, number: u64) -> Result<OwnedFd, MonitorError> {
    let (ours, qemus) = UnixStream::pair().map_err(failed)?;
    let address = json!({ "type": "fd", "data": { "str": SOCKET_NAME } });
    let device = device(number, &address);
    descriptor::with_socket(monitor, qemus.into(), SOCKET_NAME, "chardev-add", device).await?;
    Ok(ours.into())
}

/// Nobody takes the connection: it stands as long as there is who listens, whoever else connects.
async fn add_by_name(monitor: &Monitor, number: u64) -> Result<OwnedFd, MonitorError> {
    let name = socket_name()?;
    let address = SocketAddr::from_abstract_name(&name).map_err(failed)?;
    let listener = UnixListener::bind_addr(&address).map_err(failed)?;
    let address = json!({ "type": "unix", "data": { "path": name, "abstract": true } });
    let added = monitor.execute_raw("chardev-add", device(number, &address));
    added.await.map(|_| listener.into())
}

async fn add_by_path(
    monitor: &Monitor,
    number: u64,
    folder: &Path,
) -> Result<OwnedFd, MonitorError> {
    let path = folder.join(socket_name()?);
    let listener = UnixListener::bind(&path).map_err(failed)?;
    let address = json!({ "type": "unix", "data": { "path": path } });
    let added = monitor.execute_raw("chardev-add", device(number, &address));
    let added = added.await;
    let _ = std::fs::remove_file(&path);
    added.map(|_| listener.into())
}

fn socket_name() -> Result<String, MonitorError> {
    let random = getrandom::u64().map_err(|error| failed(error.into()))?;
    Ok(format!("{SOCKET_NAME}-{random:016x}"))
}

fn failed(source: io::Error) -> MonitorError {
    MonitorError::Descriptor { source }
}

async fn remove(monitor: &Monitor, id: &str) {
    let _ = monitor
        .execute_raw("chardev-remove", json!({ "id": id }))
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_says_whose_it_is() {
        let of = |label| owner(label, 7);
        assert_eq!(
            of("fbx-owner-7.12.0.host.example.org").unwrap(),
            "process 12 of user 0 on host.example.org"
        );
        for other in [
            "fbx-owner-7",
            "fbx-owner-8.12.0.host",
            "serial0",
            "fbx-owner-",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(number_of("fbx-owner-7.12.0.host"), Some(7));
        assert_eq!(number_of("fbx-owner-x"), None);
    }
}
