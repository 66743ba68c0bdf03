//! The story, from the stage to the last command.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use fleecebox_tests::QemuState;

use crate::command::Programs;
use crate::held::Held;
use crate::scene::{Kind, Scene};
use crate::screen::Screen;

/// Everything that is on stage.
pub(crate) struct Story {
    /// What the reader sees.
    pub(crate) screen: Screen,
    /// The VM.
    pub(crate) scene: Scene,
    /// How programs are run.
    pub(crate) programs: Programs,
    /// What QEMU showed before the first backup.
    pub(crate) untouched: QemuState,
    /// What it held then.
    pub(crate) empty: Held,
    /// Backups that are in the archive.
    pub(crate) made: usize,
}

/// Tells it in `folder`, and gives back the page with all that was checked; the VM has ended by then.
pub(crate) fn tell(kind: Kind, components: &Path, folder: &Path) -> Result<Screen> {
    let mut story = Story::begin(kind, components, folder)?;
    story.provider()?;
    story.backup("A full backup", "The first backup reads everything.")?;
    story.backup(
        "An incremental backup",
        "QEMU has tracked what was written since. Only that is read.",
    )?;
    story.backup("Another incremental backup", "It builds on the one before.")?;
    story.attacks()?;
    if kind == Kind::Guest {
        story.killed_while_frozen()?;
    }
    story.killed_half_way()?;
    story.backup(
        "The next backup, after all that",
        "It settles the bitmaps that the killed job left, and reads what changed since the last backup that was proven: \
         nothing that the failed ones touched may be missing.",
    )?;
    story.end(components)
}

impl Story {
    fn begin(kind: Kind, components: &Path, folder: &Path) -> Result<Self> {
        let mut screen = Screen::new();
        screen.title(
            "Fleecebox: backups of running QEMU machines by providers that nobody has to trust",
        );
        let (what, disks) = match kind {
            Kind::Daemon => (
                "Starting a real qemu-storage-daemon (QEMU's own block layer, without a machine) on a disk of 256 MiB \
                 with a real ext4 file system. A writer overwrites the data in it all the while, through QEMU.",
                r#"["disk"]"#,
            ),
            Kind::Guest => (
                "Booting a real Linux guest under QEMU, emulated, with two disks: virtio-blk on a raw file and \
                 virtio-scsi on a qcow2 file, ext4 on both. Its own processes write to both all the while, and \
                 QEMU's guest agent can freeze its file systems.",
                r#"["device-a", "device-b"]"#,
            ),
        };
        screen.say(what);
        let started = Instant::now();
        let scene = Scene::start(kind, folder)?;
        let seconds = started.elapsed().as_secs_f64();
        screen.fact(&format!(
            "It is up after {seconds:.1} s, and is being written to."
        ));
        let untouched = scene.state()?;
        let empty = scene.held()?;
        screen.fact(&format!(
            "QEMU holds {empty}. It must hold the same after every backup."
        ));

        symlink(components, folder.join("components"))?;
        for name in ["archive", "fleecing", "restored"] {
            std::fs::create_dir(folder.join(name))?;
        }
        let sockets = match kind {
            Kind::Daemon => "nbd = \"nbd.sock\"  # the NBD server that this QEMU runs already\n",
            Kind::Guest => "agent = \"agent.sock\"\n",
        };
        let mut config = format!(
            "state = \"state\"\n\n[vm.web]\nqmp = \"qmp.sock\"\n{sockets}fleecing = \"fleecing\"\ndisks = {disks}\n\
             archive = \"main\"\nprovider = \"chunked\"\n\n[archive.main]\npath = \"archive\"\n\n\
             [provider.chunked]\ncomponent = \"components/chunked.wasm\"\nnamespace = \"web\"\n"
        );
        for name in crate::attacks::NAMES {
            config += &format!(
                "\n[provider.{name}]\ncomponent = \"components/{name}.wasm\"\nnamespace = \"web\"\n"
            );
        }
        std::fs::write(folder.join("demo.toml"), &config)?;
        screen.gap();
        screen.say(&format!(
            "All commands below run in {}, with this demo.toml (each of its values could be an option instead). The \
             three providers at its end are hostile:",
            folder.display()
        ));
        screen.gap();
        config.lines().for_each(|line| screen.printed(line));
        screen.gap();
        screen.say(
            "qmp.sock leads through a relay of this demonstration. It changes one thing: to the transaction by which \
             Fleecebox takes its point in time it adds a full copy of each disk, made by QEMU alone. That copy, the \
             reference, is what each restored disk is compared with.",
        );
        Ok(Self {
            screen,
            scene,
            programs: Programs::new(folder)?,
            untouched,
            empty,
            made: 0,
        })
    }

