//! What a VM is doing when its backup comes: running, stopped, paused, migrating; and what belongs to it beside its
//! disks.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    At, Backup, Emulator, Fault, MIB, Order, Proxy, QemuState, Qmp, Random, Site, Stage, What,
    compare, eventually,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const SIZE: u64 = 4 * MIB;
const LIMIT: Duration = Duration::from_secs(60);

/// A qcow2 disk of random bytes on virtio-blk, `id=va`.
fn one_disk(folder: &Path) -> Result<Vec<String>> {
    let (raw, qcow2) = (folder.join("a.raw"), folder.join("a.qcow2"));
    Random::new(1).fill_file(&raw, SIZE / MIB)?;
    let mut convert = Command::new("qemu-img");
    convert
        .args(["convert", "-O", "qcow2"])
        .arg(&raw)
        .arg(&qcow2);
    ensure!(convert.status()?.success(), "qemu-img convert");
    let blockdev = json!({"driver": "qcow2", "node-name": "na", "file": {"driver": "file", "filename": qcow2}});
    Ok(vec![
        "-blockdev".into(),
        blockdev.to_string(),
        "-device".into(),
        "virtio-blk-pci,id=va,drive=na".into(),
    ])
}

/// The configuration of the VM `web`.
fn configure(site: &Site, lines: &str) -> Result<()> {
    site.configure(&format!("[vm.web]\n{lines}\n"))
}

fn array(words: &[String]) -> String {
    // TOML's basic strings are JSON's for what is in here.
    serde_json::Value::from(words.to_vec()).to_string()
}

fn holds(site: &Site, backup: &Backup, volume: &str, image: &Path) -> Result<()> {
    site.verify(&site.archive(), &backup.id)?;
    let restored = site.restore(&site.archive(), &backup.id)?;
    compare::same_bytes(&restored.join(format!("{volume}.raw")), image)
}

