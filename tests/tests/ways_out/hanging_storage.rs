//! The storage of one disk hangs: an NBD server that is stopped, under a storage daemon and under a machine, the disk in
//! the backup or not. Whatever a job does then, the monitor answers and the other disk goes on. It is an order and no
//! time: the storage hangs until the monitor and the other disk have answered.

use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, Emulator, FarStorage, Fleecebox, MIB, Monitors, NbdClient, Order, QemuState, Qmp,
    Running, Site, StorageDaemon, eventually,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const SIZE: u64 = 8 * MIB;
const BLOCK: usize = 64 << 10;
const LIMIT: Duration = Duration::from_secs(60);

/// QEMU, whichever it is.
enum Qemu {
    Daemon(StorageDaemon),
    Machine(Emulator),
}

/// `far` on the server, `near` on a file of this machine, and exports of both for whoever uses the disks.
struct Scene {
    qemu: Qemu,
    users: PathBuf,
    site: Site,
    order: Order,
    before: QemuState,
    server: FarStorage,
}

impl Scene {
    fn daemon() -> Result<Self> {
        let server = FarStorage::start(SIZE / MIB)?;
        let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("near", SIZE)])?;
        let mut qmp = daemon.control()?;
        qmp.execute("blockdev-add", server.node("far"))?;
        qmp.execute("block-export-add", json!({"type": "nbd", "id": "writer-far", "node-name": "far", "name": "far", "writable": true}))?;
        drop(qmp);
        let site = Site::new()?;
        let order = site.order(&daemon, "chunked")?;
        let order = Order {
            disks: vec!["near".into(), "far".into()],
            ..order
        };
        Ok(Self {
            users: daemon.nbd_socket(),
            before: QemuState::read(daemon.monitors())?,
            qemu: Qemu::Daemon(daemon),
            site,
            order,
            server,
        })
    }

    fn machine(form: &str) -> Result<Self> {
        let server = FarStorage::start(SIZE / MIB)?;
        let machine = Emulator::running(|folder| {
            let near = folder.join("near.raw");
            std::fs::File::create(&near)?.set_len(SIZE)?;
            let near = json!({"driver": "raw", "node-name": "near", "file": {"driver": "file", "filename": near}});
            let words = [
                "-blockdev",
                &near.to_string(),
                "-device",
                "virtio-blk-pci,id=dnear,drive=near",
                "-blockdev",
                &server.node("far").to_string(),
                "-device",
                "virtio-blk-pci,id=dfar,drive=far",
            ];
            Ok(words.map(Into::into).to_vec())
        })?;
        let users = server.path("users.sock");
        let mut qmp = machine.control()?;
        let address = json!({"type": "unix", "data": {"path": users}});
        qmp.execute("nbd-server-start", json!({"addr": address}))?;
        drop(qmp);
        let site = Site::new()?;
        site.configure(&format!("[vm.web]\npoint-in-time = '{form}'\n"))?;
        let order = Order {
            nbd: Some(users.clone()),
            ..site.order_for(&machine.monitors().product, "chunked")?
        };
        Ok(Self {
            users,
            before: QemuState::read(machine.monitors())?,
            qemu: Qemu::Machine(machine),
            site,
            order,
            server,
        })
    }

    /// The disk whose storage hangs is none of the backup's.
    fn without_far(self) -> Self {
        let disks = vec!["near".into()];
        let order = Order {
            disks,
            ..self.order
        };
        Self { order, ..self }
    }

    fn monitors(&self) -> &Monitors {
        match &self.qemu {
            Qemu::Daemon(daemon) => daemon.monitors(),
            Qemu::Machine(machine) => machine.monitors(),
        }
    }

    fn control(&self) -> Result<Qmp> {
        Ok(Qmp::connect(&self.monitors().control)?)
    }

    /// The monitor answers, and the disk whose storage does not hang.
    fn lives(&self) -> Result<()> {
        let mut qmp = self.control()?;
        qmp.execute("query-block-exports", json!({}))?;
        match &self.qemu {
            Qemu::Daemon(_) => {
                NbdClient::connect(&self.users, "near")?.read(0, &mut [0; BLOCK])?;
            }
            Qemu::Machine(_) => device_reads(&mut qmp, "dnear", "read")?,
        }
        qmp.execute("query-named-block-nodes", json!({}))?;
        Ok(())
    }

    /// Stops the storage with a request of a user's in it.
    fn hang(&self) -> Result<Waiting<'_>> {
        self.server.hang()?;
        let waiting = match &self.qemu {
            Qemu::Daemon(_) => {
                let mut user = NbdClient::connect(&self.users, "far")?;
                let reads = move || Ok(user.read(MIB, &mut [0; BLOCK])?);
                Waiting::Client(std::thread::spawn(reads))
            }
            Qemu::Machine(machine) => {
                let mut qmp = machine.control()?;
                let done = reads_of(&mut qmp, "dfar")?;
                device_reads(&mut qmp, "dfar", "aio_read")?;
                Waiting::Device { machine, done }
            }
        };
        // Time to send it; QEMU has taken it when it answers what comes later.
        std::thread::sleep(Duration::from_millis(200));
        self.lives()?;
        ensure!(!waiting.is_over()?, "the storage does not hang");
        Ok(waiting)
    }

    /// Starts a backup that stops itself at `step`.
    fn stopped_at(&self, step: &str) -> Result<Running> {
        let backup = self.site.backup_command(&self.order);
        let running = backup.env("FLEECEBOX_STOP_AT", step).start()?;
        wait_for_state(&running, 'T')?;
        Ok(running)
    }

    fn recover(&self) -> Fleecebox {
        let archive = self.site.archive();
        let mut recover = self.site.command(&["recover", "web", "--json"]);
        for (option, value) in [
            ("--qmp", &self.order.qmp),
            ("--archive", &archive),
            ("--fleecing", &self.site.path("fleecing")),
            ("--nbd", &self.users),
        ] {
            recover = recover.arg(option).arg(value);
        }
        recover
    }

    /// Nothing is left, and the next backup is made.
    fn goes_on(&self) -> Result<()> {
        self.recover().run()?.assert_success();
        self.site.check_no_fleecing_images()?;
        QemuState::read(self.monitors())?.assert_restored(&self.before, |_| true);
        let backup = self.site.backup(&self.order)?;
        self.site.verify(&self.site.archive(), &backup.id)
    }
}

