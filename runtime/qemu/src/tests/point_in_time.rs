//! Taking a point in time, reading it, and leaving nothing behind.

use super::daemon::{Daemon, SIZE, both, name, path, run, state, uri};
use crate::bitmap::BitmapPlan;
use crate::ids::JobId;
use crate::leftovers;
use crate::machine::{self, Choice, MachineError, SkipReason};
use crate::removal::ServerFate;
use crate::schema::Schema;
use crate::snapshot::{Broken, Cause, NbdServer};
use serde_json::json;
use std::time::Instant;

#[tokio::test]
async fn an_export_reads_as_of_the_point_in_time_and_teardown_leaves_nothing() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    for disk in ["raw0", "qcow0"] {
        daemon.write(disk, 0x11, 0, 1 << 20);
    }
    let before = state(&monitor).await;

    let request = daemon
        .request(&monitor, daemon.shared(), &BitmapPlan::None)
        .await;
    let start = Instant::now();
    let point = daemon.take(&monitor, request).await.unwrap();
    eprintln!(
        "point in time of two disks, exports included: {:?}",
        start.elapsed()
    );
    for disk in ["raw0", "qcow0"] {
        daemon.write(disk, 0x22, 4096, 1 << 19);
    }
    for volume in &point.volumes {
        assert_eq!(volume.dirty_context, None);
        assert!(daemon.reads(&volume.export, 0x11, 0, 1 << 20));
        let copy = daemon.at("copy.img");
        run(
            "nbdcopy",
            &[&uri(&volume.export, &point.socket), path(&copy)],
        );
        let copy = std::fs::read(copy).unwrap();
        assert_eq!(copy.len() as u64, SIZE);
        assert!(
            copy[..1 << 20].iter().all(|&b| b == 0x11) && copy[1 << 20..].iter().all(|&b| b == 0)
        );
        assert!(daemon.reads(&volume.plan.disk.name, 0x22, 4096, 1 << 19));
    }
    point.check_alive(&monitor).await.unwrap();

    let start = Instant::now();
    let left = super::end(&point, &monitor).await;
    eprintln!("teardown of two disks: {:?}", start.elapsed());
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(state(&monitor).await, before);
    assert!(
        super::end(&point, &monitor).await.is_empty(),
        "a second teardown finds nothing to do"
    );
    // The stranger's server was not stopped.
    assert!(daemon.reads("raw0", 0x22, 4096, 1 << 19));
}

#[tokio::test]
async fn a_server_of_our_own_is_stopped_unless_a_stranger_uses_it() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    let server = || NbdServer::Start(daemon.at("own.sock"));
    for stranger in [false, true] {
        let request = daemon.request(&monitor, server(), &BitmapPlan::None).await;
        let point = daemon.take(&monitor, request).await.unwrap();
        assert_eq!(point.server(), ServerFate::StopIfUnused);
        let plain =
            json!({ "type": "nbd", "id": "stranger", "node-name": "raw0", "name": "stranger" });
        if stranger {
            monitor
                .execute_raw("block-export-add", plain)
                .await
                .unwrap();
        }
        assert!(super::end(&point, &monitor).await.is_empty());
        // QEMU refuses to stop what does not run.
        let stopped = monitor.execute_raw("nbd-server-stop", json!({})).await;
        assert_eq!(stopped.is_ok(), stranger);
    }
}

#[tokio::test]
async fn a_server_that_runs_elsewhere_is_an_error_that_names_the_key_and_undoes_all() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    let before = state(&monitor).await;
    let bitmaps = both(&monitor).await;
    let plan = BitmapPlan::New { name: name("b1") };
    let server = NbdServer::Start(daemon.at("own.sock"));
    let request = daemon.request(&monitor, server, &plan).await;
    let error = daemon.take(&monitor, request).await.unwrap_err();
    assert!(matches!(error.cause, Cause::ServerRunning), "{error}");
    assert!(error.to_string().contains("`nbd`"));
    assert!(error.left.is_empty());
    assert_eq!(state(&monitor).await, before);
    assert_eq!(both(&monitor).await, bitmaps);
    assert!(
        daemon.reads("raw0", 0, 0, 4096),
        "the running server keeps its exports"
    );
}

#[tokio::test]
async fn a_failing_second_disk_takes_the_first_back() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    daemon.plug_guest(&monitor).await;
    let before = state(&monitor).await;
    let bitmaps = both(&monitor).await;
    let plan = BitmapPlan::New { name: name("b1") };

    // Of the wrong size: the transaction fails at its second action.
    let request = daemon.request(&monitor, daemon.shared(), &plan).await;
    std::fs::File::create(&request.plans[1].fleecing)
        .unwrap()
        .set_len(SIZE / 2)
        .unwrap();
    let error = daemon.take(&monitor, request).await.unwrap_err();
    assert!(matches!(error.cause, Cause::Transaction(_)), "{error}");
    assert!(error.left.is_empty(), "{error}");
    assert_eq!(state(&monitor).await, before);
    assert_eq!(both(&monitor).await, bitmaps);

    // Not there: its node cannot be made.
    let mut request = daemon.request(&monitor, daemon.shared(), &plan).await;
    request.plans[1].fleecing = daemon.at("missing.fl");
    let error = daemon.take(&monitor, request).await.unwrap_err();
    assert!(
        matches!(&error.cause, Cause::Fleecing { path, .. } if *path == daemon.at("missing.fl")),
        "{error}"
    );
    assert_eq!(state(&monitor).await, before);
}

