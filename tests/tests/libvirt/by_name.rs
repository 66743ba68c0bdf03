//! Domains by their names: nothing is configured in them, and all goes through libvirt.

use super::cases::{self, Case};
use super::scene::{Scene, Way};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Fleecebox, Outcome, Running, Site, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::time::Duration;

pub(super) const ALL: &[Case] = &[
    ("off", Way::Name, off),
    ("running", Way::Name, running),
    ("saved", Way::Name, saved),
    ("not-there", Way::Name, not_there),
    ("names", Way::Name, names),
    ("kept", Way::Name, kept),
    ("libvirtd-restarts", Way::Name, libvirtd_restarts),
    ("killed", Way::Name, killed),
    ("killed-while-away", Way::Name, killed_while_away),
    ("dies", Way::Name, dies),
    ("push-beside", Way::Name, push_beside),
    ("two-spellings", Way::Name, two_spellings),
    ("other-way", Way::Monitor, other_way),
    ("renamed", Way::Name, renamed),
    ("plugged", Way::Name, plugged),
    ("unplugged", Way::Name, unplugged),
    ("stopped-for-a-moment", Way::Name, stopped_for_a_moment),
];

const LIMIT: Duration = Duration::from_secs(60);

fn state(scene: &Scene) -> Result<String> {
    Ok(scene.virsh(&["domstate", "--reason"])?.trim().into())
}

/// Ends with that status, and says that.
fn ends(command: &Fleecebox, status: i32, words: &str) -> Result<Outcome> {
    let outcome = command.run()?;
    let (code, said) = (outcome.code(), &outcome.stderr);
    ensure!(code == Some(status), "{code:?} for {status}: {said}");
    ensure!(said.contains(words), "{words:?} is not said: {said}");
    Ok(outcome)
}

/// A job that has its snapshot and stands still.
fn holding(scene: &Scene) -> Result<Running> {
    let running = scene.command().env("FLEECEBOX_STOP_AT", "running");
    let running = running.start()?;
    let pid = running.process().pid;
    eventually("the job to stop itself", LIMIT, || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let state = stat.rsplit_once(") ").and_then(|(_, it)| it.chars().next());
        ensure!(state != Some('Z'), "the job ended: {}", running.said());
        Ok((state == Some('T')).then_some(()))
    })?;
    Ok(running)
}

fn go_on(running: &Running) -> Result<()> {
    let pid = Pid::from_raw(running.process().pid).context("no process")?;
    Ok(kill_process(pid, Signal::CONT)?)
}

/// Started paused by libvirt, and stopped again, each time without a loss of tracking.
fn off(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["destroy"])?;
    ends(&scene.command().arg("--dry-run"), 0, "")?;
    for _ in 0..2 {
        scene.back_up_stopped()?;
        let state = state(scene)?;
        ensure!(state == "shut off (destroyed)", "{state}");
    }
    scene.virsh(&["start", "--paused"])?;
    scene.goes_on()?;
    let told = scene.told();
    ensure!(told.matches("full").count() == 2, "{told}");
    Ok(())
}

/// A guest that runs goes on; one that is paused stays so, as in the other cases.
fn running(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["resume"])?;
    let without = "no channel org.qemu.guest_agent.0";
    ends(&scene.command(), 0, without)?;
    let required = scene.command().arg("--freeze").arg("required");
    ends(&required, 2, without)?;
    let state = state(scene)?;
    ensure!(state.starts_with("running"), "{state}");
    scene.virsh(&["suspend"])?;
    scene.goes_on()
}

/// A start would consume it, so the domain is left alone.
fn saved(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["managedsave"])?;
    let words = "Managed save: yes";
    ends(&scene.command().arg("--dry-run"), 2, words)?;
    let refused = ends(&scene.command(), 2, words)?;
    ensure!(
        refused.stderr.contains("managedsave-remove"),
        "{}",
        refused.stderr
    );
    let now = state(scene)?;
    ensure!(now == "shut off (saved)", "{now}");
    scene.virsh(&["managedsave-remove"])?;
    scene.back_up_stopped()?;
    scene.virsh(&["start", "--paused"])?;
    scene.goes_on()
}