/// A request to the storage that hangs.
enum Waiting<'a> {
    /// Of whoever uses an export.
    Client(JoinHandle<Result<()>>),
    /// Of a device, which had `done` so many before.
    Device { machine: &'a Emulator, done: u64 },
}

impl Waiting<'_> {
    fn is_over(&self) -> Result<bool> {
        match self {
            Self::Client(user) => Ok(user.is_finished()),
            Self::Device { machine, done } => {
                Ok(reads_of(&mut machine.control()?, "dfar")? > *done)
            }
        }
    }

    /// Waits until it was answered.
    fn end(self) -> Result<()> {
        match self {
            Self::Client(user) => user.join().ok().context("the user broke")?,
            Self::Device { .. } => eventually("the device's read", LIMIT, || {
                Ok(self.is_over()?.then_some(()))
            }),
        }
    }
}

/// Lets a device read as its guest would, by `read`, which waits, or `aio_read`.
fn device_reads(qmp: &mut Qmp, device: &str, how: &str) -> Result<()> {
    let path = format!("/machine/peripheral/{device}/virtio-backend");
    let line = format!("qemu-io -d {path} \"{how} {MIB} {BLOCK}\"");
    let said = qmp.execute("human-monitor-command", json!({"command-line": line}))?;
    ensure!(said == "", "{line}: {said}");
    Ok(())
}

/// Reads that a device has done.
fn reads_of(qmp: &mut Qmp, device: &str) -> Result<u64> {
    let all = qmp.execute("query-blockstats", json!({}))?;
    let mut all = all.as_array().context("no list")?.iter();
    let is_meant = |entry: &&serde_json::Value| {
        let qdev = entry["qdev"].as_str().unwrap_or_default();
        qdev.split('/').any(|part| part == device)
    };
    let meant = all.find(is_meant).context("no such device")?;
    meant["stats"]["rd_operations"].as_u64().context("no count")
}

