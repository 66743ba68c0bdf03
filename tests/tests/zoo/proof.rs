//! Providers that are honest as long as they take themselves to be in a proof: each is refused, or what it made restores
//! right, then and by every later backup that builds on it.

use crate::Row;
use crate::scene::Scene;
use crate::special::Test;
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Backup, Order, compare, component};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// After so long `bides-its-time` is no longer honest, if it can know it: the seconds that it waits, the one in which it
/// was made, and one more.
const LATER: Duration = Duration::from_secs(4);

/// How often a backup is tried whose provider lies half of the time: it is a wonder if all of them are refused.
const TRIES: u32 = 64;

/// How often what was proven by chance is read.
const READINGS: u32 = 8;

/// By name.
pub(super) fn all() -> Vec<(&'static str, Test)> {
    vec![
        ("restores-as-proven-shape", |scene| {
            by_questions(scene, "shape")
        }),
        ("restores-as-proven-order", |scene| {
            by_questions(scene, "order")
        }),
        ("restores-as-proven-count", |scene| {
            by_questions(scene, "count")
        }),
        ("restores-as-proven-siblings", |scene| {
            by_questions(scene, "siblings")
        }),
        ("bides-its-time", by_the_clock),
        ("leaves-it-to-chance", by_chance),
    ]
}

/// What a provider that lies when it is found out is told.
const REFUSED: &str = "gives back other bytes than the disk held";

/// An archive that the hostile provider's backups begin, with an order for it and one for the honest one.
fn archive(scene: &Scene, name: &str) -> Result<(PathBuf, Order, Order)> {
    let archive = scene.site.path(name);
    std::fs::create_dir(&archive)?;
    let honest = Order {
        archive: archive.clone(),
        ..scene.honest.clone()
    };
    let hostile = Order {
        provider: "hostile".into(),
        ..honest.clone()
    };
    Ok((archive, hostile, honest))
}

/// A backup, unless its proof fails.
fn proven(scene: &Scene, order: &Order) -> Result<Option<Backup>> {
    let outcome = scene.site.backup_command(order).run()?;
    if outcome.code() == Some(1) && outcome.stderr.contains(REFUSED) {
        scene.proxy.references()?;
        return Ok(None);
    }
    Ok(Some(Backup::told_by(&outcome.assert_success())?))
}

/// Each backup of the archive is verified, and the last restored and held against what QEMU itself copied.
fn check(scene: &Scene, archive: &Path, last: &Backup) -> Result<()> {
    let references = scene.proxy.references()?;
    for backup in scene.site.list(archive)? {
        scene.site.verify(archive, &backup)?;
    }
    let restored = scene.site.restore(archive, &last.id)?;
    for reference in &references {
        let image = restored.join(format!("{}.raw", reference.device));
        compare::same_bytes(&image, &reference.path)?;
    }
    Ok(std::fs::remove_dir_all(restored)?)
}

/// Several backups on top of each other, so that less and less of what the first claimed is wanted of it.
fn by_questions(scene: &mut Scene, how: &str) -> Result<Option<Row>> {
    let settings = format!("[provider.settings]\nhow = '{how}'\n");
    scene.configure("hostile", &component("restores-as-proven")?, &settings)?;
    let (archive, hostile, honest) = archive(scene, &format!("as-proven-{how}"))?;
    for order in [&hostile, &hostile, &honest] {
        match proven(scene, order)? {
            Some(backup) => check(scene, &archive, &backup).with_context(|| backup.id.clone())?,
            None => ensure!(order.provider == "hostile", "an honest backup is refused"),
        }
        scene.change()?;
    }
    scene.back_up_honestly()?;
    Ok(None)
}

/// With `clocks`: what was right when it was proven is right later on.
fn by_the_clock(scene: &mut Scene) -> Result<Option<Row>> {
    let policy =
        "[provider.grant]\nwasi = ['clocks', 'random']\n[provider.settings]\nhow = 'time'\n";
    scene.configure("hostile", &component("bides-its-time")?, policy)?;
    let (archive, hostile, _) = archive(scene, "bides-its-time")?;
    if let Some(backup) = proven(scene, &hostile)? {
        std::thread::sleep(LATER);
        check(scene, &archive, &backup)?;
    }
    scene.back_up_honestly()?;
    Ok(None)
}

/// With `random`: whether it is honest is decided once for each backup, and so it shows at the proof.
fn by_chance(scene: &mut Scene) -> Result<Option<Row>> {
    let policy =
        "[provider.grant]\nwasi = ['clocks', 'random']\n[provider.settings]\nhow = 'chance'\n";
    scene.configure("hostile", &component("bides-its-time")?, policy)?;
    let (archive, hostile, _) = archive(scene, "leaves-it-to-chance")?;
    let one_disk = hostile.only(&["da"]);
    let mut refused = 0;
    let backup = loop {
        match proven(scene, &one_disk)? {
            Some(backup) => break backup,
            None => refused += 1,
        }
        ensure!(refused < TRIES, "chance is not what it was");
    };
    for _ in 0..READINGS {
        scene.site.verify(&archive, &backup.id)?;
    }
    check(scene, &archive, &backup)?;
    scene.back_up_honestly()?;
    Ok(None)
}
