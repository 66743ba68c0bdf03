//! A job that aborts or panics, at any moment and in each form of the point in time: nothing of it stays in QEMU, though
//! nobody runs anything after it. What comes from outside is what a fault of its own would be: signals, memory that
//! ends, threads that do not start.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Disk, Emulator, MIB, Monitors, Order, Outcome, QemuState, Random, Running, Site, StorageDaemon,
    eventually,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::json;

const SIZE: u64 = 8 * MIB;
const LIMIT: Duration = Duration::from_secs(60);

/// Those that a fault of the program itself would send, and that Rust has no handler for: it lets the first of some others
/// pass, and near its end the job may be gone before a second.
const FAULTS: [Signal; 3] = [Signal::ABORT, Signal::ILL, Signal::FPE];

/// Each with what a job has in QEMU then.
const STEPS: [&str; 6] = [
    "preparing",
    "snapshot",
    "running",
    "releasing",
    "proving",
    "switching-bitmaps",
];

/// How long a job without memory may take to end.
const SHORT_OF_MEMORY: Duration = Duration::from_secs(60);

/// More than a job of one small disk ever starts, beside the runtime's.
const MOST_THREADS: u32 = 40;

/// Bytes that a job may still get: none, and what small things need.
const ROOMS: [u64; 2] = [0, MIB];

enum Qemu {
    Daemon(StorageDaemon),
    Machine(Emulator),
}

/// A QEMU with one disk `da`, and the process before it that stands for Proxmox's, in the form that needs it.
struct Scene {
    site: Site,
    order: Order,
    before: QemuState,
    qemu: Qemu,
    proxmox: Option<Child>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(proxmox) = &mut self.proxmox {
            let _ = proxmox.kill();
            let _ = proxmox.wait();
        }
    }
}

impl Scene {
    fn new(form: &'static str) -> Result<Self> {
        let site = Site::new()?;
        site.configure(&format!("[vm.web]\npoint-in-time = '{form}'\n"))?;
        let (qemu, order, proxmox) = match form {
            "filter" => {
                let machine = Emulator::running(|folder| {
                    let file = folder.join("da.raw");
                    Random::new(3).fill_file(&file, SIZE / MIB)?;
                    let node = json!({"driver": "raw", "node-name": "da", "file": {"driver": "file", "filename": file}});
                    let node = node.to_string();
                    let words = [
                        "-blockdev",
                        &node,
                        "-device",
                        "virtio-blk-pci,id=da,drive=da",
                    ];
                    Ok(words.map(Into::into).to_vec())
                })?;
                let order = site.order_for(&machine.monitors().product, "chunked")?;
                (Qemu::Machine(machine), order, None)
            }
            _ => {
                let content = site.path("content");
                Random::new(3).fill_file(&content, SIZE / MIB)?;
                let disk = Disk::raw("da", SIZE).holding(&content);
                let daemon = StorageDaemon::start(&[disk])?;
                let order = site.order(&daemon, "chunked")?;
                match form {
                    "backup-access" => {
                        let (proxmox, order) = proxmox(&site, daemon.monitors(), order)?;
                        (Qemu::Daemon(daemon), order, Some(proxmox))
                    }
                    _ => (Qemu::Daemon(daemon), order, None),
                }
            }
        };
        // All is read each time, so that there is something to do.
        let order = Order {
            full: true,
            ..order
        };
        let monitors = match &qemu {
            Qemu::Daemon(daemon) => daemon.monitors(),
            Qemu::Machine(machine) => machine.monitors(),
        };
        Ok(Self {
            site,
            order,
            before: QemuState::read(monitors)?,
            qemu,
            proxmox,
        })
    }

    fn start(&self) -> Result<Running> {
        self.site.backup_command(&self.order).start()
    }

    /// A backup that stops itself at `step`.
    fn stopped_at(&self, step: &str) -> Result<Running> {
        let backup = self.site.backup_command(&self.order);
        // With backtraces, for which a process that has no memory left would need some.
        let backup = backup.env("RUST_BACKTRACE", "1");
        let running = backup.env("FLEECEBOX_STOP_AT", step).start()?;
        let stat = format!("/proc/{}/stat", running.process().pid);
        eventually("the job to stop itself", LIMIT, || {
            let now = fs::read_to_string(&stat)?;
            ensure!(!now.contains(") Z "), "the job ended");
            Ok(now.contains(") T ").then_some(()))
        })?;
        Ok(running)
    }

    /// The job and its watchdog are gone, and nothing is in QEMU but bitmaps; the next backup is made.
    fn is_clean(&self, outcome: &Outcome) -> Result<()> {
        let monitors = match &self.qemu {
            Qemu::Daemon(daemon) => daemon.monitors(),
            Qemu::Machine(machine) => machine.monitors(),
        };
        let left = QemuState::read(monitors)?.differences(&self.before, |_| true);
        ensure!(left.is_empty(), "left: {left:?}\n{}", outcome.stderr);
        let next = self.site.backup_command(&self.order).run()?;
        ensure!(next.code() == Some(0), "the next: {}", next.stderr);
        self.site.check_no_fleecing_images()
    }
}

/// The process that stands for Proxmox's QEMU, and the order by way of it.
fn proxmox(site: &Site, monitors: &Monitors, order: Order) -> Result<(Child, Order)> {
    fs::create_dir(site.path("copies"))?;
    let child = Command::new(env!("CARGO_BIN_EXE_fleecebox-proxmox-qemu"))
        .arg("--listen")
        .arg(site.path("pve.qmp"))
        .arg("--qemu")
        .arg(&monitors.product)
        .arg("--own")
        .arg(&monitors.control)
        .arg("--copies")
        .arg(site.path("copies"))
        .arg("--log")
        .arg(site.path("pve.log"))
        .stdin(Stdio::null())
        .spawn()?;
    let qmp = site.path("pve.qmp");
    eventually("the process to listen", LIMIT, || {
        Ok(qmp.exists().then_some(()))
    })?;
    Ok((child, Order { qmp, ..order }))
}

