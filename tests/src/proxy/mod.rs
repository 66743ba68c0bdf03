//! A QMP proxy between the product and QEMU. It passes every line on as it is, with two
//! exceptions that the tests ask for:
//! - a `transaction` that starts point-in-time jobs gets an independent full copy of each disk
//!   added to it (see [`mod@reference`]), so that a test knows the bytes of that moment;
//! - a command can meet a [`Fault`].

mod fault;
mod reference;
mod relay;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use tempfile::TempDir;

pub use fault::{At, Fault, Held, Stage, What};
pub use reference::ReferenceImage;

use crate::{Monitors, eventually};
use fault::Faults;
use reference::References;
use relay::Relay;

const CONNECTIONS_LIMIT: Duration = Duration::from_secs(120);

/// A running proxy. When it is dropped it listens no more and cuts its connections; QEMU is left
/// as it is, references that nobody waited for included.
#[derive(Debug)]
pub struct Proxy {
    relay: Arc<Relay>,
    stop: Arc<AtomicBool>,
    socket: PathBuf,
    // Holds the socket and the reference images.
    _folder: TempDir,
}

impl Proxy {
    /// Listens on a socket of its own and connects each client to QEMU's product monitor. Like
    /// QEMU itself, it serves a second client when the first one has gone.
    ///
    /// # Errors
    /// When there is no room for a socket.
    pub fn start(monitors: &Monitors) -> Result<Self> {
        let folder = TempDir::with_prefix("fleecebox-proxy-")?;
        let socket = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&socket)?;
        let relay = Arc::new(Relay {
            product: monitors.product.clone(),
            references: References::new(&monitors.references, folder.path()),
            faults: Faults::default(),
            transactions: Mutex::default(),
        });
        let stop = Arc::new(AtomicBool::new(false));
        let (for_thread, stopped) = (Arc::clone(&relay), Arc::clone(&stop));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { return };
                let relay = Arc::clone(&for_thread);
                std::thread::spawn(move || relay.serve(client));
            }
        });
        Ok(Self {
            relay,
            stop,
            socket,
            _folder: folder,
        })
    }

    /// Where the product has to connect, in place of QEMU's monitor.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Lets the product's next command of that kind meet a fault. Each fault happens once.
    pub fn inject(&self, fault: Fault) {
        self.relay.faults.inject(fault);
    }

    /// The names of the commands that came so far, in their order, `qmp_capabilities` included.
    /// Run a job once undisturbed, then once per entry with a [`Fault`] at that number.
    pub fn commands(&self) -> Vec<String> {
        self.relay.faults.commands()
    }

    /// Forgets the commands that came, so that numbers of faults count from here.
    pub fn forget_commands(&self) {
        self.relay.faults.forget_commands();
    }

    /// The actions of each transaction that came so far, as the product gave them.
    pub fn transactions(&self) -> Vec<Value> {
        relay::lock(&self.relay.transactions).clone()
    }

    /// Waits until a command has met a [`What::Hold`]. The product waits for its answer until the
    /// returned value is let go.
    ///
    /// # Errors
    /// When none has within `limit`.
    pub fn wait_held(&self, limit: Duration) -> Result<Held> {
        self.relay.faults.wait_held(limit)
    }

    /// Waits until all that a client sent which is gone since has been passed on and answered: one that was killed may
    /// have left a transaction in its socket.
    ///
    /// # Errors
    /// When a client is still there after two minutes.
    pub fn wait_for_clients_to_go(&self) -> Result<()> {
        eventually("the end of all connections", CONNECTIONS_LIMIT, || {
            // Each connection holds the relay while it lasts, and so do this value and the listening thread.
            Ok((Arc::strong_count(&self.relay) == 2).then_some(()))
        })
    }

    /// Waits for the reference copies of every transaction since the last call, then takes their
    /// jobs and nodes out of QEMU. In the order of the transactions and of the disks in them.
    ///
    /// # Errors
    /// When a copy failed or could not be made, QEMU is gone, or it takes longer than two minutes.
    pub fn references(&self) -> Result<Vec<ReferenceImage>> {
        self.relay.references.finish()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.relay.faults.cut_all();
        // Wakes the listening thread so that it sees the flag.
        let _ = UnixStream::connect(&self.socket);
    }
}
