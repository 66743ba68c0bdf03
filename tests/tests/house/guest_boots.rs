//! The guest: it boots, writes, freezes and thaws, and its disks can be held against a reference.

use std::time::{Duration, Instant};

use super::point_in_time::{PointInTime, nbdcopy};
use anyhow::Result;
use fleecebox_tests::{Guest, MIB, Proxy, QemuState, compare};
use serde_json::json;

#[test]
fn the_guest_boots_freezes_thaws_and_writes_on() -> Result<()> {
    let started = Instant::now();
    let mut guest = Guest::boot(&Guest::usual_disks())?;
    println!("up after {:?}", started.elapsed());
    assert!(guest.is_running()?);
    assert!(!guest.is_frozen()?);
    let before = QemuState::read(guest.monitors())?;

    let position = guest.position();
    let started = Instant::now();
    guest.agent()?.execute("guest-fsfreeze-freeze")?;
    println!("frozen within {:?}", started.elapsed());
    assert!(guest.is_frozen()?);
    // What was under way is reported; then nothing comes any more.
    let _ = guest.wait_for_writes_within(Duration::from_millis(500));
    let frozen = Duration::from_secs(2);
    assert!(
        guest.wait_for_writes_within(frozen).is_err(),
        "a frozen guest wrote"
    );
    guest.agent()?.execute("guest-fsfreeze-thaw")?;
    assert!(!guest.is_frozen()?);

    guest.wait_for_writes()?;
    let worst = guest.worst_write_latency(position);
    assert!(
        worst.is_some_and(|worst| worst >= frozen),
        "the freeze is not seen: {worst:?}"
    );
    let position = guest.position();
    guest.wait_for_writes()?;
    println!(
        "worst write in the thawed guest: {:?}",
        guest.worst_write_latency(position)
    );
    assert!(guest.worst_write_latency(position) < Some(frozen));

    QemuState::read(guest.monitors())?.assert_restored(&before, |_| false);
    Ok(())
}

#[test]
fn a_frozen_guests_snapshot_equals_its_reference_and_is_clean() -> Result<()> {
    let mut guest = Guest::boot(&Guest::usual_disks())?;
    let proxy = Proxy::start(guest.monitors())?;
    let before = QemuState::read(guest.monitors())?;
    let nbd = guest.folder().join("nbd.sock");
    let address = json!({"type": "unix", "data": {"path": nbd}});
    guest
        .control()?
        .execute("nbd-server-start", json!({"addr": address}))?;

    let started = Instant::now();
    guest.agent()?.execute("guest-fsfreeze-freeze")?;
    let disks = [("disk-a", 64 * MIB), ("disk-b", 64 * MIB)];
    let point = PointInTime::take(proxy.socket(), &disks, guest.folder())?;
    guest.agent()?.execute("guest-fsfreeze-thaw")?;
    println!(
        "freeze, point in time with references and thaw: {:?}",
        started.elapsed()
    );
    guest.wait_for_writes()?;
    let copies = disks.map(|(node, _)| guest.folder().join(format!("copy-{node}.raw")));
    for ((node, _), copy) in disks.iter().zip(&copies) {
        nbdcopy(&nbd, &format!("snapshot-{node}"), copy)?;
    }
    let references = proxy.references()?;
    point.tear_down()?;
    guest.control()?.execute("nbd-server-stop", json!({}))?;
    QemuState::read(guest.monitors())?.assert_restored(&before, |_| false);
    guest.wait_for_writes()?;
    guest.kill()?;

    assert_eq!(references.len(), 2);
    for ((reference, copy), disk) in references.iter().zip(&copies).zip(guest.disks()) {
        compare::same_bytes(&reference.path, copy)?;
        compare::ext4_is_clean(copy)?;
        let unchanged = compare::same_disk(&disk.path, &reference.path);
        assert!(
            unchanged.is_err(),
            "the guest changed nothing, so nothing was proved"
        );
    }
    Ok(())
}
