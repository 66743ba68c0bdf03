//! Archives that a released version wrote: read as ever, named where they may lack something, and nothing is built on them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, MIB, Site, StorageDaemon, compare, files_below};

/// What version 0.1 left.
fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("kept/0.1")
        .join(name)
}

/// A site with that version's archive.
fn site() -> Result<Site> {
    let site = Site::new()?;
    for file in files_below(&kept("archive"))? {
        let to = site.archive().join(&file);
        fs::create_dir_all(to.parent().context("no folder")?)?;
        fs::copy(kept("archive").join(&file), to)?;
    }
    // Empty folders are not kept.
    for namespace in ["chunked", "image"] {
        let packs = site
            .archive()
            .join("namespaces")
            .join(namespace)
            .join("packs");
        fs::create_dir_all(packs)?;
    }
    Ok(site)
}

#[test]
fn an_older_versions_increments_are_named_by_verify_and_audit() -> Result<()> {
    let site = site()?;
    let ids = site.list(&site.archive())?;
    ensure!(ids.len() == 4, "{ids:?}");
    let mut suspects = Vec::new();
    for id in &ids {
        let command = site.command(&["verify", id, "--json"]);
        let verified = command.arg("--archive").arg(site.archive()).run()?;
        let verified = verified.assert_success();
        let document = verified.document()?;
        ensure!(document["intact"] == true, "{document}");
        let doubts = document["doubts"].as_array().context("no doubts")?;
        ensure!(doubts.is_empty() != verified.stderr.contains("is suspect"));
        if !doubts.is_empty() {
            suspects.push(id.as_str());
        }
    }
    ensure!(suspects.len() == 2, "{suspects:?}");
    let command = site.command(&["audit", "--json"]).arg("--archive");
    let audit = command.arg(site.archive()).run()?.assert_success();
    let document = audit.document()?;
    let rows = document.as_array().context("no rows")?;
    for id in suspects {
        let row = rows.iter().find(|row| row["backup"] == id);
        let doubts = row.context("not named")?["doubts"].to_string();
        ensure!(doubts.contains("it is incremental"), "{doubts}");
    }
    // Those of `image`, which claims.
    let claims = rows
        .iter()
        .filter(|row| row["doubts"].to_string().contains("claims"));
    ensure!(claims.count() == 2, "{document}");
    Ok(())
}

#[test]
fn the_first_backup_reads_in_full_what_an_older_version_tracked_and_the_next_does_not() -> Result<()>
{
    let site = site()?;
    let mut daemon = StorageDaemon::start(&[Disk::qcow2("da", MIB)])?;
    daemon.quit()?;
    fs::copy(kept("disk.qcow2"), &daemon.disks()[0].path)?;
    daemon.start_again()?;
    for provider in ["chunked", "image"] {
        let order = site.order(&daemon, provider)?;
        let first = site.backup(&order)?;
        first.assert_read_in_full_because("da", "version 0.1");
        let second = site.backup(&order)?;
        second.assert_base("da", Some(&first));
        site.verify(&site.archive(), &second.id)?;
        let restored = site.restore(&site.archive(), &second.id)?;
        compare::same_disk(&restored.join("da.raw"), &kept("disk.qcow2"))?;
    }
    Ok(())
}
