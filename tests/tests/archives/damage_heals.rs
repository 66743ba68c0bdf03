//! What becomes of an archive with a damaged or lost file when backups go on: each later backup is intact, or it is refused,
//! and what was found is said.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, MIB, Order, Outcome, Random, Site, StorageDaemon, compare, files_below,
};

const SIZE: u64 = 4 * MIB;

/// A disk that is written between backups, and what is backed up of it.
struct Scene {
    site: Site,
    daemon: StorageDaemon,
    order: Order,
    written: u64,
}

impl Scene {
    fn new(provider: &str) -> Result<Self> {
        let site = Site::new()?;
        let content = site.path("content.raw");
        Random::new(8).fill_file(&content, SIZE / MIB)?;
        let disks = [Disk::raw("da", SIZE).holding(&content)];
        let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
        let mut order = site.order(&daemon, provider)?;
        if provider == "splices-everything" {
            site.configure(&format!(
                "[provider.splices]\ncomponent = {:?}\nsettings = {{ encoding = 'identity' }}\n",
                order.provider
            ))?;
            order.provider = "splices".into();
        }
        Ok(Self {
            site,
            daemon,
            order,
            written: 0,
        })
    }

    /// Writes a block that no other call writes, from the disk's end on.
    fn write(&mut self) -> Result<()> {
        self.written += 1;
        let mut access = self.daemon.writer_access("da")?;
        access.write(
            SIZE - self.written * (64 << 10),
            &[self.written as u8; 4096],
        )?;
        Ok(access.flush()?)
    }

    fn full(&self) -> Order {
        Order {
            full: true,
            ..self.order.clone()
        }
    }

    /// The disk's bytes.
    fn disk(&self) -> PathBuf {
        self.daemon.disks()[0].path.clone()
    }

    /// Keeps the disk's bytes as they are now.
    fn keep(&self, name: &str) -> Result<PathBuf> {
        let kept = self.site.path(name);
        fs::copy(self.disk(), &kept)?;
        Ok(kept)
    }

    fn files(&self, part: &str) -> Result<Vec<PathBuf>> {
        let archive = self.site.archive();
        let files = files_below(&archive)?.into_iter();
        let of_part = files.filter(|file| file.iter().any(|it| it == part));
        Ok(of_part.map(|file| archive.join(file)).collect())
    }

    fn verify(&self, id: &str) -> Result<Outcome> {
        let command = self.site.command(&["verify", id, "--json"]);
        command.arg("--archive").arg(self.site.archive()).run()
    }

    /// Verifies and restores a backup and holds it against `expected`.
    fn check(&self, backup: &Backup, expected: &Path) -> Result<()> {
        self.site.verify(&self.site.archive(), &backup.id)?;
        let restored = self.site.restore(&self.site.archive(), &backup.id)?;
        compare::same_disk(&restored.join("da.raw"), expected)
    }
}

/// Changes a bit of a byte.
fn flip(path: &Path, at: usize) -> Result<()> {
    let mut bytes = fs::read(path)?;
    let byte = bytes.get_mut(at).context("a byte past the file's end")?;
    *byte ^= 0x10;
    Ok(fs::write(path, bytes)?)
}

#[test]
fn no_backup_after_damage_to_what_was_put_is_lost_with_it() -> Result<()> {
    let kinds = ["packs", "pages", "manifest.json", "key", "components"];
    no_backup_after_damage_is_lost_with_it("chunked", &kinds)
}

#[test]
fn no_backup_after_damage_to_what_was_spliced_is_lost_with_it() -> Result<()> {
    let kinds = ["objects", "pages", "manifest.json", "components"];
    no_backup_after_damage_is_lost_with_it("splices-everything", &kinds)
}

#[test]
fn no_backup_after_damage_to_what_a_provider_wrote_is_lost_with_it() -> Result<()> {
    let kinds = ["objects", "pages", "manifest.json", "components"];
    no_backup_after_damage_is_lost_with_it("image", &kinds)
}

