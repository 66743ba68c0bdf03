//! What is done between two backups: each case begins with a backup, and ends with those that follow.

use super::scene::{Scene, Way};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::eventually;
use std::path::Path;
use std::time::Duration;

pub(super) type Case = (&'static str, Way, fn(&mut Scene) -> Result<()>);

pub(super) const ALL: &[Case] = &[
    ("restart", Way::Monitor, restart),
    ("snapshot", Way::Name, snapshot),
    ("snapshots", Way::Name, snapshots),
    ("snapshot-of-one-disk", Way::Name, snapshot_of_one_disk),
    ("commit", Way::Name, commit),
    (
        "commit-between-backups",
        Way::Monitor,
        commit_between_backups,
    ),
    ("commit-below", Way::Name, commit_below),
    ("pull", Way::Name, pull),
    ("pull-in-part", Way::Name, pull_in_part),
    ("copy", Way::Name, copy),
    ("shallow-copy", Way::Name, shallow_copy),
    ("snapshot-while-off", Way::Name, snapshot_while_off),
    ("snapshot-delete", Way::Name, snapshot_delete),
    ("snapshot-revert", Way::Name, snapshot_revert),
    ("internal-snapshot", Way::Name, internal_snapshot),
    ("internal-revert", Way::Monitor, internal_revert),
    ("checkpoint", Way::Name, checkpoint),
    ("push-backup", Way::Name, push_backup),
    ("everything", Way::Name, everything),
    ("started", Way::Monitor, started),
    ("started-without-stop", Way::Monitor, started_without_stop),
    ("saved-memory", Way::Monitor, saved_memory),
];

const LIMIT: Duration = Duration::from_secs(60);
const DISKS: [&str; 2] = ["sda", "vdb"];

/// An ordinary restart loses nothing, and costs nothing.
fn restart(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["destroy"])?;
    scene.virsh(&["start", "--paused"])?;
    scene.write()?;
    scene.goes_on()?;
    ensure!(
        !scene.told().ends_with("full+full, incr+incr"),
        "{}",
        scene.told()
    );
    Ok(())
}

fn make_snapshot(scene: &Scene, name: &str) -> Result<()> {
    let command = ["snapshot-create-as", name, "--disk-only", "--atomic"];
    scene.virsh(&command).map(drop)
}

fn snapshot(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    scene.goes_on()
}

/// Two in a row, with writes before, between and after.
fn snapshots(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    make_snapshot(scene, "s2")?;
    scene.write()?;
    scene.goes_on()
}

fn snapshot_of_one_disk(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let only = [
        "--disk-only",
        "--diskspec",
        "sda,snapshot=external",
        "--diskspec",
        "vdb,snapshot=no",
    ];
    let mut command = vec!["snapshot-create-as", "s1"];
    command.extend(only);
    scene.virsh(&command)?;
    scene.write()?;
    scene.goes_on()
}

fn commit_all(scene: &Scene) -> Result<()> {
    for disk in DISKS {
        scene.virsh(&["blockcommit", disk, "--active", "--pivot", "--wait"])?;
    }
    Ok(())
}

/// A snapshot that is made and committed again within one increment.
fn commit(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    commit_all(scene)?;
    scene.write()?;
    scene.goes_on()
}

fn commit_between_backups(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    commit_all(scene)?;
    scene.write()?;
    scene.goes_on()
}

/// The layer in the middle into the one below, under the one that is written to.
fn commit_below(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let base = DISKS.map(|disk| scene.domain.source(disk));
    make_snapshot(scene, "s1")?;
    scene.write()?;
    scene.back_up()?;
    let middle = DISKS.map(|disk| scene.domain.source(disk));
    make_snapshot(scene, "s2")?;
    scene.write()?;
    for ((disk, base), middle) in DISKS.into_iter().zip(base).zip(middle) {
        let (base, middle) = (base?, middle?);
        let (base, middle) = (utf8(&base)?, utf8(&middle)?);
        scene.virsh(&[
            "blockcommit",
            disk,
            "--base",
            base,
            "--top",
            middle,
            "--wait",
        ])?;
    }
    scene.write()?;
    scene.goes_on()
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

/// All but the lowest layer into the one that is written to.
fn pull_in_part(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    let base = DISKS.map(|disk| scene.domain.source(disk));
    make_snapshot(scene, "s1")?;
    scene.write()?;
    make_snapshot(scene, "s2")?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    for (disk, base) in DISKS.into_iter().zip(base) {
        scene.virsh(&["blockpull", disk, "--base", utf8(&base?)?, "--wait"])?;
    }
    scene.write()?;
    scene.goes_on()
}

fn pull(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    for disk in DISKS {
        scene.virsh(&["blockpull", disk, "--wait"])?;
    }
    scene.write()?;
    scene.goes_on()
}

fn copy(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    for disk in DISKS {
        let to = scene.domain.path(&format!("{disk}.copy"));
        let mut command = vec![
            "blockcopy",
            disk,
            utf8(&to)?,
            "--format",
            "qcow2",
            "--wait",
            "--pivot",
        ];
        command.push("--transient-job");
        scene.virsh(&command)?;
    }
    scene.write()?;
    scene.goes_on()
}

/// Of the layer that is written to alone, over the same one below.
fn shallow_copy(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    for disk in DISKS {
        let to = scene.domain.path(&format!("{disk}.copy"));
        let mut command = vec!["blockcopy", disk, utf8(&to)?, "--shallow"];
        command.extend(["--format", "qcow2", "--wait", "--pivot", "--transient-job"]);
        scene.virsh(&command)?;
    }
    scene.write()?;
    scene.goes_on()
}

/// libvirt makes the overlays by qemu-img, and knows of no bitmap.
fn snapshot_while_off(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["destroy"])?;
    scene.virsh(&["snapshot-create-as", "s1", "--disk-only"])?;
    scene.virsh(&["start", "--paused"])?;
    scene.write()?;
    scene.goes_on()
}