/// No domain, no libvirt, another host's libvirt, two ways at once: each is named, and the user's to mend.
fn not_there(scene: &mut Scene) -> Result<()> {
    let name = std::mem::replace(&mut scene.name, "no such".into());
    ends(&scene.command(), 2, "has no domain 'no such'")?;
    scene.name = name;
    let list = scene.site.command(&["tracking", "list", "web"]);
    let configured = |keys: &str, words: &str| {
        let text = format!("[vm.web]\nlibvirt = 'web'\n{keys}\n");
        scene.site.configure(&text)?;
        ends(&list, 2, words)
    };
    configured("qmp = '/run/web.qmp'", "`qmp` beside `libvirt`")?;
    configured("start = ['true']", "`start` beside `libvirt`")?;
    configured("libvirt-uri = 'xen:///'", "no URI of libvirt's QEMU")?;
    configured("libvirt-uri = 'qemu+ssh://a/system'", "another host")?;
    let nowhere = "qemu+unix:///system?socket=/nowhere/libvirt-sock";
    configured(
        &format!("libvirt-uri = '{nowhere}'"),
        "/nowhere/libvirt-sock",
    )?;
    scene.site.configure("[vm.web]\nqmp = '/run/web.qmp'\n")?;
    let alone = ["tracking", "list", "web", "--libvirt-uri", nowhere];
    ends(&scene.site.command(&alone), 2, "no domain there")?;
    scene.site.configure("")?;
    scene.goes_on()
}

/// A disk goes by libvirt's name of it, and is found by QEMU's as well.
fn names(scene: &mut Scene) -> Result<()> {
    for name in ["vdb", "virtio-disk1"] {
        let only = scene.command().arg("--dry-run").arg("--disk").arg(name);
        let foretold = ends(&only, 0, "")?.document()?;
        let disks = foretold["disks"].as_array().context("no disks")?;
        ensure!(disks.len() == 1 && disks[0]["name"] == "vdb", "{foretold}");
    }
    let without = scene.command().arg("--dry-run").arg("--exclude").arg("sda");
    let foretold = ends(&without, 0, "")?.document()?;
    let disks = foretold["disks"].as_array().context("no disks")?;
    ensure!(disks.len() == 1 && disks[0]["name"] == "vdb", "{foretold}");
    ends(&scene.command().arg("--disk").arg("vda"), 2, "no disk vda")?;
    scene.goes_on()
}

/// What the domain is defined by is kept with its backups, as it was then, and held against its digest.
fn kept(scene: &mut Scene) -> Result<()> {
    let id = scene.last().to_owned();
    let show = |name: &str| {
        let command = scene.site.command(&["show", &id, "--attachment", name]);
        command.arg("--archive").arg(scene.site.archive())
    };
    let shown = ends(&show("domain.xml"), 0, "")?.stdout;
    let defined = scene.virsh(&["dumpxml", "--inactive"])?;
    ensure!(shown.trim_end() == defined.trim_end(), "{shown}");
    ends(&show("other.xml"), 2, "there is domain.xml")?;
    let backup = format!("namespaces/chunked/backups/{id}");
    let file = scene.site.archive().join(backup).join("kept/domain.xml");
    std::fs::write(&file, shown.replace("<vcpu", "<VCPU"))?;
    ends(&show("domain.xml"), 10, "digest")?;
    let verify = scene.site.command(&["verify", &id]).arg("--archive");
    let found = ends(&verify.arg(scene.site.archive()), 10, "")?;
    ensure!(found.stdout.contains("kept domain.xml"), "{}", found.stdout);
    std::fs::write(&file, shown)?;
    scene.goes_on()
}

/// The daemon that passes everything on is started again in the middle.
fn libvirtd_restarts(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let before = scene.state()?;
    let job = holding(scene)?;
    scene.domain.libvirt().restart(|| Ok(()))?;
    go_on(&job)?;
    scene.finish(job, &before)?;

    // The job has something to ask by the time that nobody is there.
    scene.write()?;
    let before = scene.state()?;
    let job = holding(scene)?;
    scene.domain.libvirt().restart(|| go_on(&job))?;
    scene.finish(job, &before)?;
    scene.goes_on()
}

/// Its watchdog ends the snapshot, through libvirt as well.
fn killed(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let before = scene.state()?;
    let outcome = holding(scene)?.kill_alone()?;
    let said = &outcome.stderr;
    ensure!(said.contains("its watchdog ended the snapshot"), "{said}");
    let left = scene.state()?.differences(&before, |_| true);
    ensure!(left.is_empty(), "left behind: {left:?}");
    scene.goes_on()
}

/// Nobody passes on what the watchdog asks for, until somebody does.
fn killed_while_away(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let before = scene.state()?;
    let job = holding(scene)?;
    let libvirt = scene.domain.libvirt();
    libvirt.restart(|| {
        job.process().kill()?;
        let waits = |line: &str| line.contains("ends its snapshot as soon as libvirt answers");
        job.wait_for_line(LIMIT, waits).map(drop)
    })?;
    let ended = |line: &str| line.contains("its watchdog ended the snapshot");
    job.wait_for_line(LIMIT, ended)?;
    ensure!(job.finish()?.signal() == Some(9), "it was not killed");
    let left = scene.state()?.differences(&before, |_| true);
    ensure!(left.is_empty(), "left behind: {left:?}");
    scene.goes_on()
}

