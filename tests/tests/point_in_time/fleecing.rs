//! Fleecing images: their format, their limits, and what is told of them.

use anyhow::{Result, ensure};
use fleecebox_tests::{
    At, Disk, Fault, MIB, Proxy, QemuState, Random, Site, Stage, StorageDaemon, What,
};
use std::time::Duration;

const SIZE: u64 = 16 * MIB;
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn images_in_qcow2_keep_the_old_data_and_go() -> Result<()> {
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("da", SIZE)])?;
    let site = Site::new()?;
    site.configure("[vm.web]\nfleecing-format = 'qcow2'\n")?;
    let proxy = Proxy::start(daemon.monitors())?;
    let order = site.order(&daemon, "chunked")?.through(&proxy);
    let mut bytes = vec![0; MIB as usize];
    let mut random = Random::new(7);
    let mut access = daemon.writer_access("da")?;
    for piece in 0..16 {
        random.fill(&mut bytes);
        access.write(piece * MIB, &bytes)?;
    }
    let before = QemuState::read(daemon.monitors())?;
    for byte in [1, 2] {
        proxy.forget_commands();
        let (at, stage, what) = (
            At::Named("block-export-add", 1),
            Stage::BeforeQemu,
            What::Hold,
        );
        proxy.inject(Fault { at, stage, what });
        let running = site.backup_command(&order).start()?;
        let held = proxy.wait_held(LIMIT)?;
        access.write(4 * MIB, &vec![byte; 4 << 20])?;
        held.go_on();
        let outcome = running.finish()?.assert_success();
        let told = outcome.document()?;
        let peak = told["fleecing_peak_bytes"].as_u64().unwrap_or_default();
        ensure!(peak >= 4 * MIB, "the peak is not told: {told}");
        let backup = fleecebox_tests::Backup::told_by(&outcome)?;
        site.check(&order, &backup, &proxy.references()?)?;
        QemuState::read(daemon.monitors())?.assert_restored(&before, |_| true);
        site.check_no_fleecing_images()?;
    }
    Ok(())
}

/// qcow2 writes a table for each 512 MiB in which anything is discarded: 128 MiB of them for this disk, at some 10 s for
/// a TiB.
#[test]
fn what_is_clean_of_a_large_disk_costs_no_room_in_a_qcow2_image() -> Result<()> {
    const LARGE: u64 = 1 << 40;
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("da", LARGE)])?;
    let site = Site::new()?;
    let order = site.order(&daemon, "chunked")?;
    let mut access = daemon.writer_access("da")?;
    access.write(0, &vec![1; MIB as usize])?;
    site.backup(&order)?;
    site.configure("[vm.web]\nfleecing-format = 'qcow2'\n")?;
    for (byte, at) in [(2, 0), (3, LARGE / 2)] {
        access.write(at, &vec![byte; 64 << 10])?;
        let outcome = site.backup_command(&order).run()?.assert_success();
        let told = outcome.document()?;
        let (peak, steps) = (&told["fleecing_peak_bytes"], &told["step_seconds"]);
        eprintln!("64 KiB of 1 TiB: {peak} bytes, {steps}");
        ensure!(peak.as_u64().is_some_and(|peak| peak < 16 * MIB), "{peak}");
        ensure!(
            told["volumes"][0]["base"].is_string() && !outcome.stderr.contains("not shrink"),
            "{told}: {}",
            outcome.stderr
        );
    }
    Ok(())
}

#[test]
fn a_backup_that_passes_a_limit_is_given_up_and_the_vm_writes_on() -> Result<()> {
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("da", SIZE)])?;
    let site = Site::new()?;
    let order = site.order(&daemon, "stalls-half-way")?;
    let mut access = daemon.writer_access("da")?;
    access.write(0, &vec![3; SIZE as usize / 2])?;
    let before = QemuState::read(daemon.monitors())?;
    for (limit, words) in [
        (
            "fleecing-bytes = '1MiB'",
            "more than the 1048576 of `fleecing-bytes`",
        ),
        (
            "snapshot-seconds = 2",
            "more seconds than the 2 of `snapshot-seconds`",
        ),
    ] {
        site.configure(&format!("[vm.web]\n{limit}\n"))?;
        let running = site.backup_command(&order).start()?;
        running.wait_for_line(LIMIT, |line| line.contains("half of it is stored"))?;
        let mut byte = 0;
        let outcome = loop {
            // Old data of all of it goes to the fleecing image, once.
            byte += 1;
            access.write(0, &vec![byte; SIZE as usize / 2])?;
            if running.family()?.is_empty() || byte > 200 {
                break running.finish()?;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        assert_eq!(outcome.code(), Some(1), "{}", outcome.stderr);
        ensure!(outcome.stderr.contains(words), "{}", outcome.stderr);
        QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
        site.check_no_fleecing_images()?;
    }
    Ok(())
}
