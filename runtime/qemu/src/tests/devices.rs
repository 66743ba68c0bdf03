//! The disks of a VM by their devices: as a full QEMU 10.0.2 shows them, and with one itself.

use super::daemon::{BLOCK, name, path, run, state};
use super::monitor::fake;
use crate::bitmap::{self, BitmapPlan};
use crate::ids::JobId;
use crate::machine::{self, Choice, Disk, MachineError, SkipReason};
use crate::monitor::Monitor;
use crate::schema::Schema;
use crate::snapshot::{FleecingFormat, Form, NbdServer, Plan, PointRequest, Readers, take};
use serde_json::{Value, json};
use std::fs::File;
use std::time::Duration;

const SIZE: u64 = 1 << 20;

fn node(name: &str, driver: &str, specific: Value) -> Value {
    json!({
        "node-name": name, "drv": driver, "ro": false, "file": format!("{name}.img"), "cache": { "direct": false },
        "image": { "virtual-size": SIZE, "format-specific": specific },
    })
}

/// A VM whose SCSI disk is of type `scsi`.
async fn vm(scsi: &'static str) -> Monitor {
    let raw = node("#block255", "raw", Value::Null);
    let qcow2 = node(
        "nodes",
        "qcow2",
        json!({ "type": "qcow2", "data": { "compat": "1.1" } }),
    );
    let old = node(
        "old",
        "qcow2",
        json!({ "type": "qcow2", "data": { "compat": "0.10" } }),
    );
    let mut sealed = node("sealed", "raw", Value::Null);
    sealed["ro"] = json!(true);
    let devices = json!([
        { "device": "drive-vd0", "qdev": "/machine/peripheral/vd0/virtio-backend", "inserted": raw, "type": "unknown" },
        { "device": "cd0", "qdev": "/machine/peripheral-anon/device[0]", "removable": true },
        { "device": "loose", "inserted": node("#block466", "raw", Value::Null) },
        { "device": "", "qdev": "scsi0", "inserted": qcow2 },
        { "device": "", "qdev": "/machine/peripheral-anon/device[3]", "inserted": old },
        { "device": "", "qdev": "seal0", "inserted": sealed },
    ]);
    let nodes = json!([
        raw,
        node("#block173", "file", Value::Null),
        qcow2,
        old,
        sealed
    ]);
    let script = move |command: &Value| {
        let arguments = &command["arguments"];
        let answer = match command["execute"].as_str().unwrap() {
            "query-block" => devices.clone(),
            "query-named-block-nodes" => nodes.clone(),
            "qom-get" if arguments["path"] == "/machine/peripheral/scsi0" => json!(scsi),
            "qom-get" => json!("virtio-blk-device"),
            "qom-list" => json!([]),
            other => panic!("{other}"),
        };
        format!(r#"{{"return": {answer}, "id": ID}}"#)
    };
    Monitor::over(fake(script), "vm").await.unwrap()
}

fn shown(disks: &[Disk]) -> Vec<(&str, &str, bool)> {
    disks
        .iter()
        .map(|d| (&*d.name, &*d.node, d.can_persist))
        .collect()
}

#[tokio::test]
async fn every_writable_disk_in_a_device_is_found_and_the_rest_is_told() {
    let found = machine::disks(&vm("scsi-hd").await, &Choice::All)
        .await
        .unwrap();
    assert_eq!(
        shown(&found.disks),
        [
            ("vd0", "#block255", false),
            ("scsi0", "nodes", true),
            ("old", "old", false)
        ]
    );
    let skipped: Vec<_> = found.skipped.iter().map(|s| (&*s.name, s.reason)).collect();
    assert_eq!(
        skipped,
        [
            ("cd0", SkipReason::NoMedium),
            ("loose", SkipReason::Unattached),
            ("seal0", SkipReason::ReadOnly)
        ]
    );
}

#[tokio::test]
async fn a_disk_has_one_name_whichever_way_it_is_chosen() {
    let monitor = vm("scsi-hd").await;
    for (chosen, expected) in [
        ("vd0", "vd0"),
        ("drive-vd0", "vd0"),
        ("#block255", "vd0"),
        ("nodes", "scsi0"),
        ("loose", "loose"),
    ] {
        let found = machine::disks(&monitor, &Choice::Named(vec![chosen.into()]))
            .await
            .unwrap();
        assert_eq!(found.disks[0].name, expected, "{chosen}");
    }
    let twice = Choice::Named(vec!["vd0".into(), "drive-vd0".into()]);
    assert!(matches!(
        machine::disks(&monitor, &twice).await,
        Err(MachineError::Twice { .. })
    ));
    let empty = machine::disks(&monitor, &Choice::Named(vec!["cd0".into()])).await;
    assert!(matches!(
        empty,
        Err(MachineError::Unfit {
            reason: SkipReason::NoMedium,
            ..
        })
    ));
    for unknown in ["", "vd1"] {
        let unknown = machine::disks(&monitor, &Choice::Named(vec![unknown.into()])).await;
        let text = unknown.unwrap_err().to_string();
        assert!(
            text.ends_with("there is vd0, loose, scsi0, old, nodes"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn devices_that_pass_commands_around_bitmaps_are_refused() {
    for scsi in ["scsi-block", "scsi-generic"] {
        let monitor = vm(scsi).await;
        for choice in [Choice::All, Choice::Named(vec!["nodes".into()])] {
            let refused = machine::disks(&monitor, &choice).await;
            assert!(
                matches!(refused, Err(MachineError::PassThrough { name, driver }) if name == "scsi0" && driver == scsi)
            );
        }
        let other = machine::disks(&monitor, &Choice::Named(vec!["vd0".into()])).await;
        assert_eq!(other.unwrap().disks.len(), 1);
    }
}

#[tokio::test]
#[ignore = "needs qemu-system-x86_64"]
async fn a_real_emulators_devices_are_found_frozen_in_time_and_left_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (raw, qcow2, socket) = (at("raw.img"), at("s.qcow2"), at("qmp.sock"));
    File::create(&raw).unwrap().set_len(SIZE).unwrap();
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            path(&qcow2),
            &SIZE.to_string(),
        ],
    );
    let (raw, qcow2) = (path(&raw), path(&qcow2));
    let mut emulator = tokio::process::Command::new("qemu-system-x86_64")
        .args("-S -nodefaults -display none -accel tcg -m 64 -device virtio-scsi-pci".split(' '))
        .args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", socket.display()),
        ])
        .args([
            "-drive",
            &format!("file={raw},format=raw,if=none,id=drive-vd0"),
        ])
        .args(["-device", "virtio-blk-pci,drive=drive-vd0,id=vd0"])
        .args([
            "-blockdev",
            &format!("driver=qcow2,node-name=nodes,file.driver=file,file.filename={qcow2}"),
        ])
        .args(["-device", "scsi-hd,drive=nodes,id=scsi0"])
        .args([
            "-drive",
            "if=none,id=cd0,media=cdrom",
            "-device",
            "scsi-cd,drive=cd0",
        ])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let monitor = loop {
        match Monitor::connect(&socket).await {
            Ok(monitor) => break monitor,
            Err(_) => assert!(emulator.try_wait().unwrap().is_none()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let stopped = machine::run_state(&monitor).await.unwrap().unwrap();
    assert_eq!((stopped.running, &*stopped.status), (false, "prelaunch"));
    let before = state(&monitor).await;
    let found = machine::disks(&monitor, &Choice::All).await.unwrap();
    assert_eq!(shown(&found.disks)[1], ("scsi0", "nodes", true));
    assert_eq!(found.disks[0].name, "vd0");
    assert_eq!(found.skipped[0].name, "cd0");

    let plan = BitmapPlan::New { name: name("b1") };
    let plans = found.disks.into_iter().map(|disk| {
        let fleecing = at(&format!("{}.fl", disk.name));
        File::create(&fleecing).unwrap().set_len(SIZE).unwrap();
        Plan {
            disk,
            descriptor: None,
            fleecing,
            bitmap: plan.clone(),
        }
    });
    let request = PointRequest {
        job: JobId::random().unwrap(),
        block_size: BLOCK,
        plans: plans.collect(),
        server: NbdServer::Start(at("nbd.sock")),
        readers: Readers::Discard,
        form: Form::Job,
        format: FleecingFormat::Raw,
        freeze: crate::agent::Freeze::Required,
    };
    let schema = Schema::probe(&monitor).await.unwrap();
    let point = take(&monitor, &schema, request, None).await.unwrap();
    point.check_alive(&monitor).await.unwrap();
    let left = super::end(&point, &monitor).await;
    assert!(left.is_empty(), "{left:?}");
    for volume in &point.volumes {
        bitmap::back_out(&monitor, &volume.plan.disk.node, &plan)
            .await
            .unwrap();
    }
    assert_eq!(state(&monitor).await, before);
}
