//! A guest whose writes fail because a fleecing image cannot grow, with nobody there to give the backup up in time: QEMU
//! stops it, and it is continued as soon as nothing of the backup is left in QEMU.
//!
//! A suite of its own: beside others its guest was seen not to write for a minute after it was continued, on a machine with
//! more to do than it could.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use fleecebox_tests::{Fleecebox, Guest, MIB, QemuState, Running, Site, eventually};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

/// A small file system for fleecing images, unmounted with this value.
struct SmallFolder(PathBuf);

impl SmallFolder {
    /// Nothing where the kernel does not let us mount.
    fn mount(at: PathBuf) -> Result<Option<Self>> {
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"]);
        if !mount.arg(&at).status()?.success() {
            fleecebox_tests::not_shown("no file system can be mounted here (this needs root)");
            return Ok(None);
        }
        Ok(Some(Self(at)))
    }

    /// Leaves no room in it until the file that is returned is removed.
    fn fill(&self) -> Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path)?;
        let piece = vec![1; MIB as usize];
        let full = loop {
            if let Err(error) = std::io::Write::write_all(&mut file, &piece) {
                break error;
            }
        };
        ensure!(full.kind() == std::io::ErrorKind::StorageFull, "{full}");
        Ok(path)
    }
}

impl Drop for SmallFolder {
    fn drop(&mut self) {
        // What is still open in it goes with its owner.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn status(guest: &Guest) -> Result<String> {
    let status = guest.control()?.execute("query-status", json!({}))?;
    Ok(status["status"].as_str().unwrap_or_default().into())
}

/// Starts a backup that stops itself when its snapshot is there, and lets the guest write until it cannot.
fn stop_the_guest(
    guest: &Guest,
    small: &SmallFolder,
    command: Fleecebox,
) -> Result<(Running, PathBuf)> {
    let running = command.env("FLEECEBOX_STOP_AT", "running").start()?;
    let stat = format!("/proc/{}/stat", running.process().pid);
    eventually("the job to stop itself", LIMIT, || {
        let stat = std::fs::read_to_string(&stat)?;
        Ok(stat.contains(") T ").then_some(()))
    })?;
    let filler = small.fill()?;
    eventually("QEMU to stop the guest", LIMIT, || {
        Ok((status(guest)? == "io-error").then_some(()))
    })?;
    Ok((running, filler))
}

#[test]
fn a_guest_that_a_full_fleecing_image_stopped_is_continued() -> Result<()> {
    let site = Site::new()?;
    let Some(small) = SmallFolder::mount(site.path("fleecing"))? else {
        return Ok(());
    };
    let mut guest = Guest::boot(&Guest::usual_disks())?;
    let before = QemuState::read(guest.monitors())?;
    let order = site.order_for(&guest.monitors().product, "chunked")?;
    let command = || site.backup_command(&order);

    // The job lives: it goes on, and continues the guest when it is through.
    let (running, filler) = stop_the_guest(&guest, &small, command())?;
    std::fs::remove_file(filler)?;
    let pid = rustix::process::Pid::from_raw(running.process().pid);
    rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::CONT)?;
    let outcome = running.finish()?;
    ensure!(
        outcome.stderr.contains("it is continued now"),
        "{}",
        outcome.stderr
    );
    assert_eq!(status(&guest)?, "running", "{}", outcome.stderr);
    guest.wait_for_writes_within(LIMIT)?;

    // The job died: the next one does it.
    let (running, filler) = stop_the_guest(&guest, &small, command())?;
    running.kill()?;
    assert_eq!(status(&guest)?, "io-error");
    std::fs::remove_file(filler)?;
    let position = guest.position();
    let outcome = command().run()?.assert_success();
    ensure!(
        outcome.stderr.contains("it is continued"),
        "{}",
        outcome.stderr
    );
    guest.wait_for_writes_within(LIMIT)?;
    println!(
        "worst write in the guest: {:?}",
        guest.worst_write_latency(position)
    );
    // QEMU goes on showing the error of a device that it has long got over.
    let mut left = QemuState::read(guest.monitors())?.differences(&before, |_| true);
    left.retain(|line| !line.contains(".io-status"));
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}
