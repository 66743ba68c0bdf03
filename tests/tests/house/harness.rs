//! The harness itself: that its truth is the truth, and that it sees what it has to see.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::point_in_time::{PointInTime, nbdcopy, transaction};
use anyhow::Result;
use fleecebox_tests::{
    At, Disk, Ext4Disk, Fault, Load, MIB, Proxy, QemuState, Qmp, QmpError, Stage, StorageDaemon,
    What, Writer, compare,
};
use serde_json::json;

fn load(seed: u64, regions: Option<Vec<std::ops::Range<u64>>>) -> Load {
    Load {
        seed,
        rate: 400,
        regions,
    }
}

#[test]
fn snapshot_access_reads_the_reference_while_both_disks_are_written() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let size = 64 * MIB;
    let ext4 = Ext4Disk::create(&scratch.path().join("ext4.raw"), size)?;
    let disks = [
        Disk::raw("da", size).holding(&ext4.path),
        Disk::qcow2("db", size + 512),
    ];
    let mut daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let proxy = Proxy::start(daemon.monitors())?;
    let before = QemuState::read(daemon.monitors())?;
    let writers = [
        Writer::start(
            daemon.writer_access("da")?,
            load(1, Some(ext4.data_extents)),
        )?,
        Writer::start(daemon.writer_access("db")?, load(2, None))?,
    ];
    writers.iter().try_for_each(|writer| writer.wait_for(50))?;

    let started = Instant::now();
    let sizes = [("da", size), ("db", size + 512)];
    let point = PointInTime::take(proxy.socket(), &sizes, daemon.folder())?;
    println!("point in time with references: {:?}", started.elapsed());
    writers.iter().try_for_each(|writer| writer.wait_for(100))?;
    let copies: Vec<PathBuf> = ["da", "db"]
        .map(|node| scratch.path().join(format!("copy-{node}.raw")))
        .into();
    for (node, copy) in ["da", "db"].iter().zip(&copies) {
        nbdcopy(&daemon.nbd_socket(), &format!("snapshot-{node}"), copy)?;
    }
    let started = Instant::now();
    let references = proxy.references()?;
    println!("references finished after further {:?}", started.elapsed());
    point.tear_down()?;
    for writer in writers {
        let report = writer.stop()?;
        println!("{report:?}");
    }
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);

    let devices: Vec<_> = references
        .iter()
        .map(|reference| reference.device.as_str())
        .collect();
    assert_eq!(devices, ["da", "db"]);
    for (reference, copy) in references.iter().zip(&copies) {
        compare::same_bytes(&reference.path, copy)?;
    }
    compare::ext4_is_clean(&copies[0])?;
    daemon.quit()?;
    for (disk, reference) in daemon.disks().iter().zip(&references) {
        let unchanged = compare::same_disk(&disk.path, &reference.path);
        assert!(
            unchanged.is_err(),
            "the writers changed nothing, so nothing was proved"
        );
    }
    // The live file system was written to the end and is as sound as the snapshot.
    compare::ext4_is_clean(&daemon.disks()[0].path)
}

#[test]
fn whatever_is_left_in_qemu_shows() -> Result<()> {
    let daemon = StorageDaemon::start(&[Disk::qcow2("da", 4 * MIB)])?;
    let before = QemuState::read(daemon.monitors())?;
    let mut qmp = daemon.control()?;
    let fleece = daemon.folder().join("fleece.raw");
    std::fs::File::create(&fleece)?.set_len(4 * MIB)?;
    let file = json!({"driver": "file", "filename": fleece});
    qmp.execute(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "left", "file": file}),
    )?;
    let bitmap = json!({"node": "da", "name": "S1", "persistent": true});
    qmp.execute("block-dirty-bitmap-add", bitmap)?;
    let socket = daemon.folder().join("left.sock");
    let address = json!({"type": "unix", "data": {"path": socket}});
    qmp.execute("nbd-server-start", json!({"addr": address}))?;
    let export = json!({"type": "nbd", "id": "export", "node-name": "left"});
    qmp.execute("block-export-add", export)?;
    let job = json!({"job-id": "job", "device": "da", "target": "left", "sync": "none"});
    qmp.execute("blockdev-backup", job)?;
    drop(qmp);

    let after = QemuState::read(daemon.monitors())?;
    let differences = after.differences(&before, |_| false).join("\n");
    for expected in [
        "+ node left ".to_string(),
        "+ job job ".to_string(),
        "+ export export ".to_string(),
        "+ bitmap S1 on node da, recording, persistent".to_string(),
        format!("+ file {}", fleece.display()),
        format!("+ socket {}", socket.display()),
    ] {
        assert!(
            differences.contains(&expected),
            "no {expected:?} in:\n{differences}"
        );
    }
    let without_bitmaps = after
        .differences(&before, |bitmap| bitmap.name == "S1")
        .join("\n");
    assert!(!without_bitmaps.contains("bitmap"), "{without_bitmaps}");
    Ok(())
}

#[test]
fn writes_that_change_no_state_do_not_show() -> Result<()> {
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::qcow2("da", 4 * MIB)])?;
    // A connection changes what the export shows of itself, in no field that is compared.
    let writer = Writer::start(daemon.writer_access("da")?, load(3, None))?;
    let before = QemuState::read(daemon.monitors())?;
    writer.wait_for(50)?;
    writer.stop()?;
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    Ok(())
}