/// In each kind of file of the first backup, and after each kind of backup.
fn no_backup_after_damage_is_lost_with_it(provider: &str, kinds: &[&str]) -> Result<()> {
    for kind in kinds {
        for first_in_full in [false, true] {
            let mut scene = Scene::new(provider)?;
            scene.site.backup(&scene.order)?;
            let files = scene.files(kind)?;
            ensure!(!files.is_empty(), "there is no {kind}");
            for file in &files {
                flip(file, fs::metadata(file)?.len() as usize / 3)?;
            }
            let orders = match first_in_full {
                false => [scene.order.clone(), scene.order.clone(), scene.full()],
                true => [scene.full(), scene.full(), scene.order.clone()],
            };
            for (number, order) in orders.iter().enumerate() {
                let what = || format!("{kind}, backup {number}, first in full: {first_in_full}");
                scene.write()?;
                let made = scene.site.backup(order).with_context(what)?;
                scene.check(&made, &scene.disk()).with_context(what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn what_verify_found_wrong_is_stored_anew_and_older_backups_find_it_there() -> Result<()> {
    let scene = Scene::new("chunked")?;
    let first = scene.site.backup(&scene.order)?;
    let before = scene.keep("before.raw")?;
    // The check of this one is recorded, and believed by the next ones.
    scene.site.verify(&scene.site.archive(), &first.id)?;
    let second = scene.site.backup(&scene.order)?;
    second.assert_base("da", Some(&first));
    let [pack] = &scene.files("packs")?[..] else {
        anyhow::bail!("not one pack");
    };
    flip(pack, 1000)?;
    ensure!(scene.verify(&first.id)?.code() == Some(10), "not found");
    // Chunks lie in a pack in the order in which they were compressed: nothing is written, so that whichever was damaged
    // is still on the disk.
    let third = scene.site.backup(&scene.order)?;
    third.assert_read_in_full_because("da", "cannot be restored any more");
    ensure!(
        third.said.contains(&first.id) && third.said.contains(&second.id),
        "the older backups are not named:\n{}",
        third.said
    );
    scene.check(&third, &scene.disk())?;
    let verified = scene.verify(&first.id)?.assert_success();
    ensure!(
        verified.stderr.contains("read from copies"),
        "{}",
        verified.stderr
    );
    for older in [&first, &second] {
        scene.check(older, &before)?;
    }
    // The next one builds on it, and stores nothing that is there.
    let fourth = scene.site.backup(&scene.order)?;
    fourth.assert_base("da", Some(&third));
    ensure!(scene.files("packs")?.len() == 2, "more packs than two");
    Ok(())
}

#[test]
fn a_pack_that_is_lost_or_cut_short_is_read_again_and_the_backups_that_miss_it_are_named()
-> Result<()> {
    for cut in [false, true] {
        let mut scene = Scene::new("chunked")?;
        let first = scene.site.backup(&scene.order)?;
        // From here on its bytes are believed, and its being there is not.
        scene.site.verify(&scene.site.archive(), &first.id)?;
        scene
            .site
            .backup(&scene.order)?
            .assert_base("da", Some(&first));
        let [pack] = &scene.files("packs")?[..] else {
            anyhow::bail!("not one pack");
        };
        match cut {
            true => {
                let file = fs::File::options().write(true).open(pack)?;
                file.set_len(fs::metadata(pack)?.len() / 2)?;
            }
            false => fs::remove_file(pack)?,
        }
        scene.write()?;
        let made = scene.site.backup(&scene.order)?;
        made.assert_read_in_full_because("da", "cannot be restored any more");
        ensure!(made.said.contains(&first.id), "{}", made.said);
        scene.check(&made, &scene.disk())?;
        scene.write()?;
        let next = scene.site.backup(&scene.order)?;
        next.assert_base("da", Some(&made));
        scene.check(&next, &scene.disk())?;
    }
    Ok(())
}

#[test]
fn nothing_is_built_on_claims_whose_backup_is_gone() -> Result<()> {
    let mut scene = Scene::new("image")?;
    let first = scene.site.backup(&scene.order)?;
    scene.write()?;
    let second = scene.site.backup(&scene.order)?;
    second.assert_base("da", Some(&first));
    let archive = scene.site.archive();
    let manifest = files_below(&archive)?
        .into_iter()
        .find(|file| file.ends_with(format!("{}/manifest.json", first.id)));
    let manifest = archive.join(manifest.context("no manifest")?);
    fs::remove_dir_all(manifest.parent().context("no folder")?)?;
    scene.write()?;
    let third = scene.site.backup(&scene.order)?;
    third.assert_read_in_full_because("da", "cannot be restored any more");
    ensure!(third.said.contains(&second.id), "{}", third.said);
    scene.check(&third, &scene.disk())
}

#[test]
fn in_full_nothing_is_believed_that_is_only_recorded() -> Result<()> {
    let scene = Scene::new("chunked")?;
    let first = scene.site.backup(&scene.order)?;
    scene.site.verify(&scene.site.archive(), &first.id)?;
    let [pack] = &scene.files("packs")?[..] else {
        anyhow::bail!("not one pack");
    };
    flip(pack, 1000)?;
    for _ in 0..2 {
        let made = scene.site.backup(&scene.full())?;
        scene.check(&made, &scene.disk())?;
    }
    // Only what was damaged was stored again.
    ensure!(scene.files("packs")?.len() == 2, "more packs than two");
    Ok(())
}
