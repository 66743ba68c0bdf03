//! A domain with a Linux guest in it, whose own agent freezes its file systems, through libvirt, while it writes all the
//! while.

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Domain, Fleecebox, Libvirt, Running, Site, compare, component, eventually,
};
use std::time::Duration;

pub(super) type Case = (&'static str, fn(&Libvirt) -> Result<()>);

pub(super) const ALL: &[Case] = &[("guest", guest)];

const LIMIT: Duration = Duration::from_secs(60);

/// What the log of libvirt has when the agent is told to freeze.
const FREEZES: &str = "guest-fsfreeze-freeze";

/// Everything that wants a guest, in one, as it takes its time to boot.
fn guest(libvirt: &Libvirt) -> Result<()> {
    let domain = libvirt.guest("guest")?;
    let site = Site::new()?;
    let first = frozen(&site, &domain)?;
    let second = frozen(&site, &domain)?;
    for volume in ["vda", "sda"] {
        second.assert_base(volume, Some(&first));
    }
    never(&site, &domain)?;
    killed_while_frozen(&site, &domain)?;
    frozen(&site, &domain)?;
    asleep(&site, &domain)
}

fn command(site: &Site, domain: &Domain<'_>) -> Result<Fleecebox> {
    // Its name is the domain's.
    let command = site.command(&["backup", "--json", "--libvirt", &domain.name]);
    Ok(command
        .arg("--libvirt-uri")
        .arg(domain.libvirt().uri())
        .arg("--provider")
        .arg(component("chunked")?)
        .arg("--archive")
        .arg(site.archive()))
}

/// The guest is frozen for the point in time and writes on, and each file system is whole as it was frozen.
fn frozen(site: &Site, domain: &Domain<'_>) -> Result<Backup> {
    let outcome = command(site, domain)?.run()?.assert_success();
    let said = &outcome.stderr;
    ensure!(
        said.contains("the guest's agent froze 2 file systems"),
        "{said}"
    );
    ensure!(
        outcome.document()?["frozen_ms"].is_u64(),
        "{}",
        outcome.stdout
    );
    thawed(domain)?;
    let backup = Backup::told_by(&outcome)?;
    site.verify(&site.archive(), &backup.id)?;
    let restored = site.restore(&site.archive(), &backup.id)?;
    for volume in ["vda", "sda"] {
        compare::ext4_is_clean(&restored.join(format!("{volume}.raw")))?;
    }
    let state = domain.virsh(&["domstate"])?;
    ensure!(state.trim() == "running", "{state}");
    Ok(backup)
}

fn thawed(domain: &Domain<'_>) -> Result<()> {
    let status = domain.agent("guest-fsfreeze-status")?;
    ensure!(status == "thawed", "{status}");
    Ok(())
}

fn never(site: &Site, domain: &Domain<'_>) -> Result<()> {
    let asked = || domain.libvirt().agent_log().matches(FREEZES).count();
    let before = asked();
    let command = command(site, domain)?.arg("--freeze").arg("never");
    let outcome = command.run()?.assert_success();
    ensure!(
        outcome.stderr.contains("`freeze` is `never`"),
        "{}",
        outcome.stderr
    );
    ensure!(asked() == before, "the agent was asked all the same");
    Ok(())
}

/// A job that dies while the guest is frozen leaves that to its watchdog, which has to go through libvirt as well.
fn killed_while_frozen(site: &Site, domain: &Domain<'_>) -> Result<()> {
    let before = domain.libvirt().agent_log().matches(FREEZES).count();
    let running: Running = command(site, domain)?.start()?;
    eventually("the freeze", LIMIT, || {
        let asked = domain.libvirt().agent_log().matches(FREEZES).count();
        Ok((asked > before).then_some(()))
    })?;
    let outcome = running.kill_alone()?;
    let said = &outcome.stderr;
    ensure!(outcome.signal() == Some(9), "it ended before: {said}");
    ensure!(
        said.contains("its watchdog makes the VM run again"),
        "{said}"
    );
    thawed(domain).context("after the watchdog")
}

/// No agent answers in a guest that stands still, and none is asked.
fn asleep(site: &Site, domain: &Domain<'_>) -> Result<()> {
    domain.virsh(&["suspend"])?;
    let outcome = command(site, domain)?.run()?.assert_success();
    let said = &outcome.stderr;
    ensure!(
        said.contains("the VM does not run (it is paused)"),
        "{said}"
    );
    let state = domain.virsh(&["domstate"])?;
    ensure!(state.trim() == "paused", "{state}");
    Ok(())
}
