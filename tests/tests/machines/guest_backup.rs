//! Backups of a booted Linux guest: virtio-blk on a raw file and virtio-scsi on qcow2, ext4 on both, frozen by the
//! guest's own agent for the point in time, written to by the guest's own processes all the while.
//!
//! `e2fsck -fn` may not replay a journal. It calls an image clean because a file system that is frozen has written its
//! journal back; the same image without the freeze would need a replay first.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    At, Backup, Fault, Fleecebox, Guest, Order, Proxy, QemuState, Site, Stage, What, compare,
    component,
};
use rustix::process::{Pid, Signal, kill_process};

/// The volumes, as the product names them, with their nodes.
const VOLUMES: [(&str, &str); 2] = [("device-a", "disk-a"), ("device-b", "disk-b")];
/// For what takes fractions of a second on a machine with nothing else to do.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest, a proxy that makes references, and folders to back it up to.
struct Setting {
    guest: Guest,
    proxy: Proxy,
    site: Site,
    before: QemuState,
}

impl Setting {
    fn new() -> Result<Self> {
        let guest = Guest::boot(&Guest::usual_disks())?;
        let proxy = Proxy::start(guest.monitors())?;
        let before = QemuState::read(guest.monitors())?;
        Ok(Self {
            guest,
            proxy,
            site: Site::new()?,
            before,
        })
    }

    fn command(&self, provider: &str) -> Result<Fleecebox> {
        let order = Order {
            vm: "web".into(),
            qmp: self.proxy.socket().into(),
            nbd: None,
            disks: Vec::new(),
            provider: component(provider)?
                .to_str()
                .context("a path in UTF-8")?
                .into(),
            archive: self.site.archive(),
            full: false,
        };
        let command = self.site.backup_command(&order);
        Ok(command.arg("--agent").arg(self.guest.agent_socket()))
    }

    /// Makes a backup and holds it against everything that it is measured by.
    fn backup(&mut self, provider: &str, base: Option<&Backup>) -> Result<Backup> {
        self.guest.wait_for_writes()?;
        let position = self.guest.position();
        let outcome = self.command(provider)?.run()?.assert_success();
        let frozen = outcome.document()?["frozen_ms"].as_u64();
        let backup = Backup::told_by(&outcome)?;
        self.site.check_no_fleecing_images()?;
        // The reports that cover the freeze are those to come.
        self.guest.wait_for_writes()?;
        let worst = self.guest.worst_write_latency(position);
        println!(
            "{provider}: {:?} in all, frozen for {frozen:?} ms, worst write in the guest {worst:?}",
            outcome.took
        );
        ensure!(frozen.is_some(), "the guest was not frozen");
        ensure!(worst < Some(LIMIT), "a write of the guest took {worst:?}");

        for (volume, _) in VOLUMES {
            backup.assert_base(volume, base);
            let dirty = backup.dirty_bytes(volume);
            ensure!(
                base.is_none() || dirty > 0,
                "the guest changed nothing on {volume}"
            );
        }
        self.check_restored(&backup)?;
        self.check_undisturbed()?;
        Ok(backup)
    }

    fn check_restored(&self, backup: &Backup) -> Result<()> {
        let references = self.proxy.references()?;
        ensure!(references.len() == VOLUMES.len(), "{references:?}");
        self.site.verify(&self.site.archive(), &backup.id)?;
        let restored = self.site.restore(&self.site.archive(), &backup.id)?;
        for (volume, node) in VOLUMES {
            let reference = references.iter().find(|reference| reference.device == node);
            let reference = &reference
                .with_context(|| format!("no reference of {node}"))?
                .path;
            let image = restored.join(format!("{volume}.raw"));
            compare::same_bytes(&image, reference).with_context(|| backup.id.clone())?;
            compare::ext4_is_clean(&image).with_context(|| backup.id.clone())?;
        }
        Ok(std::fs::remove_dir_all(restored)?)
    }

