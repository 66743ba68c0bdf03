//! Where backups of a test go, and the commands that an operator gives there.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::fleecebox::target_folder;
use crate::{Fleecebox, Outcome, Proxy, ReferenceImage, StorageDaemon, compare, component};

/// The folders of one host that runs Fleecebox, in a temporary folder that goes when this value goes.
#[derive(Debug)]
pub struct Site {
    folder: TempDir,
    restores: AtomicU32,
}

/// What to back up, with what, to where: the arguments of `fleecebox backup`.
#[derive(Clone, Debug)]
pub struct Order {
    /// The VM's name.
    pub vm: String,
    /// QEMU's monitor.
    pub qmp: PathBuf,
    /// QEMU's NBD server, if it runs one already.
    pub nbd: Option<PathBuf>,
    /// The disks, by the names of their nodes.
    pub disks: Vec<String>,
    /// The provider, by its name in the configuration or by its file.
    pub provider: String,
    /// The archive's folder.
    pub archive: PathBuf,
    /// `--full`.
    pub full: bool,
}

/// A backup that was made.
#[derive(Clone, Debug)]
pub struct Backup {
    /// Its id.
    pub id: String,
    /// What `--json` told of its volumes.
    pub volumes: Vec<Value>,
    /// What was told on standard error.
    pub said: String,
}

impl Site {
    /// Makes the folders.
    ///
    /// # Errors
    /// When there is no room for them.
    pub fn new() -> Result<Self> {
        let folder = TempDir::with_prefix("fleecebox-site-")?;
        for name in ["archive", "fleecing", "restored", "state"] {
            fs::create_dir(folder.path().join(name))?;
        }
        fs::write(folder.path().join("fleecebox.toml"), "")?;
        let site = Self {
            folder,
            restores: AtomicU32::new(0),
        };
        DirBuilder::new().mode(0o700).create(site.compiled())?;
        if let Ok(shared) = shared_compiled() {
            link_files(&shared, &site.compiled())?;
        }
        Ok(site)
    }

    /// Compiled components.
    fn compiled(&self) -> PathBuf {
        self.path("state/compiled")
    }

    /// A path of that name among the site's folders, for a test's own things.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The archive that orders name unless they are changed.
    pub fn archive(&self) -> PathBuf {
        self.path("archive")
    }

