//! Files that are opened here and then by QEMU, which may be root's: whoever can write to their folder puts another one in
//! their place in between.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    At, Backup, Disk, Emulator, Fault, MIB, Outcome, Proxy, QemuState, Random, Running, Site,
    Stage, StorageDaemon, What, compare, eventually,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
const SAYS: &str = "QEMU opened another file than the one that was at";

fn one_disk(folder: &Path) -> Result<Vec<String>> {
    let file = folder.join("a");
    Random::new(1).fill_file(&file, 1)?;
    let node = json!({"driver": "raw", "node-name": "na",
        "file": {"driver": "file", "filename": file}});
    let device = "virtio-blk-pci,id=va,drive=na";
    Ok(["-blockdev", &node.to_string(), "-device", device]
        .map(Into::into)
        .to_vec())
}

/// A file that joins the backup, and one that is nobody's business.
fn with_extra(site: &Site) -> Result<()> {
    fs::write(site.path("tpm"), [7; 4096])?;
    fs::write(site.path("secret"), [9; 4096])?;
    let tpm = site.path("tpm").display().to_string();
    site.configure(&format!("[vm.web.extra]\ntpm = '{tpm}'\n"))
}

/// The file at `path` gives way to a link to the secret.
fn replace(site: &Site, path: &Path) -> Result<()> {
    fs::rename(path, site.path("moved"))?;
    Ok(symlink(site.path("secret"), path)?)
}

/// Lets the job open the file and stand still right before QEMU does, replaces it, and lets the job go on.
fn replaced_in_between(site: &Site, running: Running) -> Result<Outcome> {
    let journal = site.path("state/vms/web/journal.json");
    eventually("the job to stand still", LIMIT, || {
        Ok(journal.exists().then_some(()))
    })?;
    replace(site, &site.path("tpm"))?;
    let job = Pid::from_raw(running.process().pid).context("no such process")?;
    kill_process(job, Signal::CONT)?;
    running.finish()
}

fn refused(outcome: &Outcome) -> Result<()> {
    ensure!(
        outcome.code() == Some(1),
        "{:?}: {}",
        outcome.code(),
        outcome.stderr
    );
    ensure!(outcome.stderr.contains(SAYS), "{}", outcome.stderr);
    Ok(())
}

#[test]
fn a_machine_reads_the_file_that_was_opened_whatever_is_in_its_place() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(one_disk)?;
    with_extra(&site)?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let command = site.backup_command(&order);
    let running = command.env("FLEECEBOX_STOP_AT", "preparing").start()?;
    let outcome = replaced_in_between(&site, running)?.assert_success();
    let backup = Backup::told_by(&outcome)?;
    let restored = site.restore(&order.archive, &backup.id)?;
    compare::same_bytes(&restored.join("tpm.raw"), &site.path("moved"))
}

#[test]
fn a_storage_daemon_that_opened_another_file_is_found_out_by_its_descriptors() -> Result<()> {
    let site = Site::new()?;
    let daemon = StorageDaemon::start(&[Disk::raw("da", MIB)])?;
    with_extra(&site)?;
    let before = QemuState::read(daemon.monitors())?;
    let order = site.order(&daemon, "chunked")?;
    let command = site.backup_command(&order);
    let running = command.env("FLEECEBOX_STOP_AT", "preparing").start()?;
    // That somebody else opens the one that was meant proves nothing.
    let outcome = replaced_in_between(&site, running)?;
    refused(&outcome)?;
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    site.check_no_fleecing_images()
}

/// Behind a relay, whose descriptors are not QEMU's, and which passes none on.
#[test]
fn behind_a_relay_the_file_itself_tells_that_nobody_opened_it() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(one_disk)?;
    let proxy = Proxy::start(vm.monitors())?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let order = order.through(&proxy);
    let before = QemuState::read(vm.monitors())?;
    let hold = || Fault {
        at: At::Named("blockdev-add", 1),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    };
    with_extra(&site)?;
    for fleecing in [false, true] {
        proxy.forget_commands();
        proxy.inject(hold());
        if fleecing {
            site.configure("")?;
        }
        let running = site.backup_command(&order).start()?;
        let held = proxy.wait_held(LIMIT)?;
        if fleecing {
            fs::remove_file(site.path("moved"))?;
            let images = site.fleecing_images()?;
            let image = images.first().context("no fleecing image")?;
            replace(&site, &site.path("fleecing").join(image))?;
        } else {
            replace(&site, &site.path("tpm"))?;
        }
        held.go_on();
        refused(&running.finish()?)?;
        QemuState::read(vm.monitors())?.assert_restored(&before, |_| false);
        site.check_no_fleecing_images()?;
        ensure!(fs::read(site.path("secret"))? == [9; 4096]);
    }
    Ok(())
}