fn pid(running: &Running) -> Result<Pid> {
    Pid::from_raw(running.process().pid).context("no process")
}

/// Sends `signal`, to a job that may be stopped, and waits until it has ended.
fn strike(running: &mut Running, signal: Signal) -> Result<Option<i32>> {
    let pid = pid(running)?;
    let no_core = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    // It may have ended by itself.
    let _ = prlimit(Some(pid), Resource::Core, no_core);
    let _ = kill_process(pid, signal);
    let _ = kill_process(pid, Signal::CONT);
    running.wait_for_the_job()
}

fn aborts(form: &'static str) -> Result<()> {
    let scene = Scene::new(form)?;
    for (number, step) in STEPS.into_iter().enumerate() {
        let signal = FAULTS[number % FAULTS.len()];
        let mut running = scene.stopped_at(step)?;
        let code = strike(&mut running, signal)?;
        ensure!(
            code.is_none(),
            "{signal:?} at {step} did not end it: {code:?}"
        );
        let outcome = running.finish()?;
        scene
            .is_clean(&outcome)
            .with_context(|| format!("{signal:?} at {step}"))?;
    }
    // Anywhere between two steps.
    for number in 0..12u64 {
        let signal = FAULTS[number as usize % FAULTS.len()];
        let mut running = scene.start()?;
        std::thread::sleep(Duration::from_millis(15 * number));
        strike(&mut running, signal)?;
        let outcome = running.finish()?;
        scene
            .is_clean(&outcome)
            .with_context(|| format!("{signal:?} after {} ms", 15 * number))?;
    }
    Ok(())
}

#[test]
fn a_job_that_aborts_leaves_nothing_in_qemu_in_the_form_job() -> Result<()> {
    aborts("job")
}

#[test]
fn a_job_that_aborts_leaves_nothing_in_qemu_in_the_form_filter() -> Result<()> {
    aborts("filter")
}

#[test]
fn a_job_that_aborts_leaves_nothing_in_qemu_in_the_form_backup_access() -> Result<()> {
    aborts("backup-access")
}

/// Bytes of a process's own memory (`proc_pid_status(5)`), which `RLIMIT_DATA` counts.
fn data_of(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmData:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib.context("no VmData")?.trim().parse::<u64>()? * 1024)
}

/// A job whose memory ends: some allocation aborts it, or it ends with an error.
#[test]
fn a_job_whose_memory_ends_leaves_nothing_in_qemu() -> Result<()> {
    let mut aborted = 0;
    for form in ["job", "filter", "backup-access"] {
        let scene = Scene::new(form)?;
        for step in STEPS {
            for room in ROOMS {
                eprintln!("{form}, {step}, {room} bytes");
                let mut running = scene.stopped_at(step)?;
                let job = pid(&running)?;
                let most = Some(data_of(job)? + room);
                let limit = Rlimit {
                    current: most,
                    maximum: most,
                };
                prlimit(Some(job), Resource::Data, limit)?;
                kill_process(job, Signal::CONT)?;
                let stat = format!("/proc/{}/stat", running.process().pid);
                eventually("the job to end", SHORT_OF_MEMORY, || {
                    Ok(fs::read_to_string(&stat)?.contains(") Z ").then_some(()))
                })?;
                aborted += u32::from(running.wait_for_the_job()?.is_none());
                let outcome = running.finish_broken()?;
                scene
                    .is_clean(&outcome)
                    .with_context(|| format!("{form}, {step}, {room} bytes"))?;
            }
        }
    }
    ensure!(aborted > 0, "no job aborted");
    Ok(())
}

/// Lies under the job: of its threads only `FBX_THREADS` start. The next one fails for another reason than that there are
/// too many, and who counts on it panics. The job is the child of the process `FBX_PARENT`.
const THREADS: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>
static int started;
int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *x) {
    const char *most = getenv("FBX_THREADS"), *parent = getenv("FBX_PARENT");
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
    if (most && parent && getppid() == atoi(parent) && __sync_fetch_and_add(&started, 1) >= atoi(most)) return EPERM;
    return real(t, a, f, x);
}
"#;

#[test]
fn a_job_that_panics_leaves_nothing_in_qemu() -> Result<()> {
    for form in ["job", "filter", "backup-access"] {
        let scene = Scene::new(form)?;
        let (source, library) = (scene.site.path("threads.c"), scene.site.path("threads.so"));
        fs::write(&source, THREADS)?;
        let mut compile = Command::new("cc");
        compile
            .args(["-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(&source);
        ensure!(compile.arg("-ldl").status()?.success(), "cc");
        let mut panicked = 0;
        // Those of the runtime itself are there before anything is.
        let workers = std::thread::available_parallelism()?.get() as u32;
        for threads in workers..workers + MOST_THREADS {
            let backup = scene.site.backup_command(&scene.order);
            let running = backup
                .env("LD_PRELOAD", &library)
                .env("FBX_THREADS", threads.to_string())
                .env("FBX_PARENT", std::process::id().to_string())
                .start()?;
            let outcome = running.finish_broken()?;
            let panics = outcome.stderr.contains("panicked at");
            panicked += u32::from(panics);
            eprintln!(
                "{form}, {threads} threads: {:?}, panicked: {panics}",
                outcome.code()
            );
            scene
                .is_clean(&outcome)
                .with_context(|| format!("{form}, {threads} threads"))?;
            if outcome.code() == Some(0) {
                break;
            }
        }
        ensure!(panicked > 0, "no job panicked");
    }
    Ok(())
}