fn snapshot_delete(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    scene.virsh(&["snapshot-delete", "s1"])?;
    scene.write()?;
    scene.goes_on()
}

fn snapshot_revert(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    scene.virsh(&["snapshot-revert", "s1", "--paused"])?;
    scene.goes_on()
}

/// Made and deleted; QEMU does that beside bitmaps.
fn internal_snapshot(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["snapshot-create-as", "i1"])?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    scene.virsh(&["snapshot-delete", "i1"])?;
    scene.write()?;
    scene.goes_on()
}

/// QEMU takes no image back that a bitmap records; without bitmaps it does, and then nothing is known of what changed.
fn internal_revert(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["snapshot-create-as", "i1"])?;
    scene.write()?;
    scene.back_up()?;
    let revert = ["snapshot-revert", "i1", "--paused"];
    let refused = scene
        .virsh(&revert)
        .err()
        .context("reverted beside a bitmap")?;
    ensure!(
        format!("{refused:#}").contains("active dirty bitmaps"),
        "{refused:#}"
    );
    // So much does libvirt make of it.
    scene.virsh(&["start", "--paused"])?;
    scene.back_up()?;
    scene.write()?;
    scene.drop_bitmaps()?;
    scene.virsh(&revert)?;
    scene.goes_on()
}

fn checkpoint(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["checkpoint-create-as", "c1"])?;
    scene.write()?;
    scene.back_up()?;
    scene.write()?;
    scene.virsh(&["checkpoint-delete", "c1"])?;
    scene.write()?;
    scene.goes_on()
}

pub(super) fn push(scene: &Scene, name: &str) -> Result<()> {
    let disks = DISKS.map(|disk| {
        let target = scene.domain.path(&format!("{disk}.{name}"));
        format!(
            "<disk name='{disk}' type='file'><target file='{}'/><driver type='qcow2'/></disk>",
            target.display()
        )
    });
    let xml = scene.domain.path(name);
    let disks = disks.concat();
    std::fs::write(
        &xml,
        format!("<domainbackup mode='push'><disks>{disks}</disks></domainbackup>"),
    )?;
    scene.virsh(&["backup-begin", utf8(&xml)?])?;
    eventually("libvirt's own backup", LIMIT, || {
        let told = scene.virsh(&["domjobinfo"])?;
        Ok(told.contains("None").then_some(()))
    })
}

fn push_backup(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    push(scene, "pushed")?;
    scene.write()?;
    scene.goes_on()
}

/// One after the other, with a backup only at the end.
fn everything(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    make_snapshot(scene, "s1")?;
    scene.write()?;
    push(scene, "pushed")?;
    make_snapshot(scene, "s2")?;
    scene.write()?;
    scene.virsh(&["checkpoint-create-as", "c1"])?;
    scene.virsh(&["checkpoint-delete", "c1"])?;
    commit_all(scene)?;
    scene.write()?;
    scene.virsh(&["destroy"])?;
    scene.virsh(&["start", "--paused"])?;
    scene.write()?;
    scene.goes_on()
}

/// As the configuration's page has it.
const STARTS: &str =
    "virsh dominfo $domain | grep -q 'Managed save: *no' && virsh start --paused $domain";

fn state(scene: &Scene) -> Result<String> {
    Ok(scene.virsh(&["domstate", "--reason"])?.trim().into())
}

/// `virsh start --paused` has more to do when QEMU's monitor is there: whoever ends QEMU by then makes it fail.
fn started(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["destroy"])?;
    scene.is_started_by(STARTS, Some("virsh destroy $domain"))?;
    for _ in 0..3 {
        scene.back_up_stopped()?;
        let state = state(scene)?;
        ensure!(state == "shut off (destroyed)", "{state}");
    }
    scene.virsh(&["start", "--paused"])?;
    scene.goes_on()
}

/// QEMU is told to quit, of which libvirt hears by the end of its connection.
fn started_without_stop(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["destroy"])?;
    scene.is_started_by(STARTS, None)?;
    for _ in 0..3 {
        scene.back_up_stopped()?;
        eventually("libvirt to see the end", LIMIT, || {
            let state = state(scene)?;
            ensure!(state != "shut off (failed)", "{state}");
            Ok(state.starts_with("shut off").then_some(()))
        })?;
    }
    scene.virsh(&["start", "--paused"])?;
    scene.goes_on()
}

/// A start would consume it: the domain is left alone. Once it is restored and paused, QEMU holds the disks inactive.
fn saved_memory(scene: &mut Scene) -> Result<()> {
    scene.write()?;
    scene.virsh(&["managedsave"])?;
    scene.is_started_by(STARTS, Some("virsh destroy $domain"))?;
    let said = scene.is_refused()?;
    ensure!(said.contains("did not start it"), "{said}");
    let (now, info) = (state(scene)?, scene.virsh(&["dominfo"])?);
    ensure!(now == "shut off (saved)", "{now}");
    let saved = |line: &str| line.starts_with("Managed save:") && line.ends_with("yes");
    ensure!(info.lines().any(saved), "{info}");

    scene.virsh(&["start", "--paused"])?;
    let said = scene.is_refused()?;
    ensure!(
        said.contains("inactive") && said.contains("continue the VM first"),
        "{said}"
    );
    // Its memory is that of a machine without a system, which writes nothing.
    scene.virsh(&["resume"])?;
    scene.virsh(&["suspend"])?;
    scene.goes_on()
}
