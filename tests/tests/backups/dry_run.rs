//! `fleecebox backup --dry-run` says what the backup then does, and changes nothing; `--bandwidth` holds.

use std::fs;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Disk, Emulator, MIB, Order, QemuState, Random, Site, StorageDaemon, files_below,
};
use serde_json::{Value, json};

const SIZE: u64 = 4 * MIB;
const BLOCK: u64 = 64 << 10;

/// What is told with `--json`; QEMU, the archive and the fleecing folder are as before.
fn foretell(site: &Site, daemon: &StorageDaemon, order: &Order) -> Result<Value> {
    let before = QemuState::read(daemon.monitors())?;
    let archive = files_below(&order.archive)?;
    let outcome = site.backup_command(order).arg("--dry-run").run()?;
    let told = outcome.assert_success().document()?;
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    ensure!(
        files_below(&order.archive)? == archive,
        "the archive changed"
    );
    site.check_no_fleecing_images()?;
    Ok(told)
}

fn disk<'a>(told: &'a Value, name: &str) -> Result<&'a Value> {
    let disks = told["disks"].as_array().context("no disks")?;
    let disk = disks.iter().find(|disk| disk["name"] == name);
    disk.with_context(|| format!("no {name}: {told}"))
}

#[test]
fn what_is_foretold_of_each_disk_is_what_the_backup_does() -> Result<()> {
    let disks = [Disk::raw("da", SIZE), Disk::qcow2("db", SIZE)];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let site = Site::new()?;
    let order = site.order(&daemon, "chunked")?;
    let mut random = Random::new(5);
    let mut bytes = vec![0; BLOCK as usize];
    let mut write = |node: &str, block: u64| -> Result<()> {
        random.fill(&mut bytes);
        Ok(daemon.writer_access(node)?.write(block * BLOCK, &bytes)?)
    };

    let first = foretell(&site, &daemon, &order)?;
    for name in ["da", "db"] {
        let disk = disk(&first, name)?;
        ensure!(
            disk["mode"] == "full" && disk["dirty_bytes"] == SIZE,
            "{disk}"
        );
    }
    ensure!(
        files_below(&order.archive)?.is_empty(),
        "an archive was made"
    );
    let base = site.backup(&order)?;

    for block in [1, 2, 40] {
        write("da", block)?;
    }
    let told = foretell(&site, &daemon, &order)?;
    let (da, db) = (disk(&told, "da")?, disk(&told, "db")?);
    ensure!(
        da["mode"] == "incremental" && da["base"] == *base.id,
        "{da}"
    );
    ensure!(
        da["dirty_bytes"] == 3 * BLOCK && db["dirty_bytes"] == 0,
        "{told}"
    );
    let full = Order {
        full: true,
        ..order.clone()
    };
    let all = foretell(&site, &daemon, &full)?;
    let all = disk(&all, "da")?;
    ensure!(all["mode"] == "full" && all["dirty_bytes"] == SIZE, "{all}");
    ensure!(
        all["bitmaps_removed"] == json!([da["bitmap_used"]]),
        "{all}"
    );
    let lines = site
        .command(&["backup", "web", "--dry-run", "--disk", "da"])
        .arg("--qmp")
        .arg(&order.qmp)
        .arg("--provider")
        .arg(&order.provider)
        .arg("--archive")
        .arg(&order.archive)
        .run()?
        .assert_success()
        .stdout;
    ensure!(
        lines.contains(&format!("what changed since {}", base.id)),
        "{lines}"
    );
    ensure!(
        lines.contains("192.00 KiB") && lines.ends_with("nothing was changed\n"),
        "{lines}"
    );

    let before: Vec<_> = QemuState::read(daemon.monitors())?
        .bitmaps()
        .cloned()
        .collect();
    let names: Vec<_> = before.iter().map(|bitmap| &*bitmap.name).collect();
    ensure!(names.contains(&da["bitmap_used"].as_str().context("no bitmap")?));
    let next = site.backup(&order)?;
    next.assert_base("da", Some(&base));
    assert_eq!(next.dirty_bytes("da"), 3 * BLOCK);
    assert_eq!(next.dirty_bytes("db"), 0);
    let added = |disk: &Value| {
        let added = disk["bitmap_added"].as_str().unwrap_or_default();
        added.replace("BACKUP", &next.id)
    };
    let after = QemuState::read(daemon.monitors())?;
    let mut names: Vec<_> = after.bitmaps().map(|bitmap| bitmap.name.clone()).collect();
    let mut expected = [added(da), added(db)];
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
    Ok(())
}