#[tokio::test]
async fn a_job_that_ended_is_noticed() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    let server = NbdServer::Start(daemon.at("own.sock"));
    let request = daemon.request(&monitor, server, &BitmapPlan::None).await;
    let point = daemon.take(&monitor, request).await.unwrap();
    let job = point.volumes[1].export.replace("-x1", "-job1");
    monitor
        .execute_raw("block-job-cancel", json!({ "device": job }))
        .await
        .unwrap();
    let mut alive = point.check_alive(&monitor).await;
    for _ in 0..100 {
        if alive.is_err() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        alive = point.check_alive(&monitor).await;
    }
    assert!(matches!(alive, Err(Broken::Failed { disk, .. }) if disk == "qcow0"));
    assert!(super::end(&point, &monitor).await.is_empty());
    assert!(matches!(
        point.check_alive(&monitor).await,
        Err(Broken::Gone { .. })
    ));
}

#[tokio::test]
async fn what_a_dead_job_left_is_found_by_its_id_and_removed() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    let before = state(&monitor).await;
    assert!(leftovers::find(&monitor).await.unwrap().is_empty());

    let server = NbdServer::Start(daemon.at("own.sock"));
    let request = daemon.request(&monitor, server, &BitmapPlan::None).await;
    let (dead, files): (JobId, Vec<_>) = (
        request.job,
        request.plans.iter().map(|p| p.fleecing.clone()).collect(),
    );
    daemon.take(&monitor, request).await.unwrap();
    drop(monitor);

    let monitor = daemon.monitor().await;
    let found = leftovers::find(&monitor).await.unwrap();
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [dead]);
    let leftover = &found[&dead];
    let mut names: Vec<_> = leftover
        .fleecing_files
        .iter()
        .map(std::path::PathBuf::from)
        .collect();
    names.sort();
    let mut expected = files;
    expected.sort();
    assert_eq!(names, expected);
    let left = leftovers::remove(&monitor, leftover, ServerFate::StopIfUnused).await;
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(state(&monitor).await, before);
    assert!(
        monitor
            .execute_raw("nbd-server-stop", json!({}))
            .await
            .is_err(),
        "it was stopped"
    );
}

#[tokio::test]
async fn an_export_goes_from_under_its_client() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    let server = NbdServer::Start(daemon.at("own.sock"));
    let before = state(&monitor).await;
    let request = daemon.request(&monitor, server, &BitmapPlan::None).await;
    let point = daemon.take(&monitor, request).await.unwrap();
    // qemu-io keeps its connection for as long as its standard input is open.
    let mut client = std::process::Command::new("qemu-io")
        .args([
            "-r",
            "-f",
            "raw",
            &uri(&point.volumes[0].export, &point.socket),
        ])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(super::end(&point, &monitor).await.is_empty());
    assert_eq!(state(&monitor).await, before);
    client.kill().unwrap();
    client.wait().unwrap();
}

#[tokio::test]
async fn the_disks_of_a_storage_daemon_are_chosen_by_node_name() {
    let daemon = Daemon::start().await;
    let monitor = daemon.monitor().await;
    let disks = both(&monitor).await;
    let shown: Vec<_> = disks
        .iter()
        .map(|d| (d.name.as_str(), d.size, d.format.as_str(), d.can_persist))
        .collect();
    assert_eq!(
        shown,
        [("raw0", SIZE, "raw", false), ("qcow0", SIZE, "qcow2", true)]
    );
    assert_eq!(disks[0].filename, path(&daemon.at("raw0.img")));

    let all = machine::disks(&monitor, &Choice::All).await;
    assert!(
        matches!(all, Err(MachineError::NoDisks { available }) if available.contains(&"qcow0".to_owned()))
    );
    let unknown = machine::disks(&monitor, &Choice::Named(vec!["raw1".into()])).await;
    assert!(unknown.unwrap_err().to_string().contains("raw0"));
    let twice = machine::disks(&monitor, &Choice::Named(vec!["raw0".into(), "raw0".into()])).await;
    assert!(matches!(twice, Err(MachineError::Twice { .. })));
    assert_eq!(machine::run_state(&monitor).await.unwrap(), None);

    let read_only = json!({ "driver": "file", "node-name": "ro0", "read-only": true, "filename": daemon.at("raw0.img") });
    monitor
        .execute_raw("blockdev-add", read_only)
        .await
        .unwrap();
    let unfit = machine::disks(&monitor, &Choice::Named(vec!["ro0".into()])).await;
    assert!(matches!(
        unfit,
        Err(MachineError::Unfit {
            reason: SkipReason::ReadOnly,
            ..
        })
    ));
}

#[tokio::test]
async fn the_schema_tells_what_this_qemu_has() {
    let daemon = Daemon::start().await;
    let schema = Schema::probe(&daemon.monitor().await).await.unwrap();
    assert!(schema.has_command("block-export-add"));
    assert!(!schema.has_command("block-export-subtract"));
    assert!(schema.command_has_argument("blockdev-backup", "filter-node-name"));
    assert!(!schema.command_has_argument("blockdev-backup", "node-filter-name"));
}
