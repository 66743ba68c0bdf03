//! The storage of one disk hangs: an NBD server that is stopped, under a storage daemon and under a machine. Whatever a
//! job does then, the monitor answers and the other disk goes on. It is an order and no time: the storage hangs until
//! the monitor and the other disk have answered.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, Emulator, Fleecebox, MIB, Monitors, NbdClient, Order, QemuState, Qmp, Random,
    Running, Site, StorageDaemon, eventually,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

const SIZE: u64 = 8 * MIB;
const BLOCK: usize = 64 << 10;
const LIMIT: Duration = Duration::from_secs(60);

/// Serves an image to QEMU, or does not.
struct Server {
    child: Child,
    socket: PathBuf,
    folder: TempDir,
}

impl Server {
    fn start() -> Result<Self> {
        let folder = TempDir::with_prefix("fleecebox-far-")?;
        let (image, socket) = (
            folder.path().join("far.raw"),
            folder.path().join("far.sock"),
        );
        Random::new(1).fill_file(&image, SIZE / MIB)?;
        let child = Command::new("qemu-nbd")
            .args(["-f", "raw", "-x", "far", "-t", "-e", "8", "-k"])
            .arg(&socket)
            .arg(&image)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run qemu-nbd (Debian's package qemu-utils)")?;
        eventually("the NBD server", LIMIT, || {
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self {
            child,
            socket,
            folder,
        })
    }

    fn send(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed()).context("no process")?;
        Ok(kill_process(pid, signal)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

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
    server: Server,
}

impl Scene {
    fn daemon() -> Result<Self> {
        let server = Server::start()?;
        let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("near", SIZE)])?;
        let mut qmp = daemon.control()?;
        qmp.execute("blockdev-add", far(&server))?;
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
        let server = Server::start()?;
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
                &far(&server).to_string(),
                "-device",
                "virtio-blk-pci,id=dfar,drive=far",
            ];
            Ok(words.map(Into::into).to_vec())
        })?;
        let users = server.folder.path().join("users.sock");
        let mut qmp = machine.control()?;
        let address = json!({"type": "unix", "data": {"path": users}});
        qmp.execute("nbd-server-start", json!({"addr": address}))?;
        for node in ["near", "far"] {
            qmp.execute("block-export-add", json!({"type": "nbd", "id": format!("writer-{node}"), "node-name": node, "name": node, "writable": false}))?;
        }
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
        NbdClient::connect(&self.users, "near")?.read(0, &mut [0; BLOCK])?;
        qmp.execute("query-named-block-nodes", json!({}))?;
        Ok(())
    }

    /// Stops the storage with a request of a user's in it.
    fn hang(&self) -> Result<JoinHandle<Result<()>>> {
        self.server.send(Signal::STOP)?;
        let mut user = NbdClient::connect(&self.users, "far")?;
        let waits = std::thread::spawn(move || Ok(user.read(MIB, &mut [0; BLOCK])?));
        // Time to send it; QEMU has taken it when it answers what comes later.
        std::thread::sleep(Duration::from_millis(200));
        self.lives()?;
        ensure!(!waits.is_finished(), "the storage does not hang");
        Ok(waits)
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

fn far(server: &Server) -> serde_json::Value {
    json!({"driver": "nbd", "node-name": "far", "export": "far",
        "server": {"type": "unix", "path": server.socket}})
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
    let said = running.said();
    ensure!(
        said.contains("stays, because the storage of") && !said.contains("as they were before"),
        "{said}"
    );
    // The next one is told as well, and harms nobody either.
    let next = scene.site.backup_command(&scene.order).start()?;
    waits(&next)?;
    scene.lives()?;
    send(&next, Signal::INT)?;
    send(&next, Signal::INT)?;
    let next = next.finish()?;
    ensure!(next.code() == Some(11), "{next:?}");
    scene.lives()?;
    ensure!(!user.is_finished(), "the storage did not hang all the time");

    scene.server.send(Signal::CONT)?;
    let ended = running.finish()?;
    ensure!(
        ended.stderr.contains("its watchdog ended the snapshot"),
        "{}",
        ended.stderr
    );
    user.join().ok().context("the user broke")??;
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
    // A filter takes no disk that somebody else reads by an export, as this test's user does.
    gives_up(&Scene::machine("job")?, "running")
}

#[test]
fn a_committed_backup_waits_for_storage_that_hangs_before_it_switches_bitmaps() -> Result<()> {
    let scene = Scene::daemon()?;
    let running = scene.stopped_at("switching-bitmaps")?;
    let user = scene.hang()?;
    send(&running, Signal::CONT)?;
    waits(&running)?;
    scene.lives()?;
    ensure!(!user.is_finished(), "the storage did not hang all the time");
    scene.server.send(Signal::CONT)?;
    let backup = Backup::told_by(&running.finish()?.assert_success())?;
    user.join().ok().context("the user broke")??;
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
            ensure!(!user.is_finished(), "the storage did not hang all the time");
            scene.server.send(Signal::CONT)?;
            user.join().ok().context("the user broke")??;
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