#[test]
fn what_is_skipped_and_what_is_refused_is_told_with_the_reason() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(|folder| {
        let file = folder.join("va.raw");
        Random::new(9).fill_file(&file, 1)?;
        let node = json!({"driver": "raw", "node-name": "na",
            "file": {"driver": "file", "filename": file}});
        let arguments = [
            ("-blockdev", node.to_string()),
            ("-device", "virtio-blk-pci,id=va,drive=na".into()),
            ("-drive", "if=none,id=cd0,media=cdrom".into()),
            ("-device", "ide-cd,drive=cd0,id=cd0".into()),
        ];
        let flat = arguments.into_iter();
        Ok(flat
            .flat_map(|(option, value)| [option.into(), value])
            .collect())
    })?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let before = QemuState::read(vm.monitors())?;
    let told = site.backup_command(&order).arg("--dry-run").run()?;
    let told = told.assert_success().document()?;
    let skipped = json!([{"name": "cd0", "reason": "it holds no medium"}]);
    ensure!(told["skipped"] == skipped, "{told}");
    ensure!(disk(&told, "va")?["dirty_bytes"] == MIB, "{told}");

    let named = order.clone().only(&["cd0"]);
    let refused = site.backup_command(&named).arg("--dry-run").run()?;
    refused.assert_refused(2, "disk cd0 cannot be backed up: it holds no medium");
    fs::write(order.archive.join("somebody's file"), "")?;
    let refused = site.backup_command(&order).arg("--dry-run").run()?;
    refused.assert_refused(10, "is not empty");
    QemuState::read(vm.monitors())?.assert_restored(&before, |_| false);
    Ok(())
}

#[test]
fn a_vm_that_does_not_run_is_not_started_for_it() -> Result<()> {
    let site = Site::new()?;
    let started = site.path("started");
    site.configure(&format!(
        "[vm.web]\nstart = ['touch', '{}']\n",
        started.display()
    ))?;
    let order = site.order_for(&site.path("no.qmp"), "chunked")?;
    let told = site.backup_command(&order).arg("--dry-run").run()?;
    let told = told.assert_success().document()?;
    let first = told["first"][0].as_str().unwrap_or_default();
    ensure!(first.contains("would be started paused by touch"), "{told}");
    ensure!(told["disks"].is_null() && !started.exists(), "{told}");
    Ok(())
}

/// Seconds for which the provider ran, which is when disks are read.
fn running_seconds(site: &Site, order: &Order, arguments: &[&str]) -> Result<f64> {
    let command = site.backup_command(order).arg("--full");
    let add = |command: fleecebox_tests::Fleecebox, argument: &&str| command.arg(*argument);
    let outcome = arguments.iter().fold(command, add).run()?;
    let told = outcome.assert_success().document()?;
    told["step_seconds"]["running"].as_f64().context("no time")
}

#[test]
fn the_smallest_bandwidth_of_command_vm_and_provider_holds() -> Result<()> {
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("da", SIZE)])?;
    let site = Site::new()?;
    let mut bytes = vec![0; SIZE as usize];
    Random::new(3).fill(&mut bytes);
    daemon.writer_access("da")?.write(0, &bytes)?;
    let order = site.order(&daemon, "chunked")?;
    let provider = format!("[provider.p]\ncomponent = '{}'\n", order.provider);
    let order = Order {
        provider: "p".into(),
        ..order
    };
    // 4 MiB at 2 MiB/s; the last read of at most 1 MiB begins when all before it have had their time.
    let slow = 1.0;
    for (vm, limits, arguments) in [
        ("", "", &["--bandwidth", "2MiB"][..]),
        ("[vm.web]\nbandwidth = 2097152\n", "", &[]),
        (
            "",
            "limits = { bandwidth = 2097152 }\n",
            &["--bandwidth", "1GiB"],
        ),
        (
            "[vm.web]\nbandwidth = 1\n",
            "limits = { bandwidth = 1073741824 }\n",
            &["--bandwidth", "2097152"],
        ),
    ] {
        site.configure(&format!("{vm}{provider}{limits}"))?;
        let took = running_seconds(&site, &order, arguments)?;
        ensure!(took >= slow, "{vm} {limits} {arguments:?}: {took} s");
    }
    for wrong in ["0", "fast", "1MB", "-1"] {
        let outcome = site
            .backup_command(&order)
            .arg(format!("--bandwidth={wrong}"))
            .run()?;
        assert_eq!(outcome.code(), Some(2), "{outcome:?}");
        ensure!(
            outcome.stderr.contains("such as 104857600 or 100MiB"),
            "{}",
            outcome.stderr
        );
    }
    Ok(())
}
