//! Commands that crash QEMU 10.0.2, and that the product never gives: each test shows that the product comes through the
//! situation, and then what the command does. The third, a `qom-set` of the node that a device has already, is in
//! `filter.rs`, as it needs somebody else who moves a disk.

use anyhow::{Result, ensure};
use fleecebox_tests::{
    Disk, Emulator, MIB, QemuState, Qmp, Site, StorageDaemon, component, eventually,
};
use serde_json::{Value, json};

const SIZE: u64 = 4 * MIB;
const LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// Gives the command; whether QEMU survives it.
fn survives(qmp: &mut Qmp, command: &str, arguments: Value) -> bool {
    let refused = |error: &fleecebox_tests::QmpError| {
        matches!(error, fleecebox_tests::QmpError::Refused { .. })
    };
    let survived = qmp
        .execute(command, arguments)
        .as_ref()
        .err()
        .is_none_or(refused);
    if survived {
        fleecebox_tests::not_shown(&format!(
            "what is kept from QEMU: this one has got over {command}"
        ));
    }
    survived
}

#[test]
fn a_backup_job_on_a_disk_that_an_export_runs_in_an_iothread_is_not_started() -> Result<()> {
    let site = Site::new()?;
    let mut vm = Emulator::running(|folder| {
        let file = folder.join("a");
        std::fs::File::create(&file)?.set_len(SIZE)?;
        let blockdev = json!({"driver": "raw", "node-name": "na",
            "file": {"driver": "file", "filename": file}});
        let words = ["-object", "iothread,id=thread0", "-blockdev"];
        let mut words: Vec<String> = words.map(Into::into).to_vec();
        words.push(blockdev.to_string());
        Ok(words)
    })?;
    let mut qmp = vm.control()?;
    let socket = vm.path("nbd.sock");
    let address = json!({"type": "unix", "data": {"path": socket}});
    qmp.execute("nbd-server-start", json!({"addr": address}))?;
    let export = json!({"type": "nbd", "id": "other", "node-name": "na", "name": "other",
        "writable": true, "iothread": "thread0"});
    qmp.execute("block-export-add", export)?;
    drop(qmp);
    let before = QemuState::read(vm.monitors())?;
    let mut order = site
        .order_for(&vm.monitors().product, "chunked")?
        .only(&["na"]);
    order.nbd = Some(socket);
    let outcome = site.backup_command(&order).arg("--quiet").run()?;
    outcome.assert_refused(
        2,
        "disk na is exported (other) by a QEMU that has iothreads",
    );
    QemuState::read(vm.monitors())?.assert_restored(&before, |_| false);
    site.check_no_fleecing_images()?;

    let target = vm.path("target");
    std::fs::File::create(&target)?.set_len(SIZE)?;
    let mut qmp = vm.control()?;
    let node = json!({"driver": "raw", "node-name": "target",
        "file": {"driver": "file", "filename": target}});
    qmp.execute("blockdev-add", node)?;
    let job = json!({"job-id": "job", "device": "na", "target": "target", "sync": "none"});
    if !survives(&mut qmp, "blockdev-backup", job) {
        ensure!(!vm.wait()?.success(), "QEMU neither answered nor crashed");
    }
    Ok(())
}

#[test]
fn bitmaps_are_never_merged_from_an_empty_list() -> Result<()> {
    let site = Site::new()?;
    let mut daemon = StorageDaemon::start_with_writer_exports(&[Disk::qcow2("da", SIZE)])?;
    let order = site.order(&daemon, "chunked")?;
    let base = site.backup(&order)?;
    let mut access = daemon.writer_access("da")?;
    access.write(0, &[1; 65536])?;
    // An incremental that fails is where bitmaps are merged.
    let mut failing = order.clone();
    failing.provider = component("traps-half-way")?.display().to_string();
    site.configure(&format!(
        "[provider.bad]\ncomponent = '{}'\nnamespace = 'chunked'\n",
        failing.provider
    ))?;
    failing.provider = "bad".into();
    let outcome = site.backup_command(&failing).run()?;
    assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
    daemon.check_alive()?;
    let next = site.backup(&order)?;
    next.assert_base("da", Some(&base));
    assert_eq!(next.dirty_bytes("da"), 65536);

    let mut qmp = daemon.control()?;
    qmp.execute(
        "block-dirty-bitmap-add",
        json!({"node": "da", "name": "other"}),
    )?;
    let merge = json!({"node": "da", "target": "other", "bitmaps": []});
    if !survives(&mut qmp, "block-dirty-bitmap-merge", merge) {
        eventually("QEMU to crash", LIMIT, || {
            Ok(daemon.check_alive().is_err().then_some(()))
        })?;
    }
    Ok(())
}
