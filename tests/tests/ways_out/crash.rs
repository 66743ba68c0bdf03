//! A storage daemon with two disks that are written all the while, and an archive with a full backup of them: what
//! goes wrong after that must leave no trace but in the next run's words.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fleecebox_tests::{
    Disk, Fleecebox, Load, MIB, NbdClient, Outcome, Proxy, QemuState, ReferenceImage, Running,
    StorageDaemon, Writer, compare, component, eventually,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Names of the disks' nodes.
pub(crate) const DISKS: [&str; 2] = ["da", "db"];
/// Few enough that most blocks are clean in an incremental: a change that was forgotten then shows.
const WRITES_PER_SECOND: u32 = 40;
const SOON: Duration = Duration::from_secs(60);

/// Whose NBD server the backups use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// The daemon's, on which the writers' exports are.
    Shared,
    /// The product starts and stops it. Nothing can be written meanwhile, only between the backups.
    Own,
}

/// What one backup, or an attempt at one, left to compare with.
#[derive(Debug, Default)]
pub(crate) struct Attempt {
    /// What is in the journal at its end.
    pub(crate) journal: Option<Value>,
    /// The disks as of its point in time, where it got that far.
    pub(crate) references: Vec<ReferenceImage>,
}

impl Attempt {
    /// How far it says it got.
    pub(crate) fn step(&self) -> Option<&str> {
        self.journal.as_ref()?["step"].as_str()
    }

    /// Whether the manifest was in the archive before the attempt ended, as far as the step tells.
    fn committed(&self) -> Option<bool> {
        match self.step()? {
            "committed" => Some(true),
            // A job that failed before its commit puts its bitmaps back in the same step.
            "switching-bitmaps" => None,
            _ => Some(false),
        }
    }
}

/// The test's world.
pub(crate) struct Site {
    pub(crate) daemon: StorageDaemon,
    pub(crate) proxy: Proxy,
    pub(crate) folder: TempDir,
    /// Where QEMU has to come back to.
    pub(crate) before: QemuState,
    pub(crate) writers: Vec<Writer>,
    server: Server,
    /// The last backup that is known to be committed.
    pub(crate) base: String,
    seed: u64,
}

impl Site {
    /// With a full backup in the archive and, where they can, writers at work.
    pub(crate) fn new(server: Server) -> Result<Self> {
        Self::with_disks(server, 32 * MIB)
    }

