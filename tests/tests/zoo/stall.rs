//! A server and an archive that stop answering in the middle of a job.

use crate::scene::Scene;
use crate::{Row, row};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Order, QemuState, component, eventually};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Passes bytes on between clients and a server, until the server has sent so many. Whatever it sends after that never
/// comes, and every connection stays open.
///
/// It goes on taking them in: QEMU cannot drain a disk, and so stops as a whole, while a client of its NBD server does
/// not read.
pub(super) struct Relay {
    pub(super) socket: PathBuf,
    state: Arc<State>,
}

struct State {
    most: u64,
    sent: AtomicU64,
    stop: AtomicBool,
}

impl Relay {
    pub(super) fn start(server: &Path, socket: &Path, most: u64) -> Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let state = Arc::new(State {
            most,
            sent: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let (server, shared) = (server.to_path_buf(), Arc::clone(&state));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if shared.stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(upstream) = UnixStream::connect(&server) else {
                    return;
                };
                let (Ok(from), Ok(to)) = (client.try_clone(), upstream.try_clone()) else {
                    return;
                };
                std::thread::spawn(move || copy(from, to, |_| true));
                let state = Arc::clone(&shared);
                let passes = move |bytes| {
                    state.sent.fetch_add(bytes, Ordering::Relaxed) + bytes <= state.most
                };
                std::thread::spawn(move || copy(upstream, client, passes));
            }
        });
        Ok(Self {
            socket: socket.into(),
            state,
        })
    }

    pub(super) fn has_stalled(&self) -> bool {
        self.state.sent.load(Ordering::Relaxed) > self.state.most
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        // Wakes the listening thread so that it sees the flag.
        let _ = UnixStream::connect(&self.socket);
    }
}

/// Until one side closes; what `passes` refuses is dropped.
fn copy(mut from: UnixStream, mut to: UnixStream, passes: impl Fn(u64) -> bool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if passes(count as u64) && to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// A small file system of its own, which can be frozen: whoever writes to it then waits.
struct Freezer {
    mount: PathBuf,
    mounted: bool,
}

impl Freezer {
    /// None where this machine does not let us, with its words.
    fn mount(image: &Path, mount: &Path) -> Result<Self, String> {
        let made = || -> std::io::Result<()> {
            std::fs::File::create(image)?.set_len(48 << 20)?;
            std::fs::create_dir(mount)
        };
        made().map_err(|error| error.to_string())?;
        let mut freezer = Self {
            mount: mount.into(),
            mounted: false,
        };
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(image)
            .arg(mount))?;
        freezer.mounted = true;
        // Tried once, so that what comes later can count on it.
        freezer.freeze()?;
        freezer.thaw()?;
        Ok(freezer)
    }

    fn freeze(&self) -> Result<(), String> {
        run(Command::new("fsfreeze").arg("-f").arg(&self.mount))
    }

    fn thaw(&self) -> Result<(), String> {
        run(Command::new("fsfreeze").arg("-u").arg(&self.mount))
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if self.mounted {
            let _ = self.thaw();
            let _ = run(Command::new("umount").arg("-l").arg(&self.mount));
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}

/// The archive's file system takes no more bytes and says nothing, as a network's does that is gone. The run ends when
/// its time is up, and while the archive still hangs QEMU is as before and the operator has been told.
pub(super) fn frozen_archive(scene: &mut Scene) -> Result<Option<Row>> {
    let (image, mount) = (scene.site.path("frozen.img"), scene.site.path("frozen"));
    let freezer = match Freezer::mount(&image, &mount) {
        Ok(freezer) => freezer,
        Err(why) => {
            fleecebox_tests::not_shown(&format!(
                "stalled-archive: no file system can be frozen here: {why}"
            ));
            return Ok(None);
        }
    };
    let policy = "[provider.limits]\nwall-seconds = 3\n";
    scene.configure("hostile", &component("trickles")?, policy)?;
    let archive = mount.join("archive");
    std::fs::create_dir(&archive)?;
    let honest = Order {
        archive,
        full: true,
        ..scene.honest.clone()
    };
    scene.site.backup(&honest)?;
    scene.proxy.references()?;
    let order = Order {
        provider: "hostile".into(),
        ..honest.clone()
    };
    let before = QemuState::read(scene.daemon.monitors())?;
    let mut told_after = Duration::ZERO;
    let command = scene.site.backup_command(&order);
    let began = Instant::now();
    let attack = scene.attack_meanwhile(&command, |scene, running| {
        let soon = Duration::from_secs(60);
        running.wait_for_line(soon, |line| line.contains("one block more"))?;
        freezer.freeze().map_err(anyhow::Error::msg)?;
        let frozen = Instant::now();
        running.wait_for_line(soon, |line| line.starts_with("fleecebox: "))?;
        told_after = frozen.elapsed();
        // The references are copies that QEMU makes for the test alone, and end by themselves.
        scene.proxy.references()?;
        let clean = eventually("QEMU to be as before", soon, || {
            let now = QemuState::read(scene.daemon.monitors())?;
            Ok(now.differences(&before, |_| false).is_empty().then_some(()))
        });
        freezer.thaw().map_err(anyhow::Error::msg)?;
        clean
    })?;
    let took = began.elapsed();
    let told = &attack.outcome.stderr;
    ensure!(attack.outcome.code() == Some(1), "{told}");
    for says in [
        "it ran for longer than its limit of 3 s (wall-seconds)",
        "the archive does not answer",
    ] {
        ensure!(told.contains(says), "{says:?}: {told}");
    }
    ensure!(
        told_after < Duration::from_secs(40),
        "it took {told_after:?} to tell"
    );
    let next = scene.site.backup(&honest)?;
    let references = scene.proxy.references()?;
    scene
        .site
        .check(&honest, &next, &references)
        .context("the next one to that archive")?;
    scene.back_up_honestly()?;
    Ok(Some(row("stalled-archive", &attack, took)))
}
