//! What is done to an archive, and to who restores from it.

use crate::world::{TRACKS, World};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::files_below;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// What an archive keeps that a byte can rot in. Without its manifest a backup is no longer one, and without the key a
/// namespace is none: both have tests of their own.
const ROTS: [&str; 4] = ["/packs/", "/pages", "/objects/", "/components/"];

impl World {
    /// A byte rots. Once `verify` has seen it, backups hold what they should again.
    pub(crate) fn damage(&mut self) -> Result<()> {
        let archives = ["archive", "second"];
        let archive = archives[self.random().below(archives.len() as u64) as usize];
        let folder = self.site().path(archive);
        let rots = |file: &String| ROTS.iter().any(|part| file.contains(part));
        let files = files_below(&folder)?.into_iter();
        let files: Vec<_> = files
            .map(|file| file.display().to_string())
            .filter(rots)
            .collect();
        let chosen = &files[self.random().below(files.len() as u64) as usize];
        let path = folder.join(chosen);
        let mut bytes = fs::read(&path)?;
        let length = bytes.len() as u64;
        if length == 0 {
            return Ok(());
        }
        let at = self.random().below(length) as usize;
        bytes[at] ^= 1 << self.random().below(8);
        fs::write(&path, bytes)?;
        eprintln!("a bit of {chosen} at {at} is another one now");
        self.forget_kept(&folder)?;
        for id in self.site().list(&folder)? {
            // Intact or not: what is wrong is known from here on.
            let command = self.site().command(&["verify", &id]).arg("--archive");
            let outcome = command.arg(&folder).run()?;
            ensure!(outcome.signal().is_none(), "{outcome:?}");
        }
        for track in TRACKS.iter().filter(|(_, into)| *into == archive) {
            let full = self.random().below(3) == 0;
            self.back_up_to(*track, full)
                .with_context(|| format!("after a bit of {chosen} rotted"))?;
        }
        Ok(())
    }

    /// Restores into a folder where another user puts links in the place of whatever appears.
    pub(crate) fn restore_among_links(&mut self) -> Result<()> {
        let Some((archive, id)) = self.random_kept() else {
            return Ok(());
        };
        let folder = tempfile::tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777))?;
        let elsewhere = tempfile::tempdir()?;
        let victim = elsewhere.path().join("victim");
        fs::write(&victim, "not to be written to")?;
        let mode = fs::metadata(&victim)?.permissions().mode();
        let over = AtomicBool::new(false);
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    put_links(folder.path(), &victim);
                }
            });
            let command = self.site().command(&["restore", &id]).arg("--archive");
            let command = command.arg(&archive).arg("--to").arg(folder.path());
            let outcome = command.arg("--force").run();
            over.store(true, Ordering::Relaxed);
            outcome
        })?;
        ensure!(outcome.signal().is_none(), "{outcome:?}");
        ensure!(
            fs::read_to_string(&victim)? == "not to be written to",
            "written through a link: {outcome:?}"
        );
        ensure!(
            fs::metadata(&victim)?.permissions().mode() == mode,
            "the mode of what a link pointed to was changed: {outcome:?}"
        );
        Ok(())
    }
}

/// Each step may fail: what was there has gone, or is there again.
fn put_links(folder: &Path, victim: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| !kind.is_symlink()) {
            let _ = fs::remove_file(entry.path());
            let _ = symlink(victim, entry.path());
        }
    }
}