    /// QEMU and the guest are as if there had been no backup, bar the bitmaps.
    fn check_undisturbed(&mut self) -> Result<()> {
        let now = QemuState::read(self.guest.monitors())?;
        now.assert_restored(&self.before, |_| true);
        let spoilt: Vec<_> = now
            .bitmaps()
            .filter(|bitmap| !bitmap.recording || bitmap.inconsistent)
            .collect();
        ensure!(spoilt.is_empty(), "{spoilt:?}");
        ensure!(self.guest.is_running()?, "the VM is stopped");
        ensure!(!self.guest.is_frozen()?, "the guest is frozen");
        self.guest.wait_for_writes()
    }

    /// What the agent takes for a freeze and a thaw without anything between.
    fn agents_own_freeze(&self) -> Result<Duration> {
        let mut agent = self.guest.agent()?;
        let started = Instant::now();
        agent.execute("guest-fsfreeze-freeze")?;
        agent.execute("guest-fsfreeze-thaw")?;
        Ok(started.elapsed())
    }
}

#[test]
fn both_providers_restore_each_point_in_time_of_a_running_guest() -> Result<()> {
    let mut setting = Setting::new()?;
    // Each has its own namespace, so its own bitmaps and its own line of backups on the same disks.
    let mut last: [(&str, Option<Backup>); 2] = [("chunked", None), ("image", None)];
    for _ in 0..4 {
        println!(
            "the agent's own freeze and thaw: {:?}",
            setting.agents_own_freeze()?
        );
        for (provider, base) in &mut last {
            *base = Some(setting.backup(provider, base.as_ref())?);
        }
    }
    let state = QemuState::read(setting.guest.monitors())?;
    let mut nodes: Vec<_> = state.bitmaps().map(|bitmap| &bitmap.node[..]).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["disk-a", "disk-a", "disk-b", "disk-b"]);
    Ok(())
}

#[test]
fn a_guest_whose_job_is_killed_or_stopped_while_it_is_frozen_is_thawed() -> Result<()> {
    let mut setting = Setting::new()?;
    let mut base = setting.backup("chunked", None)?;
    let mut listed = 0;
    // The snapshot is not taken yet; it is taken and the job does not know. A job that is stopped is killed by its
    // watchdog, as it holds the agent's only connection.
    for (stage, signal) in [
        (Stage::BeforeQemu, Signal::KILL),
        (Stage::BeforeAnswer, Signal::KILL),
        (Stage::BeforeQemu, Signal::STOP),
    ] {
        setting.proxy.forget_commands();
        setting.proxy.inject(Fault {
            at: At::Named("transaction", 1),
            stage,
            what: What::Hold,
        });
        let running = setting.command("chunked")?.start()?;
        let held = setting.proxy.wait_held(LIMIT)?;
        let guest = &mut setting.guest;
        // What was under way is still reported; then nothing comes any more.
        let _ = guest.wait_for_writes_within(Duration::from_secs(1));
        let wrote = guest.wait_for_writes_within(Duration::from_secs(2)).is_ok();
        ensure!(!wrote, "{stage:?}: the guest is not frozen");

        let pid = Pid::from_raw(running.process().pid).context("no process")?;
        kill_process(pid, signal)?;
        let killed = Instant::now();
        guest
            .wait_for_writes_within(LIMIT)
            .with_context(|| format!("{stage:?}: nobody thawed the guest"))?;
        println!(
            "{stage:?}, {signal:?}: writes again {:?} after it",
            killed.elapsed()
        );
        // The watchdog needs the monitor for the rest, and ends when that is done.
        held.cut();
        let outcome = running.finish()?;
        assert_eq!(outcome.signal(), Some(9));
        ensure!(!guest.is_frozen()?, "{stage:?}: the guest is frozen");
        // Of a backup that never was.
        for reference in setting.proxy.references()? {
            std::fs::remove_file(reference.path)?;
        }
        listed += 1;
        assert_eq!(setting.site.list(&setting.site.archive())?.len(), listed);

        let next = setting.backup("chunked", Some(&base))?;
        let said = &next.said;
        ensure!(
            said.contains("died at step 'snapshot'"),
            "{stage:?}: {said}"
        );
        base = next;
    }
    Ok(())
}