    fn provider(&mut self) -> Result<()> {
        self.screen
            .chapter("A provider that cannot read what it backs up");
        self.screen.say(
            "chunked is a WebAssembly component of the blind world. It decides which ranges become which chunks; the \
             host moves the bytes. Its imports are all that it can reach, and none of them reads the disk:",
        );
        let inspect = [
            "provider",
            "inspect",
            "components/chunked.wasm",
            "--config",
            "demo.toml",
        ];
        let outcome = self.programs.fleecebox(&mut self.screen, &inspect)?;
        let blind = outcome.status.success() && outcome.says("blind-provider");
        self.screen.check(blind, "It is a blind provider.");
        Ok(())
    }

    /// One honest backup, and everything that can be held against it.
    fn backup(&mut self, heading: &str, text: &str) -> Result<()> {
        self.screen.chapter(heading);
        self.screen.say(text);
        let earlier = self.scene.position();
        self.scene.wait_for_changes()?;
        let usual = self.scene.worst_write(earlier);
        let (writes, position) = (self.scene.writes(), self.scene.position());
        let backup = ["backup", "web", "--config", "demo.toml"];
        let outcome = self.programs.fleecebox(&mut self.screen, &backup)?;
        let writes = self.scene.writes() - writes;
        let id = match outcome.lines.last().cloned() {
            Some(id) if outcome.status.success() => id,
            _ => bail!("the backup failed ({})", outcome.status),
        };
        self.screen.gap();
        self.scene.wait_for_changes()?;
        match (usual, self.scene.worst_write(position)) {
            (Some(usual), Some(worst)) => self.screen.fact(&format!(
                "By the guest's own clock its slowest write, with its sync, took {} ms; just before, without a backup, \
                 {} ms.",
                worst.as_millis(),
                usual.as_millis()
            )),
            _ => self
                .screen
                .fact(&format!("{writes} writes reached the disk while this ran.")),
        }
        self.made += 1;
        let number = self.made.to_string();
        let folder = self.programs.folder.clone();
        let references = self
            .scene
            .references(&folder.join("reference").join(&number))?;
        self.check_qemu(|_| true)?;
        self.check_tracking()?;
        self.check_guest()?;

        let verify = ["verify", &id, "--config", "demo.toml"];
        let verified = self.programs.fleecebox(&mut self.screen, &verify)?;
        let intact = verified.status.success();
        self.screen.check(
            intact,
            "Every block of the backup has the digest that the disk's block had.",
        );
        let restored = format!("restored/{number}/");
        std::fs::create_dir(folder.join(&restored))?;
        let restore = ["restore", &id, "--config", "demo.toml", "--to", &restored];
        if !self
            .programs
            .fleecebox(&mut self.screen, &restore)?
            .status
            .success()
        {
            bail!("the restore failed");
        }
        for disk in self.scene.disks() {
            let image = format!("{restored}{}.raw", disk.volume);
            let reference = format!("reference/{number}/{}.raw", disk.volume);
            let cmp = self
                .programs
                .tool(&mut self.screen, "cmp", &[&image, &reference])?;
            let size = std::fs::metadata(folder.join(&image)).map_or(0, |meta| meta.len());
            self.screen.check(
                cmp.status.success() && size > 0,
                &format!(
                    "The restored {} equals the reference: {size} bytes, not one differs.",
                    disk.volume
                ),
            );
            let e2fsck = self
                .programs
                .tool(&mut self.screen, "e2fsck", &["-fn", &image])?;
            self.screen
                .check(e2fsck.status.success(), "Its file system has no fault.");
        }
        std::fs::remove_dir_all(folder.join(&restored))?;
        references.iter().try_for_each(std::fs::remove_file)?;
        Ok(())
    }