fn wait_for_state(running: &Running, state: char) -> Result<()> {
    let stat = format!("/proc/{}/stat", running.process().pid);
    let wanted = format!(") {state} ");
    eventually("the job to stop itself", LIMIT, || {
        let now = std::fs::read_to_string(&stat)?;
        ensure!(!now.contains(") Z "), "the job ended");
        Ok(now.contains(&wanted).then_some(()))
    })
}

fn send(running: &Running, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(running.process().pid).context("no process")?;
    Ok(kill_process(pid, signal)?)
}

fn waits(running: &Running) -> Result<()> {
    running.wait_for_line(LIMIT, |line| line.contains("waiting for the storage"))?;
    Ok(())
}

/// Asked to end while the storage hangs: it says what it waits for; asked again, it ends at once and says what stays; and
/// that goes when the storage answers.
fn gives_up(scene: &Scene, step: &str) -> Result<()> {
    let mut running = scene.stopped_at(step)?;
    let user = scene.hang()?;
    send(&running, Signal::INT)?;
    send(&running, Signal::CONT)?;
    waits(&running)?;
    scene.lives()?;
    send(&running, Signal::INT)?;
    // Cancelled, or committed with something left; where there is nothing to prove, whichever is first.
    let codes: &[i32] = match step {
        "switching-bitmaps" => &[3],
        "proving" => &[3, 130],
        _ => &[130],
    };
    let ended = running.wait_for_the_job()?;
    ensure!(
        ended.is_some_and(|code| codes.contains(&code)),
        "{ended:?}: {}",
        running.said()
    );
    scene.lives()?;
    running.wait_for_line(LIMIT, |line| line.contains("stays, because the storage of"))?;
    let said = running.said();
    ensure!(!said.contains("as they were before"), "{said}");
    // The next one is told as well, and harms nobody either.
    let next = scene.site.backup_command(&scene.order).start()?;
    waits(&next)?;
    scene.lives()?;
    send(&next, Signal::INT)?;
    send(&next, Signal::INT)?;
    let next = next.finish()?;
    ensure!(next.code() == Some(11), "{next:?}");
    scene.lives()?;
    ensure!(!user.is_over()?, "the storage did not hang all the time");

    scene.server.go_on()?;
    let ended = running.finish()?;
    ensure!(
        ended.stderr.contains("its watchdog ended the snapshot"),
        "{}",
        ended.stderr
    );
    user.end()?;
    scene.goes_on()
}

#[test]
fn giving_up_stops_no_storage_daemon() -> Result<()> {
    let scene = Scene::daemon()?;
    for step in ["running", "releasing", "proving", "switching-bitmaps"] {
        gives_up(&scene, step).with_context(|| format!("stopped at {step}"))?;
    }
    Ok(())
}

#[test]
fn giving_up_stops_no_machine() -> Result<()> {
    gives_up(&Scene::machine("job")?, "running")
}

#[test]
fn giving_up_stops_no_machine_that_has_filters() -> Result<()> {
    let scene = Scene::machine("filter")?;
    for step in ["running", "releasing", "switching-bitmaps"] {
        gives_up(&scene, step).with_context(|| format!("stopped at {step}"))?;
    }
    Ok(())
}

#[test]
fn giving_up_stops_nothing_while_a_disk_hangs_that_is_not_in_the_backup() -> Result<()> {
    let scene = Scene::daemon()?.without_far();
    for step in ["running", "switching-bitmaps"] {
        gives_up(&scene, step).with_context(|| format!("daemon, stopped at {step}"))?;
    }
    for (form, step) in [("job", "running"), ("filter", "switching-bitmaps")] {
        let scene = Scene::machine(form)?.without_far();
        gives_up(&scene, step).with_context(|| format!("{form}, stopped at {step}"))?;
    }
    Ok(())
}