    /// Replaces the configuration of all commands from here on, which is empty at first.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, toml: &str) -> Result<()> {
        Ok(fs::write(self.path("fleecebox.toml"), toml)?)
    }

    /// `fleecebox` with these arguments and those that keep it within the site.
    pub fn command(&self, arguments: &[&str]) -> Fleecebox {
        Fleecebox::new(arguments)
            .arg("--config")
            .arg(self.path("fleecebox.toml"))
            .arg("--state")
            .arg(self.path("state"))
    }

    /// An order for all of the daemon's disks by the provider of that crate name.
    ///
    /// # Errors
    /// When the provider is not built.
    pub fn order(&self, daemon: &StorageDaemon, provider: &str) -> Result<Order> {
        let file = component(provider)?;
        Ok(Order {
            vm: "web".into(),
            qmp: daemon.monitors().product.clone(),
            nbd: daemon.has_writer_exports().then(|| daemon.nbd_socket()),
            disks: daemon
                .disks()
                .iter()
                .map(|disk| disk.node.clone())
                .collect(),
            provider: file.to_str().context("a path in UTF-8")?.into(),
            archive: self.archive(),
            full: false,
        })
    }

    /// An order for all disks of a machine whose monitor this is, by the provider of that crate name.
    ///
    /// # Errors
    /// When the provider is not built.
    pub fn order_for(&self, monitor: &Path, provider: &str) -> Result<Order> {
        Ok(Order {
            vm: "web".into(),
            qmp: monitor.into(),
            nbd: None,
            disks: Vec::new(),
            provider: component(provider)?
                .to_str()
                .context("a path in UTF-8")?
                .into(),
            archive: self.archive(),
            full: false,
        })
    }

    /// `fleecebox backup --json`, as ordered.
    pub fn backup_command(&self, order: &Order) -> Fleecebox {
        let mut command = self
            .command(&["backup", "--json"])
            .arg(&order.vm)
            .arg("--qmp")
            .arg(&order.qmp)
            .arg("--provider")
            .arg(&order.provider)
            .arg("--archive")
            .arg(&order.archive)
            .arg("--fleecing")
            .arg(self.path("fleecing"));
        if let Some(nbd) = &order.nbd {
            command = command.arg("--nbd").arg(nbd);
        }
        for disk in &order.disks {
            command = command.arg("--disk").arg(disk);
        }
        if order.full {
            command = command.arg("--full");
        }
        command
    }

    /// Makes a backup.
    ///
    /// # Errors
    /// When the product says what is no backup, or leaves fleecing images behind.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn backup(&self, order: &Order) -> Result<Backup> {
        let outcome = self.backup_command(order).run()?.assert_success();
        let backup = Backup::told_by(&outcome)?;
        self.check_no_fleecing_images()?;
        Ok(backup)
    }

    /// The files in the fleecing folder, by their paths in it.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn fleecing_images(&self) -> Result<BTreeSet<PathBuf>> {
        files_below(&self.path("fleecing"))
    }

    /// Fails if the fleecing folder is not empty.
    ///
    /// # Errors
    /// With what is in it.
    pub fn check_no_fleecing_images(&self) -> Result<()> {
        let left = self.fleecing_images()?;
        ensure!(left.is_empty(), "fleecing images were left: {left:?}");
        let jobs = fs::read_dir(self.path("fleecing"))?.count();
        ensure!(jobs == 0, "a job's folder was left in the fleecing folder");
        Ok(())
    }

    /// Reads a backup of `archive` completely (`verify`).
    ///
    /// # Errors
    /// When the product cannot be run.
    ///
    /// # Panics
    /// When it is not intact.
    #[track_caller]
    pub fn verify(&self, archive: &Path, id: &str) -> Result<()> {
        let command = self.command(&["verify", id, "--json"]).arg("--archive");
        let outcome = command.arg(archive).run()?.assert_success();
        let document = outcome.document()?;
        ensure!(document["intact"] == true, "{document}");
        Ok(())
    }

    /// Restores a backup of `archive` to raw files in a new folder, which is returned: one
    /// `VOLUME.raw` for each volume.
    ///
    /// # Errors
    /// When the product cannot be run.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn restore(&self, archive: &Path, id: &str) -> Result<PathBuf> {
        let number = self.restores.fetch_add(1, Ordering::Relaxed);
        let folder = self.path(&format!("restored/{number}"));
        fs::create_dir(&folder)?;
        let command = self.command(&["restore", id]).arg("--archive");
        let command = command.arg(archive).arg("--to").arg(&folder);
        command.run()?.assert_success();
        Ok(folder)
    }

    /// Verifies a backup, restores it, and holds each of its volumes against what QEMU itself copied at its point in
    /// time.
    ///
    /// # Errors
    /// When one differs, or there is not a reference for each of the order's disks.
    ///
    /// # Panics
    /// When the product fails.
    #[track_caller]
    pub fn check(
        &self,
        order: &Order,
        backup: &Backup,
        references: &[ReferenceImage],
    ) -> Result<()> {
        let devices: Vec<_> = references.iter().map(|image| &image.device).collect();
        let expected: Vec<_> = order.disks.iter().collect();
        ensure!(devices == expected, "references of {devices:?}");
        self.verify(&order.archive, &backup.id)?;
        let restored = self.restore(&order.archive, &backup.id)?;
        for reference in references {
            let image = restored.join(format!("{}.raw", reference.device));
            compare::same_bytes(&image, &reference.path)
                .with_context(|| format!("{} of backup {}", reference.device, backup.id))?;
        }
        Ok(fs::remove_dir_all(restored)?)
    }

    /// The ids of `archive`'s backups (`list`), in the product's order.
    ///
    /// # Errors
    /// When the product says something else.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn list(&self, archive: &Path) -> Result<Vec<String>> {
        let command = self.command(&["list", "--json"]).arg("--archive");
        let document = command.arg(archive).run()?.assert_success().document()?;
        let rows = document.as_array().context("list prints no list")?;
        rows.iter()
            .map(|row| Ok(row["backup"].as_str().context("no id")?.to_string()))
            .collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // What cannot be shared is compiled again.
        let _ = shared_compiled().and_then(|shared| link_files(&self.compiled(), &shared));
    }
}