#[test]
fn one_wrong_byte_is_found() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [left, right] = ["left", "right"].map(|name| folder.path().join(name));
    std::fs::write(&left, vec![1; 1 << 20])?;
    let mut bytes = vec![1; 1 << 20];
    std::fs::write(&right, &bytes)?;
    compare::same_bytes(&left, &right)?;
    compare::same_disk(&left, &right)?;
    bytes[777_777] = 2;
    std::fs::write(&right, bytes)?;
    let error = compare::same_bytes(&left, &right).unwrap_err().to_string();
    assert!(error.contains("777778"), "{error}");
    assert!(compare::same_disk(&left, &right).is_err());
    Ok(())
}

#[test]
fn a_damaged_file_system_is_found() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let ext4 = Ext4Disk::create(&folder.path().join("ext4.raw"), 16 * MIB)?;
    compare::ext4_is_clean(&ext4.path)?;
    let mut image = std::fs::read(&ext4.path)?;
    // The root folder's inode is in the first group's table, within the first blocks.
    image[4096..8 * 4096].fill(0xff);
    std::fs::write(&ext4.path, image)?;
    assert!(compare::ext4_is_clean(&ext4.path).is_err());
    Ok(())
}

#[test]
fn a_failed_transaction_leaves_no_reference_behind() -> Result<()> {
    let daemon = StorageDaemon::start(&[Disk::raw("da", 4 * MIB)])?;
    let proxy = Proxy::start(daemon.monitors())?;
    let before = QemuState::read(daemon.monitors())?;
    let mut qmp = Qmp::connect(proxy.socket())?;
    // The fleecing node does not exist.
    let actions = transaction(&["da".into()]);
    let error = qmp
        .execute("transaction", json!({"actions": actions}))
        .unwrap_err();
    assert!(error.to_string().contains("fl-da"), "{error}");
    assert_eq!(proxy.references()?.len(), 0);
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    Ok(())
}

#[test]
fn a_command_is_cut_off_before_or_after_qemu_did_it() -> Result<()> {
    let daemon = StorageDaemon::start(&[Disk::raw("da", 4 * MIB)])?;
    let proxy = Proxy::start(daemon.monitors())?;
    for (stage, done) in [(Stage::BeforeQemu, false), (Stage::BeforeAnswer, true)] {
        let mut qmp = Qmp::connect(proxy.socket())?;
        proxy.inject(Fault {
            at: At::Named("block-dirty-bitmap-add", 1),
            stage,
            what: What::Cut,
        });
        let bitmap = json!({"node": "da", "name": "S1"});
        let error = qmp.execute("block-dirty-bitmap-add", bitmap).unwrap_err();
        assert!(
            matches!(error, QmpError::Closed | QmpError::Io(_)),
            "{error}"
        );
        let state = QemuState::read(daemon.monitors())?;
        assert_eq!(state.bitmaps().count() == 1, done, "{stage:?}");
        assert_eq!(
            proxy.commands(),
            ["qmp_capabilities", "block-dirty-bitmap-add"]
        );
        proxy.forget_commands();
    }
    Ok(())
}

#[test]
fn a_held_command_waits_for_the_test() -> Result<()> {
    let daemon = StorageDaemon::start(&[])?;
    let proxy = Proxy::start(daemon.monitors())?;
    let soon = Duration::from_secs(5);
    let mut qmp = Qmp::connect(proxy.socket())?;
    proxy.inject(Fault {
        at: At::Number(2),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    });
    let client = std::thread::spawn(move || {
        let answer = qmp.execute("query-jobs", json!({}));
        (qmp, answer)
    });
    let held = proxy.wait_held(soon)?;
    assert_eq!(held.command, "query-jobs");
    std::thread::sleep(Duration::from_millis(50));
    assert!(!client.is_finished());
    held.go_on();
    let (mut qmp, answer) = client.join().expect("the client does not panic");
    assert_eq!(answer?, json!([]));

    proxy.inject(Fault {
        at: At::Number(3),
        stage: Stage::BeforeAnswer,
        what: What::Hold,
    });
    let client = std::thread::spawn(move || qmp.execute("query-jobs", json!({})));
    proxy.wait_held(soon)?.cut();
    assert!(client.join().expect("the client does not panic").is_err());
    Ok(())
}

#[test]
fn a_delayed_answer_comes_later() -> Result<()> {
    let daemon = StorageDaemon::start(&[])?;
    let proxy = Proxy::start(daemon.monitors())?;
    let mut qmp = Qmp::connect(proxy.socket())?;
    let delay = Duration::from_millis(200);
    let at = At::Named("query-jobs", 1);
    proxy.inject(Fault {
        at,
        stage: Stage::BeforeAnswer,
        what: What::Delay(delay),
    });
    let started = Instant::now();
    qmp.execute("query-jobs", json!({}))?;
    assert!(started.elapsed() >= delay);
    Ok(())
}

#[test]
fn a_killed_daemon_starts_again_with_its_disks() -> Result<()> {
    let mut daemon = StorageDaemon::start_with_writer_exports(&[Disk::qcow2("da", 4 * MIB)])?;
    let mut disk = daemon.writer_access("da")?;
    disk.write(123, b"still there")?;
    disk.flush()?;
    daemon.kill()?;
    assert!(disk.flush().is_err());
    daemon.start_again()?;
    let mut found = [0; 11];
    daemon.writer_access("da")?.read(123, &mut found)?;
    assert_eq!(&found, b"still there");
    Ok(())
}
