//! A job that is recorded at the customer's and replayed at the vendor's, without the disk.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, Fleecebox, MIB, Site, StorageDaemon, component};

/// What no recording may hold unless it was asked for.
const SECRET: &[u8] = b"the customer's secret";

fn disks(site: &Site) -> Result<[Disk; 2]> {
    let content = site.path("content.raw");
    std::fs::write(&content, SECRET.repeat(20_000))?;
    let disk = |name, size| Disk::raw(name, size).holding(&content);
    Ok([disk("da", 4 * MIB), disk("db", 3 * MIB + 512)])
}

fn replay(vendor: &Site, recording: &Path, provider: &str) -> Result<Fleecebox> {
    let test = vendor.command(&["provider", "test"]);
    let test = test.arg(component(provider)?).arg("--replay");
    Ok(test.arg(recording))
}

#[test]
fn a_failure_is_seen_again_without_the_disk_and_a_mended_provider_goes_another_way() -> Result<()> {
    let customer = Site::new()?;
    let disks = disks(&customer)?;
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let recording = customer.path("case.jsonl");
    let order = customer.order(&daemon, "traps-half-way")?;
    let job = customer
        .backup_command(&order)
        .arg("--record")
        .arg(&recording);
    let failed = job.run()?;
    ensure!(failed.code() == Some(1), "{}", failed.stderr);

    let vendor = Site::new()?;
    let again = replay(&vendor, &recording, "traps-half-way")?.arg("--json");
    let told = again.run()?.assert_success().document()?;
    let processes = told["processes"].as_array().context("no processes")?;
    // The first volume that fails ends the job, and so the other one.
    ensure!((1..=2).contains(&processes.len()), "{told}");
    let ends = processes.iter().filter_map(|it| it["end"].as_str());
    let trapped = ends.filter(|end| end.contains("the provider failed: it trapped"));
    ensure!(trapped.count() >= 1, "{told}");
    ensure!(told["same_component"] == true, "{told}");

    let mended = replay(&vendor, &recording, "chunked")?.run()?;
    ensure!(mended.code() == Some(1), "{}", mended.stdout);
    for said in [
        "another component",
        "then another one",
        "recorded: {\"next-regions\"",
        "now:      {\"put\"",
    ] {
        ensure!(mended.stdout.contains(said), "{said}: {}", mended.stdout);
    }
    let job = customer.backup_command(&order).arg("--record");
    let job = job.arg(customer.path("none/case"));
    job.run()?.assert_refused(2, "none/case cannot be begun");
    let foretold = customer.backup_command(&order).arg("--dry-run");
    let foretold = foretold.arg("--record").arg(customer.path("foretold"));
    let refused = foretold.run()?;
    refused.assert_refused(2, "--dry-run runs no provider");
    ensure!(!customer.path("foretold").exists());
    let other_world = replay(&vendor, &recording, "image")?;
    other_world.run()?.assert_refused(2, "world is provider");
    Ok(())
}

#[test]
fn a_recording_holds_the_disks_bytes_only_when_asked_and_replays_either_way() -> Result<()> {
    let site = Site::new()?;
    let daemon = StorageDaemon::start_with_writer_exports(&disks(&site)?)?;
    let order = site.order(&daemon, "image")?;
    for (name, more) in [("without", &[][..]), ("with", &["--record-bytes"])] {
        let recording = site.path(name);
        let mut job = site
            .backup_command(&order)
            .arg("--full")
            .arg("--record")
            .arg(&recording);
        for argument in more {
            job = job.arg(*argument);
        }
        job.run()?.assert_success();
        let text = std::fs::read_to_string(&recording)?;
        let digits: String = SECRET.iter().map(|byte| format!("{byte:02x}")).collect();
        let words = std::str::from_utf8(SECRET)?;
        let held = text.contains(&digits) || text.contains(words);
        assert_eq!(held, !more.is_empty(), "{name}");

        let again = replay(&site, &recording, "image")?.arg("--json");
        let told = again.run()?;
        // A claim is read back from the provider's own objects; without their bytes its image cannot be opened again.
        if more.is_empty() {
            let document = told.document()?;
            let runs = document["processes"].as_array().context("no processes")?;
            let runs: Vec<_> = runs
                .iter()
                .filter(|it| it["process"]["run"].is_string())
                .collect();
            ensure!(runs.len() == 2, "{document}");
            for run in runs {
                ensure!(
                    run["difference"].is_null() && run["withheld"] == true,
                    "{run}"
                );
            }
        } else {
            told.assert_success();
        }
        let job = site.backup_command(&order).arg("--record").arg(&recording);
        job.run()?.assert_refused(2, "File exists");
    }
    Ok(())
}