/// The domain is destroyed under a backup, of which nothing is left then.
fn dies(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let job = holding(scene)?;
    scene.virsh(&["destroy"])?;
    go_on(&job)?;
    let outcome = job.finish()?;
    ensure!(outcome.code() == Some(1), "{}", outcome.stderr);
    scene.site.check_no_fleecing_images()?;
    scene.virsh(&["start", "--paused"])?;
    scene.goes_on()
}

/// libvirt's own backup, begun and ended while ours holds its snapshot.
fn push_beside(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let before = scene.state()?;
    let job = holding(scene)?;
    cases::push(scene, "pushed")?;
    go_on(&job)?;
    scene.finish(job, &before)?;
    scene.goes_on()
}

/// One VM by two ways, from two state folders: who comes second is told of the first.
fn two_spellings(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let before = scene.state()?;
    let job = holding(scene)?;
    let elsewhere = Site::new()?;
    for way in [Way::Monitor, Way::Name] {
        let second = scene.command_in(&elsewhere, way);
        ends(&second, 11, "another job is at work in this QEMU")?;
    }
    go_on(&job)?;
    scene.finish(job, &before)?;
    scene.goes_on()
}

/// Whoever changes to the name reads the disks in full once, since they are called something else then.
fn other_way(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.goes_by_name();
    scene.back_up()?;
    ensure!(scene.told().ends_with("full+full"), "{}", scene.told());
    scene.goes_on()
}

/// What the VM is called in the archive stays, whatever libvirt calls it.
fn renamed(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["destroy"])?;
    let new = format!("{}-again", scene.name);
    scene.virsh(&["domrename", &new])?;
    ends(&scene.command(), 2, "has no domain")?;
    scene.domain.name.clone_from(&new);
    scene.name = new;
    scene.virsh(&["start", "--paused"])?;
    scene.goes_on()?;
    let told = scene.told();
    ensure!(told.matches("full").count() == 2, "{told}");
    Ok(())
}

/// A disk that is there for one backup, under its name.
fn plugged(scene: &mut Scene) -> Result<()> {
    let image = scene.domain.path("more.raw");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let image = image.to_str().context("a path in UTF-8")?;
    scene.virsh(&["attach-disk", image, "sdc", "--targetbus", "scsi"])?;
    let outcome = ends(&scene.command(), 0, "sdc (")?;
    let document = outcome.document()?;
    let volumes = document["volumes"].as_array().context("no volumes")?;
    ensure!(volumes.len() == 3, "{document}");
    scene.virsh(&["detach-disk", "sdc"])?;
    scene.goes_on()
}

/// A disk that is taken away while the snapshot of it is held is backed up to its end.
fn unplugged(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let job = holding(scene)?;
    scene.virsh(&["detach-disk", "sda"])?;
    go_on(&job)?;
    let outcome = job.finish()?;
    ensure!(outcome.code() == Some(0), "{}", outcome.stderr);
    scene.site.check_no_fleecing_images()?;
    let image = scene.domain.path("sda.qcow2");
    let image = image.to_str().context("a path in UTF-8")?;
    let again = ["sda", "--targetbus", "scsi", "--subdriver", "qcow2"];
    // As QEMU refused that to libvirt, which says nothing of it.
    let said = &outcome.stderr;
    ensure!(said.contains("disk sda was unplugged"), "{said}");
    let node = said
        .split_once("its node ")
        .and_then(|(_, it)| it.split_once(" open"));
    let (node, _) = node.with_context(|| said.clone())?;
    for node in [node, &node.replace("format", "storage")] {
        let close = json!({"execute": "blockdev-del", "arguments": {"node-name": node}});
        scene.virsh(&["qemu-monitor-command", &close.to_string()])?;
    }
    scene.virsh(&[&["attach-disk", image][..], &again].concat())?;
    scene.goes_on()
}

/// QEMU is stopped for the point in time by its monitor, which libvirt sees, and runs on.
fn stopped_for_a_moment(scene: &mut Scene) -> Result<()> {
    scene.virsh(&["resume"])?;
    let key = "[vm.web]\npoint-in-time = 'filter'\n";
    scene.site.configure(key)?;
    for _ in 0..2 {
        let outcome = ends(&scene.command(), 0, "")?.document()?;
        ensure!(outcome["stopped_ms"].is_number(), "{outcome}");
        let state = state(scene)?;
        ensure!(state.starts_with("running"), "{state}");
    }
    scene.site.configure("")?;
    scene.virsh(&["suspend"])?;
    scene.goes_on()
}