    /// QEMU is as it was before the first backup, bar bitmaps that `may_change` accepts.
    pub(crate) fn check_qemu(
        &mut self,
        may_change: impl Fn(&fleecebox_tests::Bitmap) -> bool,
    ) -> Result<()> {
        let differences = self.scene.state()?.differences(&self.untouched, may_change);
        let held = self.scene.held()?;
        for difference in &differences {
            self.screen.fact(difference);
        }
        self.screen.check(
            differences.is_empty() && held == self.empty,
            &format!("QEMU holds what it held at the start: {held}, the same files and sockets."),
        );
        Ok(())
    }

    /// One bitmap on each disk, and it follows the writes.
    pub(crate) fn check_tracking(&mut self) -> Result<()> {
        let state = self.scene.state()?;
        let follows = self.scene.disks().iter().all(|disk| {
            let bitmaps: Vec<_> = state
                .bitmaps()
                .filter(|bitmap| bitmap.node == disk.node)
                .collect();
            matches!(bitmaps[..], [bitmap] if bitmap.recording && !bitmap.inconsistent)
        });
        self.screen.check(
            follows,
            "One bitmap follows the writes to each disk, for the next incremental.",
        );
        Ok(())
    }

    /// The guest runs, is not frozen, and writes.
    pub(crate) fn check_guest(&mut self) -> Result<()> {
        if let Some(guest) = self.scene.guest() {
            let well =
                guest.is_running()? && !guest.is_frozen()? && guest.wait_for_writes().is_ok();
            self.screen.check(
                well,
                "The guest runs, is not frozen, and writes on to both disks.",
            );
        }
        Ok(())
    }

    /// The ids of the backups in the archive.
    pub(crate) fn listed(&self) -> Result<Vec<String>> {
        let listed = self
            .programs
            .quietly(&["list", "--json", "--config", "demo.toml"])?;
        if !listed.status.success() {
            bail!("the archive cannot be listed: {}", listed.lines.join(" "));
        }
        let rows: serde_json::Value = serde_json::from_str(&listed.lines.join("\n"))?;
        let ids = rows.as_array().context("the list is no list")?.iter();
        Ok(ids.map(|row| row["backup"].to_string()).collect())
    }

    fn end(mut self, components: &Path) -> Result<Screen> {
        self.screen
            .chapter("What is in the archive, and what is left");
        let list = ["list", "--config", "demo.toml"];
        let listed = self.programs.fleecebox(&mut self.screen, &list)?;
        let expected = self.made;
        let right = listed.status.success() && self.listed()?.len() == expected;
        self.screen.check(
            right,
            &format!("{expected} backups, all proven; none by a hostile provider or a killed job."),
        );
        let fleecing = std::fs::read_dir(self.programs.folder.join("fleecing"))?.count();
        self.screen
            .check(fleecing == 0, "The folder for fleecing images is empty.");
        self.check_qemu(|_| true)?;

        self.screen.chapter("Your own VM");
        let component = components.join("chunked.wasm");
        let component = std::env::current_dir()
            .ok()
            .and_then(|here| component.strip_prefix(here).ok().map(Path::to_owned))
            .unwrap_or(component);
        self.screen.say(
            "Start QEMU with -qmp unix:/run/NAME.qmp,server=on,wait=off; make the archive's folder; then, as a user who \
             may use that socket:",
        );
        self.screen.command(&format!(
            "fleecebox backup NAME --qmp /run/NAME.qmp --provider {} --archive /srv/backups",
            component.display()
        ));
        self.screen.gap();
        Ok(self.screen)
    }
}