#[test]
fn a_committed_backup_waits_for_storage_that_hangs_before_it_switches_bitmaps() -> Result<()> {
    let scene = Scene::daemon()?;
    let running = scene.stopped_at("switching-bitmaps")?;
    let user = scene.hang()?;
    send(&running, Signal::CONT)?;
    waits(&running)?;
    scene.lives()?;
    ensure!(!user.is_over()?, "the storage did not hang all the time");
    scene.server.go_on()?;
    let backup = Backup::told_by(&running.finish()?.assert_success())?;
    user.end()?;
    QemuState::read(scene.monitors())?.assert_restored(&scene.before, |_| true);
    scene.site.check_no_fleecing_images()?;
    let next = scene.site.backup(&scene.order)?;
    next.assert_base("far", Some(&backup));
    Ok(())
}

#[test]
fn the_watchdog_of_a_killed_job_ends_its_snapshot_once_the_storage_answers() -> Result<()> {
    let scene = Scene::daemon()?;
    for hangs in [false, true] {
        let mut running = scene.stopped_at("running")?;
        let user = if hangs { Some(scene.hang()?) } else { None };
        send(&running, Signal::KILL)?;
        assert_eq!(running.wait_for_the_job()?, None);
        if let Some(user) = user {
            running.wait_for_line(LIMIT, |line| line.contains("as soon as the storage"))?;
            scene.lives()?;
            ensure!(!user.is_over()?, "the storage did not hang all the time");
            scene.server.go_on()?;
            user.end()?;
        }
        let ended = running.finish()?;
        ensure!(ended.signal() == Some(9), "{ended:?}");
        let state = QemuState::read(scene.monitors())?;
        state.assert_restored(&scene.before, |_| true);
        scene.goes_on()?;
    }
    Ok(())
}

#[test]
fn a_cancelled_backup_waits_for_no_bandwidth() -> Result<()> {
    let scene = Scene::daemon()?;
    let backup = scene.site.backup_command(&scene.order).arg("--bandwidth");
    let running = backup.arg("64KiB").start()?;
    eventually("the job to read", LIMIT, || {
        let exports = scene.control()?.execute("query-block-exports", json!({}))?;
        let exports = exports.as_array().context("no list")?;
        // The users', and each disk's own, its snapshot's and its mark's.
        Ok((exports.len() >= 6).then_some(()))
    })?;
    send(&running, Signal::INT)?;
    let outcome = running.finish()?;
    ensure!(
        outcome.stderr.contains("as they were before") && !outcome.stderr.contains("in time"),
        "{}",
        outcome.stderr
    );
    scene.goes_on()
}

#[test]
fn no_number_of_seconds_and_no_file_of_the_archive_breaks_a_job() -> Result<()> {
    let mut scene = Scene::daemon()?;
    let component = std::mem::replace(&mut scene.order.provider, "patient".into());
    scene.site.configure(&format!(
        "[vm.web]\nsnapshot-max-seconds = {0}\n[provider.patient]\ncomponent = '{component}'\nnamespace = 'n'\n\
         [provider.patient.limits]\nwall-seconds = {0}\ncpu-seconds = {0}\n",
        i64::MAX
    ))?;
    scene.site.backup(&scene.order)?;
    let cache = scene.site.archive().join("namespaces/n/packs/index-cache");
    let plant: [&dyn Fn() -> Result<()>; 3] = [
        &|| {
            let fifo = Command::new("mkfifo").arg(&cache).status()?;
            ensure!(fifo.success());
            Ok(())
        },
        &|| Ok(std::fs::File::create(&cache)?.set_len(1 << 40)?),
        &|| Ok(std::os::unix::fs::symlink("/dev/zero", &cache)?),
    ];
    for plant in plant {
        let _ = std::fs::remove_file(&cache);
        plant()?;
        let backup = scene.site.backup(&scene.order)?;
        scene.site.verify(&scene.site.archive(), &backup.id)?;
    }
    QemuState::read(scene.monitors())?.assert_restored(&scene.before, |_| true);
    Ok(())
}