/// Waits until the journal says so.
fn reads_the_snapshot(site: &Site) -> Result<()> {
    let journal = site.path("state/vms/web/journal.json");
    eventually("the job to take its snapshot", LIMIT, || {
        let text = std::fs::read_to_string(&journal).unwrap_or_default();
        Ok(text.contains(r#""step": "running""#).then_some(()))
    })
}

#[test]
fn a_stopped_vm_is_started_paused_and_stopped_again() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::new(one_disk)?;
    configure(&site, &format!("start = {}", array(&vm.command(&["-S"]))))?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let first = site.backup(&order)?;
    for said in [
        "the VM does not run; starting it paused",
        "the VM does not run (it is prelaunch)",
        "the VM is stopped again",
    ] {
        ensure!(first.said.contains(said), "{said}: {}", first.said);
    }
    // That no process of the run is left, QEMU included, each run of the product checks; nor does a note stay.
    ensure!(!site.path("state/vms/web/started").exists());
    holds(&site, &first, "va", &vm.path("a.raw"))?;

    // The bitmap was stored when QEMU quit. This command goes into the background by itself.
    let daemonized = vm.command(&["-S", "-daemonize"]);
    configure(&site, &format!("start = {}", array(&daemonized)))?;
    let second = site.backup(&order)?;
    second.assert_base("va", Some(&first));
    assert_eq!(second.dirty_bytes("va"), 0);
    ensure!(vm.control().is_err(), "the VM still runs");
    holds(&site, &second, "va", &vm.path("a.raw"))
}

#[test]
fn a_vm_that_cannot_be_started_paused_is_a_mistake() -> Result<()> {
    let site = Site::new()?;
    let mut vm = Emulator::new(one_disk)?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let refused = |name: &str| -> Result<()> {
        let command = site.backup_command(&order).arg("--quiet");
        command.run()?.assert_refused(2, name);
        ensure!(!site.path("state/vms/web/started").exists());
        site.check_no_fleecing_images()
    };
    refused("the key `start`")?;
    configure(&site, r#"start = ["/nonexistent/qemu"]"#)?;
    refused("/nonexistent/qemu")?;
    configure(&site, r#"start = ["false"]"#)?;
    refused("did not start it: exit status: 1")?;
    // The product finds a running guest where it asked for a paused one; ending that would lose its writes.
    let wanted = site.path("wanted");
    configure(
        &site,
        &format!(r#"start = ["touch", "{}"]"#, wanted.display()),
    )?;
    let running = site.backup_command(&order).arg("--quiet").start()?;
    eventually("the product to start the VM", LIMIT, || {
        Ok(wanted.exists().then_some(()))
    })?;
    vm.start(&[])?;
    running.finish()?.assert_refused(2, "let the guest run");
    assert_eq!(vm.status()?, "running");
    Ok(())
}

#[test]
fn a_command_that_starts_the_vm_has_ended_before_its_monitor_is_used() -> Result<()> {
    let site = Site::new()?;
    let mut vm = Emulator::new(one_disk)?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let (wanted, done, stopped) = (site.path("wanted"), site.path("done"), site.path("stopped"));
    // Asks for the VM, as libvirt's client does, and has more to do when the monitor is there.
    let start = format!(
        "touch {}; until [ -e {} ]; do sleep 0.05; done",
        wanted.display(),
        done.display()
    );
    let stop = format!(
        "touch {}; kill $(cat {})",
        stopped.display(),
        site.path("pid").display()
    );
    let start = json!(["sh", "-c", start]);
    let stop = json!(["sh", "-c", stop]);
    configure(&site, &format!("start = {start}\nstop = {stop}"))?;
    let running = site.backup_command(&order).start()?;
    eventually("the product to start the VM", LIMIT, || {
        Ok(wanted.exists().then_some(()))
    })?;
    let pid = site.path("pid");
    vm.start(&["-S", "-pidfile", pid.to_str().context("a path in UTF-8")?])?;
    // The monitor serves one client at a time: this one, as long as the command runs.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let mut monitor = Qmp::connect(&vm.monitors().product)?;
    monitor.execute("query-status", json!({}))?;
    drop(monitor);
    std::fs::write(done, "")?;
    let outcome = running.finish()?.assert_success();
    ensure!(stopped.exists(), "{}", outcome.stderr);
    ensure!(vm.wait()?.success(), "the VM did not end in good order");
    Ok(())
}

#[test]
fn a_vm_whose_command_fails_is_not_used_even_if_it_runs() -> Result<()> {
    let site = Site::new()?;
    let mut vm = Emulator::new(one_disk)?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let (wanted, done) = (site.path("wanted"), site.path("done"));
    let start = format!(
        "touch {}; until [ -e {} ]; do sleep 0.05; done; exit 3",
        wanted.display(),
        done.display()
    );
    configure(&site, &format!("start = {}", json!(["sh", "-c", start])))?;
    let running = site.backup_command(&order).arg("--quiet").start()?;
    eventually("the product to start the VM", LIMIT, || {
        Ok(wanted.exists().then_some(()))
    })?;
    vm.start(&["-S"])?;
    let before = QemuState::read(vm.monitors())?;
    std::fs::write(done, "")?;
    running
        .finish()?
        .assert_refused(2, "did not start it: exit status: 3");
    QemuState::read(vm.monitors())?.assert_restored(&before, |_| false);
    assert_eq!(vm.status()?, "prelaunch");
    Ok(())
}

#[test]
fn a_job_that_dies_leaves_the_vm_it_started_to_the_next() -> Result<()> {
    let site = Site::new()?;
    let mut vm = Emulator::new(one_disk)?;
    let wanted = site.path("wanted");
    // The VM is the test's own, so that the job's death does not take it along.
    configure(
        &site,
        &format!(r#"start = ["touch", "{}"]"#, wanted.display()),
    )?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let command = site.backup_command(&order);
    let running = command.env("FLEECEBOX_STOP_AT", "running").start()?;
    eventually("the product to start the VM", LIMIT, || {
        Ok(wanted.exists().then_some(()))
    })?;
    vm.start(&["-S"])?;
    let before = QemuState::read(vm.monitors())?;
    reads_the_snapshot(&site)?;
    running.kill()?;
    assert_eq!(vm.status()?, "prelaunch");
    let now = QemuState::read(vm.monitors())?;
    ensure!(
        !now.differences(&before, |_| true).is_empty(),
        "it was killed too early"
    );

    let next = site.backup(&order)?;
    let said = "an earlier job started the VM paused and died";
    ensure!(next.said.contains(said), "{}", next.said);
    ensure!(vm.wait()?.success(), "the VM did not end in good order");
    ensure!(!site.path("state/vms/web/started").exists());
    holds(&site, &next, "va", &vm.path("a.raw"))?;

    // One that somebody lets run is not the job's any more.
    std::fs::remove_file(&wanted)?;
    let command = site.backup_command(&order);
    let running = command.env("FLEECEBOX_STOP_AT", "running").start()?;
    eventually("the product to start the VM", LIMIT, || {
        Ok(wanted.exists().then_some(()))
    })?;
    vm.start(&["-S"])?;
    reads_the_snapshot(&site)?;
    running.kill()?;
    vm.control()?.execute("cont", json!({}))?;
    let last = site.backup(&order)?;
    ensure!(last.said.contains("it was let run since"), "{}", last.said);
    assert_eq!(vm.status()?, "running");
    holds(&site, &last, "va", &vm.path("a.raw"))
}

#[test]
fn a_vm_that_stands_still_stays_so_and_one_without_its_disks_is_refused() -> Result<()> {
    let site = Site::new()?;
    let mut vm = Emulator::running(one_disk)?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    vm.control()?.execute("stop", json!({}))?;
    // A socket with no agent behind it would fail the backup of a VM that runs.
    let command = site
        .backup_command(&order)
        .arg("--agent")
        .arg(site.path("none"));
    let outcome = command.run()?.assert_success();
    let paused = Backup::told_by(&outcome)?;
    ensure!(paused.said.contains("(it is paused)"), "{}", paused.said);
    assert_eq!(vm.status()?, "paused");
    holds(&site, &paused, "va", &vm.path("a.raw"))?;

    let refused = |vm: &Emulator, status: &str| -> Result<()> {
        let before = QemuState::read(vm.monitors())?;
        let outcome = site.backup_command(&order).arg("--quiet").run()?;
        outcome.assert_refused(2, &format!("the VM is in the state {status}"));
        QemuState::read(vm.monitors())?.assert_restored(&before, |_| false);
        site.check_no_fleecing_images()
    };
    let mut qmp = vm.control()?;
    qmp.execute("migrate", json!({"uri": "exec:cat >/dev/null"}))?;
    eventually("the migration", LIMIT, || {
        let state = qmp.execute("query-migrate", json!({}))?;
        Ok((state["status"] == "completed").then_some(()))
    })?;
    drop(qmp);
    refused(&vm, "postmigrate")?;
    vm.quit()?;
    vm.start(&["-incoming", "defer"])?;
    refused(&vm, "inmigrate")
}

/// As after libvirt's restore of saved memory: until the VM is continued its disks are not quite QEMU's.
#[test]
fn disks_that_qemu_holds_inactive_are_refused_by_name_before_anything_is_done() -> Result<()> {
    let site = Site::new()?;
    let mut vm = Emulator::running(one_disk)?;
    let memory = json!({"uri": format!("file:{}", vm.path("memory").display())});
    let mut qmp = vm.control()?;
    qmp.execute("stop", json!({}))?;
    qmp.execute("migrate", memory.clone())?;
    eventually("the memory to be saved", LIMIT, || {
        let state = qmp.execute("query-migrate", json!({}))?;
        Ok((state["status"] == "completed").then_some(()))
    })?;
    drop(qmp);
    vm.quit()?;
    vm.start(&["-S", "-incoming", "defer"])?;
    let mut qmp = vm.control()?;
    let late = json!([{"capability": "late-block-activate", "state": true}]);
    qmp.execute("migrate-set-capabilities", json!({"capabilities": late}))?;
    qmp.execute("migrate-incoming", memory)?;
    eventually("the memory to be loaded", LIMIT, || {
        let state = qmp.execute("query-status", json!({}))?;
        Ok((state["status"] == "paused").then_some(()))
    })?;
    drop(qmp);

    let before = QemuState::read(vm.monitors())?;
    let proxy = Proxy::start(vm.monitors())?;
    let order = site.order_for(proxy.socket(), "chunked")?;
    for dry in [true, false] {
        let backup = site.backup_command(&order);
        let backup = if dry { backup.arg("--dry-run") } else { backup };
        let refused = backup.run()?;
        ensure!(
            refused.code() == Some(2)
                && refused.stderr.contains("holds disk va (node na) inactive"),
            "{refused:?}"
        );
    }
    // What changes nothing, and the claim of a job that looks.
    let harmless = |command: &String| {
        let words = [
            "query-",
            "qom-",
            "qmp_capabilities",
            "object-",
            "getfd",
            "chardev-",
        ];
        words.iter().any(|word| command.contains(word))
    };
    let commands = proxy.commands();
    let harm: Vec<_> = commands.iter().filter(|it| !harmless(it)).collect();
    ensure!(harm.is_empty(), "{harm:?}");
    QemuState::read(vm.monitors())?.assert_restored(&before, |_| true);
    site.check_no_fleecing_images()?;

    vm.control()?.execute("cont", json!({}))?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    site.backup(&order).map(drop)
}

/// The storage of such a disk is asked by an export, which keeps its node from being removed.
#[test]
fn a_disk_that_is_not_in_the_backup_may_be_unplugged_and_is_named() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(|folder| {
        let mut arguments = one_disk(folder)?;
        let other =
            json!({"driver": "null-co", "node-name": "nb", "size": SIZE, "read-zeroes": true});
        for (option, value) in [
            ("-device", "virtio-scsi-pci,id=scsi".into()),
            ("-blockdev", other.to_string()),
            ("-device", "scsi-hd,bus=scsi.0,id=vb,drive=nb".into()),
        ] {
            arguments.extend([option.into(), value]);
        }
        Ok(arguments)
    })?;
    let order = Order {
        disks: vec!["va".into()],
        ..site.order_for(&vm.monitors().product, "chunked")?
    };
    let backup = site.backup_command(&order);
    let running = backup.env("FLEECEBOX_STOP_AT", "running").start()?;
    reads_the_snapshot(&site)?;
    let mut qmp = vm.control()?;
    qmp.execute("device_del", json!({"id": "vb"}))?;
    let removed = |qmp: &mut Qmp| qmp.execute("blockdev-del", json!({"node-name": "nb"}));
    eventually("the device to go", LIMIT, || {
        let devices = qmp.execute("query-block", json!({}))?.to_string();
        Ok((!devices.contains(r#""node-name":"nb""#)).then_some(()))
    })?;
    ensure!(removed(&mut qmp).is_err(), "nothing had the node");
    let job = Pid::from_raw(running.process().pid).context("no process")?;
    eventually("the backup to end", LIMIT, || {
        let _ = kill_process(job, Signal::CONT);
        Ok(running.said().contains("node nb").then_some(()))
    })?;
    running.finish()?.assert_success();
    removed(&mut qmp)?;
    Ok(())
}

/// EFI's read-only code and its variables on flash, an empty drive, a read-only disk, and a disk.
fn with_flash(folder: &Path) -> Result<Vec<String>> {
    for (name, seed, mib) in [("code", 2, 4), ("vars", 3, 4), ("sealed", 4, 1)] {
        Random::new(seed).fill_file(&folder.join(name), mib)?;
    }
    let flash = |unit: u32, name: &str, more: &str| {
        let file = folder.join(name);
        format!(
            "if=pflash,format=raw,unit={unit},file={}{more}",
            file.display()
        )
    };
    let sealed = json!({"driver": "raw", "node-name": "sealed", "read-only": true,
        "file": {"driver": "file", "filename": folder.join("sealed")}});
    let mut arguments = one_disk(folder)?;
    for (option, value) in [
        ("-drive", flash(0, "code", ",readonly=on")),
        ("-drive", flash(1, "vars", "")),
        ("-drive", "if=none,id=cd0,media=cdrom".into()),
        ("-device", "ide-cd,drive=cd0,id=cd0".into()),
        ("-blockdev", sealed.to_string()),
        ("-device", "virtio-blk-pci,id=vs,drive=sealed".into()),
    ] {
        arguments.extend([option.into(), value]);
    }
    Ok(arguments)
}

#[test]
fn efi_variables_and_tpm_state_join_and_empty_and_read_only_drives_are_skipped() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(with_flash)?;
    let proxy = Proxy::start(vm.monitors())?;
    let order = site.order_for(&vm.monitors().product, "chunked")?;
    let plain = site.backup(&order)?;
    for said in [
        "pflash0 is skipped: it is read-only",
        "cd0 is skipped: it holds no medium",
        "vs is skipped: it is read-only",
    ] {
        ensure!(plain.said.contains(said), "{said}: {}", plain.said);
    }
    holds(&site, &plain, "pflash1", &vm.path("vars"))?;

    // No multiple of a sector, and the last sector reads as zeroes behind it.
    let tpm = site.path("tpm2-00.permall");
    let mut state = vec![7; 5000];
    std::fs::write(&tpm, &state)?;
    let lines = format!(
        "[vm.web.extra]\nefivars = 'pflash1'\nsealed = 'vs'\ntpm = '{}'",
        tpm.display()
    );
    site.configure(&lines)?;
    let before = QemuState::read(vm.monitors())?;
    let with_extra = site.backup(&order)?;
    QemuState::read(vm.monitors())?.assert_restored(&before, |_| true);
    let names: Vec<_> = with_extra
        .volumes
        .iter()
        .map(|volume| &volume["name"])
        .collect();
    assert_eq!(names, ["efivars", "va", "sealed", "tpm"]);
    holds(&site, &with_extra, "efivars", &vm.path("vars"))?;
    holds(&site, &with_extra, "sealed", &vm.path("sealed"))?;
    state.resize(5120, 0);
    let padded = site.path("padded");
    std::fs::write(&padded, &state)?;
    holds(&site, &with_extra, "tpm", &padded)?;
    with_extra.assert_read_in_full_because("tpm", "the VM does not have");
    ensure!(!with_extra.said.contains("written to by another process"));

    // One that is written to meanwhile may be of two moments, which is said.
    proxy.forget_commands();
    proxy.inject(Fault {
        at: At::Named("block-export-add", 1),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    });
    let running = site
        .backup_command(&order.clone().through(&proxy))
        .start()?;
    let held = proxy.wait_held(LIMIT)?;
    std::fs::write(&tpm, vec![8; 5000])?;
    held.go_on();
    let outcome = running.finish()?.assert_success();
    let warned = "tpm was written to by another process";
    ensure!(outcome.stderr.contains(warned), "{}", outcome.stderr);
    ensure!(outcome.document()?["moment"] == "one-for-each");

    proxy.references()?;

    // A name that is nowhere, and a file that is none.
    for (what, named) in [
        ("nowhere", "there is no disk nowhere"),
        ("/nowhere/tpm", "/nowhere/tpm"),
    ] {
        configure(&site, &format!("[vm.web.extra]\ntpm = '{what}'"))?;
        let outcome = site.backup_command(&order).arg("--quiet").run()?;
        outcome.assert_refused(2, named);
    }
    let left = QemuState::read(vm.monitors())?;
    left.assert_restored(&before, |_| true);
    Ok(())
}