    /// With disks of `size` bytes.
    pub(crate) fn with_disks(server: Server, size: u64) -> Result<Self> {
        let disks = [Disk::raw("da", size), Disk::qcow2("db", size)];
        let daemon = match server {
            Server::Shared => StorageDaemon::start_with_writer_exports(&disks)?,
            Server::Own => StorageDaemon::start(&disks)?,
        };
        let folder = TempDir::with_prefix("fleecebox-crash-")?;
        for name in ["archive", "fleecing", "restored"] {
            std::fs::create_dir(folder.path().join(name))?;
        }
        let proxy = Proxy::start(daemon.monitors())?;
        let before = QemuState::read(daemon.monitors())?;
        let mut site = Self {
            daemon,
            proxy,
            folder,
            before,
            writers: Vec::new(),
            server,
            base: String::new(),
            seed: 0,
        };
        std::fs::write(site.path("fleecebox.toml"), site.configuration()?)?;
        if server == Server::Shared {
            site.start_writers(WRITES_PER_SECOND)?;
        }
        site.write_some()?;
        let outcome = site.backup().run()?.assert_success();
        let references = site.proxy.references()?;
        site.base = site.prove(&outcome, &references)?;
        Ok(site)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn configuration(&self) -> Result<String> {
        let nbd = match self.server {
            Server::Shared => format!("nbd = {:?}\n", self.daemon.nbd_socket()),
            Server::Own => String::new(),
        };
        let mut text = format!(
            "state = {:?}\n[vm.box]\ndisks = {DISKS:?}\nprovider = \"chunked\"\narchive = \"here\"\nfleecing = {:?}\n{nbd}\
             [archive.here]\npath = {:?}\n",
            self.path("state"),
            self.path("fleecing"),
            self.path("archive"),
        );
        for name in ["chunked", "stalls-half-way", "dawdles"] {
            text += &format!(
                "[provider.{name}]\ncomponent = {:?}\nnamespace = \"chunked\"\n",
                component(name)?
            );
        }
        Ok(text)
    }

    /// `fleecebox` with the configuration.
    pub(crate) fn fleecebox(&self, arguments: &[&str]) -> Fleecebox {
        let config = [PathBuf::from("--config"), self.path("fleecebox.toml")];
        arguments
            .iter()
            .fold(Fleecebox::new(config).arg("--json"), |all, argument| {
                all.arg(argument)
            })
    }

    /// A backup through the proxy, ready to run.
    pub(crate) fn backup(&self) -> Fleecebox {
        self.fleecebox(&["backup", "box", "--qmp"])
            .arg(self.proxy.socket())
    }

    /// A backup that comes to a halt in the middle of its run: both providers have stored half of their disks.
    pub(crate) fn stalled_backup(&self) -> Result<Running> {
        self.until_logged(self.backup(), "stalls-half-way", "half of it is stored")
    }

    /// A backup by `provider`, as soon as it has logged `line` for both disks.
    pub(crate) fn until_logged(
        &self,
        backup: Fleecebox,
        provider: &str,
        line: &str,
    ) -> Result<Running> {
        let running = backup.arg("--provider").arg(provider).start()?;
        for disk in DISKS {
            let logged = format!("provider ({disk}, info): {line}");
            running.wait_for_line(SOON, |line| line == logged)?;
        }
        Ok(running)
    }

    /// A proxy with no fault pending.
    pub(crate) fn renew_proxy(&mut self) -> Result<()> {
        self.proxy = Proxy::start(self.daemon.monitors())?;
        Ok(())
    }

    /// Writers that go on until they are dropped or stopped.
    pub(crate) fn start_writers(&mut self, rate: u32) -> Result<()> {
        for disk in DISKS {
            self.seed += 1;
            let load = Load {
                seed: self.seed,
                rate,
                regions: None,
            };
            let access = self.daemon.writer_access(disk)?;
            self.writers.push(Writer::start(access, load)?);
        }
        Ok(())
    }

    /// Waits for some writes, or makes them through an NBD server of the moment.
    pub(crate) fn write_some(&mut self) -> Result<()> {
        if self.server == Server::Shared {
            return self
                .writers
                .iter()
                .try_for_each(|writer| writer.wait_for(4));
        }
        let socket = self.daemon.folder().join("moment.sock");
        let mut qmp = self.daemon.control()?;
        let address = json!({"type": "unix", "data": {"path": socket}});
        qmp.execute("nbd-server-start", json!({"addr": address}))?;
        for disk in DISKS {
            qmp.execute(
                "block-export-add",
                json!({"type": "nbd", "id": disk, "node-name": disk, "name": disk, "writable": true}),
            )?;
            self.seed += 1;
            let load = Load {
                seed: self.seed,
                rate: 1000,
                regions: None,
            };
            let writer = Writer::start(NbdClient::connect(&socket, disk)?, load)?;
            writer.wait_for(8)?;
            writer.stop()?;
        }
        qmp.execute("nbd-server-stop", json!({}))?;
        eventually("the moment's exports to go", SOON, || {
            let exports = qmp.execute("query-block-exports", json!({}))?;
            Ok(exports.as_array().is_none_or(Vec::is_empty).then_some(()))
        })
    }

    /// What a job that has just ended left to compare with.
    pub(crate) fn attempt(&self) -> Result<Attempt> {
        let journal = match std::fs::read(self.path("state/vms/box/journal.json")) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes)?),
            Err(_) => None,
        };
        Ok(Attempt {
            journal,
            references: self.proxy.references()?,
        })
    }

    /// After a job was killed or failed: the VM runs on, and the next backup says what it found, cleans up, is an
    /// incremental on the last committed one, and is right. The dead one's is right as well, or is not there.
    pub(crate) fn recover_from(&mut self, dead: &Attempt) -> Result<Outcome> {
        self.daemon.check_alive()?;
        // A dead job's own server would be in the way.
        if self.server == Server::Shared {
            self.write_some()?;
        }
        let outcome = self.backup().run()?.assert_success();
        let references = self.proxy.references()?;
        if let Some(journal) = &dead.journal {
            for field in ["job", "backup", "step"] {
                let value = journal[field].as_str().context("a journal without it")?;
                let (stderr, quoted) = (&outcome.stderr, value.to_string());
                ensure!(
                    stderr.contains(&quoted),
                    "the {field} {value} is not named:\n{stderr}"
                );
            }
        }
        let dead_id = dead
            .journal
            .as_ref()
            .and_then(|journal| journal["backup"].as_str());
        let listed = self.listed()?;
        let committed = dead_id.is_some_and(|id| listed.contains(id));
        if let Some(expected) = dead.committed() {
            ensure!(
                committed == expected,
                "died at {:?}, listed: {committed}",
                dead.step()
            );
        }
        if let (true, Some(id)) = (committed, dead_id) {
            self.base = id.to_string();
            self.restore_equals(id, &dead.references)?;
        }
        let base = self.base.clone();
        self.base = self.prove(&outcome, &references)?;
        for volume in result(&outcome)?["volumes"]
            .as_array()
            .context("no volumes")?
        {
            ensure!(
                volume["base"] == base.as_str() && volume["mode"] == "reuse",
                "not an incremental on {base}: {volume:#}\n{}",
                outcome.stderr
            );
        }
        // What the next one has to carry.
        self.write_some()?;
        Ok(outcome)
    }

    /// A backup that went well restores to its reference and left nothing behind but its bitmaps. Returns its id.
    pub(crate) fn prove(&self, outcome: &Outcome, references: &[ReferenceImage]) -> Result<String> {
        let id = result(outcome)?["backup"]
            .as_str()
            .context("no id")?
            .to_string();
        ensure!(self.listed()?.contains(&id), "{id} is not listed");
        self.assert_clean()?;
        let state = QemuState::read(self.daemon.monitors())?;
        for disk in DISKS {
            let ours: Vec<_> = state
                .bitmaps()
                .filter(|bitmap| bitmap.node == disk)
                .collect();
            let [bitmap] = ours[..] else {
                bail!("not one bitmap on {disk}: {ours:?}");
            };
            let is_sound = bitmap.recording && !bitmap.inconsistent;
            ensure!(
                is_sound && bitmap.name.contains(&format!(":{id}:")),
                "{bitmap}"
            );
        }
        self.restore_equals(&id, references)?;
        Ok(id)
    }

    /// Nothing of any job is left in QEMU (but bitmaps), in the fleecing folder, in the archive, in the state folder.
    pub(crate) fn assert_clean(&self) -> Result<()> {
        QemuState::read(self.daemon.monitors())?.assert_restored(&self.before, |_| true);
        let fleecing = names(&self.path("fleecing"))?;
        ensure!(
            fleecing.is_empty(),
            "left in the fleecing folder: {fleecing:?}"
        );
        let backups = names(&self.path("archive/namespaces/chunked/backups"))?;
        let listed = self.listed()?;
        ensure!(
            backups == listed,
            "in the archive {backups:?}, listed {listed:?}"
        );
        assert_no_temporaries(&self.path("archive"))?;
        let state = names(&self.path("state/vms/box"))?;
        ensure!(
            state == BTreeSet::from(["lock".into()]),
            "in the state folder: {state:?}"
        );
        Ok(())
    }

    /// Ids of all backups.
    pub(crate) fn listed(&self) -> Result<BTreeSet<String>> {
        let outcome = self.fleecebox(&["list"]).run()?.assert_success();
        let rows = result(&outcome)?;
        let rows = rows.as_array().context("no list")?.clone();
        Ok(rows
            .iter()
            .filter_map(|row| row["backup"].as_str().map(String::from))
            .collect())
    }

    fn restore_equals(&self, id: &str, references: &[ReferenceImage]) -> Result<()> {
        let devices: Vec<_> = references
            .iter()
            .map(|image| image.device.as_str())
            .collect();
        ensure!(devices == DISKS, "references of {devices:?}");
        let folder = self.path("restored");
        self.fleecebox(&["restore", id, "--to"])
            .arg(&folder)
            .run()?
            .assert_success();
        for reference in references {
            let restored = folder.join(format!("{}.raw", reference.device));
            compare::same_bytes(&reference.path, &restored)
                .with_context(|| format!("backup {id} is not what {} held", reference.device))?;
            std::fs::remove_file(restored)?;
        }
        Ok(())
    }
}

/// The result that `--json` prints.
pub(crate) fn result(outcome: &Outcome) -> Result<Value> {
    serde_json::from_str(&outcome.stdout).with_context(|| format!("no result: {}", outcome.stdout))
}

fn names(folder: &Path) -> Result<BTreeSet<String>> {
    std::fs::read_dir(folder)
        .with_context(|| folder.display().to_string())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn assert_no_temporaries(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            assert_no_temporaries(&path)?;
        } else {
            let name = path.to_string_lossy();
            ensure!(!name.ends_with(".tmp"), "a temporary file is left: {name}");
        }
    }
    Ok(())
}