/// Where sites leave compiled components for each other: a Python one takes half a minute to compile. The product
/// never changes such a file, and takes none that is not whole.
fn shared_compiled() -> Result<PathBuf> {
    let folder = target_folder()?.join("compiled");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)?;
    Ok(folder)
}

/// Links, or where that cannot be copies, the files of one folder into another, except those that are there.
fn link_files(from: &Path, to: &Path) -> Result<()> {
    for file in files_below(from)? {
        let (source, target) = (from.join(&file), to.join(&file));
        match fs::hard_link(&source, &target) {
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {
                let copy = tempfile::NamedTempFile::new_in(to)?;
                fs::copy(&source, copy.path())?;
                copy.persist(target)?;
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            // Replaced or thrown away by its owner meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            linked => linked?,
        }
    }
    Ok(())
}

impl Order {
    /// The same through a proxy, which makes references.
    #[must_use]
    pub fn through(self, proxy: &Proxy) -> Self {
        Self {
            qmp: proxy.socket().into(),
            ..self
        }
    }

    /// The same with only these disks.
    #[must_use]
    pub fn only(self, disks: &[&str]) -> Self {
        Self {
            disks: disks.iter().map(ToString::to_string).collect(),
            ..self
        }
    }
}

impl Backup {
    /// From the output of `backup --json`.
    ///
    /// # Errors
    /// When that is something else.
    pub fn told_by(outcome: &Outcome) -> Result<Self> {
        let document = outcome.document()?;
        let volumes = document["volumes"].as_array().cloned();
        Ok(Self {
            id: document["backup"].as_str().context("no id")?.into(),
            volumes: volumes.context("no volumes")?,
            said: outcome.stderr.clone(),
        })
    }

    /// What was told of one volume.
    ///
    /// # Panics
    /// When it is not in the backup.
    #[track_caller]
    pub fn volume(&self, name: &str) -> &Value {
        let volume = self.volumes.iter().find(|volume| volume["name"] == name);
        volume.unwrap_or_else(|| panic!("no volume {name} in {:?}", self.volumes))
    }

    /// Bytes that the backup of one volume had to cover.
    ///
    /// # Panics
    /// As [`Backup::volume`].
    #[track_caller]
    pub fn dirty_bytes(&self, volume: &str) -> u64 {
        let volume = self.volume(volume);
        let bytes = volume["dirty_bytes"].as_u64();
        bytes.unwrap_or_else(|| panic!("no dirty_bytes in {volume}"))
    }

    /// Panics unless this volume builds on `base`, or on none.
    ///
    /// # Panics
    /// See there.
    #[track_caller]
    pub fn assert_base(&self, volume: &str, base: Option<&Backup>) {
        let expected = base.map(|base| Value::from(base.id.as_str()));
        let found = &self.volume(volume)["base"];
        assert_eq!(*found, expected.unwrap_or_default(), "{}", self.said);
    }

    /// Panics unless this volume was read in full, and both the manifest and the operator are told a reason that
    /// contains `why`.
    ///
    /// # Panics
    /// See there.
    #[track_caller]
    pub fn assert_read_in_full_because(&self, volume: &str, why: &str) {
        self.assert_base(volume, None);
        let reason = &self.volume(volume)["fallback"];
        let recorded = reason.as_str().is_some_and(|reason| reason.contains(why));
        assert!(recorded, "{why:?} is not recorded: {reason}");
        let of_volume = |line: &&str| line.starts_with(&format!("{volume} ")) && line.contains(why);
        let told = self.said.lines().any(|line| of_volume(&line));
        assert!(told, "{why:?} of {volume} is not told:\n{}", self.said);
    }
}

/// The paths of all files below a folder, relative to it.
///
/// # Errors
/// When one of its folders cannot be read.
pub fn files_below(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                files.insert(entry.path().strip_prefix(folder)?.into());
            }
        }
    }
    Ok(files)
}

/// The lengths of all files below a folder together, in bytes.
///
/// # Errors
/// As [`files_below`].
pub fn bytes_below(folder: &Path) -> Result<u64> {
    let lengths = files_below(folder)?.into_iter().map(|file| {
        let length = fs::metadata(folder.join(file))?.len();
        Ok(length)
    });
    lengths.sum()
}
