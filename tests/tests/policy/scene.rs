//! What the tests of policies happen in.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, MIB, Order, Proxy, Random, Site, StorageDaemon, component};
use serde_json::Value;

/// The exit status where disks are missing.
pub(crate) const INCOMPLETE: i32 = 3;
/// The exit status for what the user can mend.
pub(crate) const MISTAKE: i32 = 2;
/// The exit status for what no rule grants.
pub(crate) const DENIED: i32 = 12;

/// Two disks with 2 MiB of data each, and two tenants of which one has two providers: `honest` and `limited`.
pub(crate) struct Scene {
    pub(crate) site: Site,
    pub(crate) daemon: StorageDaemon,
}

impl Scene {
    pub(crate) fn new(limited: &str, rule: &str) -> Result<Self> {
        let size = 16 * MIB;
        let disks = [Disk::raw("da", size), Disk::qcow2("db", size + 512)];
        let scene = Self {
            site: Site::new()?,
            daemon: StorageDaemon::start_with_writer_exports(&disks)?,
        };
        scene.change(0)?;
        let (honest, limited) = (component("chunked")?, component(limited)?);
        scene.site.configure(&format!(
            "[archive.main]\npath = '{archive}'\n[archive.spare]\npath = '{archive}'\n\
             [tenant.acme]\nvms = ['web', 'twin']\narchives = ['main']\n\
             [tenant.acme.provider.honest]\ncomponent = '{}'\nsha256 = '{}'\n\
             [tenant.acme.provider.limited]\ncomponent = '{}'\nsha256 = '{}'\n\
             [[tenant.acme.grant]]\nprovider = 'honest'\nvms = 'all'\nvolumes = 'all'\n\
             [[tenant.acme.grant]]\nprovider = 'limited'\nvms = ['web', 'twin']\nvolumes = 'all'\n{rule}\n\
             [tenant.beta]\nvms = ['other']\narchives = ['spare']\n\
             [tenant.beta.provider.limited]\ncomponent = '{}'\nsha256 = '{}'\n",
            honest.display(),
            sha256(&honest)?,
            limited.display(),
            sha256(&limited)?,
            honest.display(),
            sha256(&honest)?,
            archive = scene.site.archive().display(),
        ))?;
        Ok(scene)
    }

    pub(crate) fn configure_with(&self, change: impl Fn(&str) -> String) -> Result<()> {
        let text = fs::read_to_string(self.site.path("fleecebox.toml"))?;
        let changed = change(&text);
        ensure!(changed != text, "nothing was changed in {text}");
        self.site.configure(&changed)
    }

    pub(crate) fn order(&self, provider: &str) -> Result<Order> {
        Ok(Order {
            provider: provider.into(),
            archive: "main".into(),
            ..self.site.order(&self.daemon, "chunked")?
        })
    }

    /// Overwrites the first 2 MiB of each disk.
    pub(crate) fn change(&self, seed: u64) -> Result<()> {
        let mut random = Random::new(seed);
        for disk in ["da", "db"] {
            let mut bytes = vec![0; 2 * MIB as usize];
            random.fill(&mut bytes);
            let mut access = self.daemon.writer_access(disk)?;
            access.write(0, &bytes)?;
            access.flush()?;
        }
        Ok(())
    }

    /// Sees a backup denied before QEMU is asked anything, and a record of it.
    pub(crate) fn denies(&self, order: &Order, says: &str) -> Result<()> {
        self.refuses_and_records(DENIED, order, says)
    }

    /// The same of one that the user can mend.
    pub(crate) fn finds_mistaken(&self, order: &Order, says: &str) -> Result<()> {
        self.refuses_and_records(MISTAKE, order, says)
    }

    fn refuses_and_records(&self, status: i32, order: &Order, says: &str) -> Result<()> {
        self.refuses(status, order, says)?;
        let record = self.last_record()?;
        ensure!(
            record["outcome"] == "refused" && record["vm"] == *order.vm,
            "{record}"
        );
        let error = record["error"].as_str().unwrap_or_default();
        ensure!(error.contains(says), "{record}");
        Ok(())
    }

    pub(crate) fn refuses(&self, status: i32, order: &Order, says: &str) -> Result<()> {
        let proxy = Proxy::start(self.daemon.monitors())?;
        let order = order.clone().through(&proxy);
        let command = self.site.backup_command(&order).arg("--quiet");
        command.run()?.assert_refused(status, says);
        let asked = proxy.commands();
        ensure!(asked.is_empty(), "QEMU was asked: {asked:?}");
        self.site.check_no_fleecing_images()
    }

    pub(crate) fn last_record(&self) -> Result<Value> {
        let file = self.site.path("state/audit.jsonl");
        let text = fs::read_to_string(&file)?;
        let last = text.lines().last().context("no record")?;
        Ok(serde_json::from_str(last)?)
    }
}

/// As coreutils know it.
pub(crate) fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(file).output()?;
    let text = String::from_utf8(output.stdout)?;
    let digest = text.split_whitespace().next();
    Ok(digest.context("sha256sum printed nothing")?.to_owned())
}
