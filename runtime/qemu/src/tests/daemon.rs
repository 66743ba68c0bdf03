//! A `qemu-storage-daemon` with two disks in a temporary folder: `raw0` and `qcow0`.

use crate::qemu::bitmap::{BitmapName, BitmapPlan};
use crate::qemu::ids::JobId;
use crate::qemu::machine::{self, Choice, Disk};
use crate::qemu::monitor::Monitor;
use crate::qemu::schema::Schema;
use crate::qemu::snapshot::{
    FleecingFormat, Form, NbdServer, Plan, PointInTime, PointRequest, Readers, SnapshotError, take,
};
use serde_json::{Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(crate) const SIZE: u64 = 16 << 20;
pub(crate) const BLOCK: u32 = 65536;

pub(crate) struct Daemon {
    process: Child,
    pub(crate) folder: TempDir,
}

impl Daemon {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        File::create(at("raw0.img")).unwrap().set_len(SIZE).unwrap();
        let size = SIZE.to_string();
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                path(&at("qcow0.qcow2")),
                &size,
            ],
        );
        let process = Self::process(folder.path());
        let daemon = Self { process, folder };
        daemon.wait().await;
        daemon
    }

    fn process(folder: &Path) -> Child {
        let at = |name: &str| folder.join(name).display().to_string();
        let mut command = Command::new("qemu-storage-daemon");
        for (driver, node, file) in [
            ("raw", "raw0", "raw0.img"),
            ("qcow2", "qcow0", "qcow0.qcow2"),
        ] {
            let file = at(file);
            command.args(["--blockdev", &format!("driver={driver},node-name={node},discard=unmap,file.driver=file,file.filename={file}")]);
        }
        let socket = at("qmp.sock");
        command
            .args([
                "--chardev",
                &format!("socket,id=m,path={socket},server=on,wait=off"),
            ])
            .args(["--monitor", "chardev=m"])
            .spawn()
            .expect("qemu-storage-daemon (Debian's qemu-utils) must be installed")
    }

    async fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(self.at("qmp.sock")).is_err() {
            assert!(Instant::now() < deadline, "the daemon does not listen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Lets it end as on a host's shutdown, and starts it again on the same disks.
    pub(crate) async fn restart(&mut self, monitor: Monitor) {
        monitor.execute_raw("quit", json!({})).await.unwrap();
        drop(monitor);
        self.process.wait().unwrap();
        self.process = Self::process(self.folder.path());
        self.wait().await;
    }

    /// Kills it, and starts it again on the same disks.
    pub(crate) async fn crash(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        std::fs::remove_file(self.at("qmp.sock")).unwrap();
        self.process = Self::process(self.folder.path());
        self.wait().await;
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) async fn monitor(&self) -> Monitor {
        // It serves one client at a time, and may still be busy with seeing the last one go.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match Monitor::connect(&self.at("qmp.sock")).await {
                Ok(monitor) => return monitor,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A stranger's NBD server on `guest.sock` with one writable export per disk, named after it: the
    /// guest's way to its disks. It must be there before a filter is put above them.
    pub(crate) async fn plug_guest(&self, monitor: &Monitor) {
        let socket = self.at("guest.sock");
        let addr = json!({ "type": "unix", "data": { "path": socket } });
        let start = json!({ "addr": addr });
        monitor
            .execute_raw("nbd-server-start", start)
            .await
            .unwrap();
        for disk in ["raw0", "qcow0"] {
            let export = json!({ "type": "nbd", "id": format!("guest-{disk}"), "node-name": disk, "name": disk, "writable": true });
            monitor
                .execute_raw("block-export-add", export)
                .await
                .unwrap();
        }
    }

    pub(crate) fn shared(&self) -> NbdServer {
        NbdServer::Shared(self.at("guest.sock"))
    }

    /// Writes as the guest.
    pub(crate) fn write(&self, disk: &str, pattern: u8, offset: u64, length: u64) {
        let written = self.qemu_io(disk, &format!("write -P {pattern} {offset} {length}"));
        assert!(written.status.success(), "{written:?}");
    }

    /// Whether the range of an export on the guest's server reads as `pattern` throughout.
    pub(crate) fn reads(&self, export: &str, pattern: u8, offset: u64, length: u64) -> bool {
        let read = self.qemu_io(export, &format!("read -P {pattern} {offset} {length}"));
        read.status.success()
    }

    fn qemu_io(&self, export: &str, command: &str) -> Output {
        let uri = uri(export, &self.at("guest.sock"));
        Command::new("qemu-io")
            .args(["-f", "raw", "-c", command, &uri])
            .output()
            .unwrap()
    }

    /// A fleecing image of the right size.
    pub(crate) fn fleecing(&self, name: &str) -> PathBuf {
        let path = self.at(name);
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        path
    }

    /// A request for both disks with one bitmap plan.
    pub(crate) async fn request(
        &self,
        monitor: &Monitor,
        server: NbdServer,
        bitmap: &BitmapPlan,
    ) -> PointRequest {
        let job = JobId::random().unwrap();
        let plans = both(monitor).await.into_iter().map(|disk| {
            let fleecing = self.fleecing(&format!("{job}-{}.fl", disk.name));
            Plan {
                descriptor: None,
                fleecing,
                disk,
                bitmap: bitmap.clone(),
            }
        });
        PointRequest {
            job,
            block_size: BLOCK,
            plans: plans.collect(),
            server,
            readers: Readers::Discard,
            form: Form::Job,
            format: FleecingFormat::Raw,
            freeze: crate::qemu::agent::Freeze::Required,
        }
    }

    pub(crate) async fn take(
        &self,
        monitor: &Monitor,
        request: PointRequest,
    ) -> Result<PointInTime, SnapshotError> {
        let schema = Schema::probe(monitor).await.unwrap();
        take(monitor, &schema, request, None).await
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// All that QEMU shows of its block layer, bitmaps apart: what must be the same after as before.
pub(crate) async fn state(monitor: &Monitor) -> Value {
    let mut nodes: Vec<Value> = monitor
        .query("query-named-block-nodes", json!({ "flat": true }))
        .await
        .unwrap();
    for node in &mut nodes {
        let node = node.as_object_mut().unwrap();
        node.remove("dirty-bitmaps");
        node.remove("image");
    }
    let mut all = vec![json!(nodes)];
    for query in [
        "query-jobs",
        "query-block-jobs",
        "query-block-exports",
        "query-block",
    ] {
        all.push(monitor.execute_raw(query, json!({})).await.unwrap());
    }
    json!(all)
}

pub(crate) async fn both(monitor: &Monitor) -> Vec<Disk> {
    let choice = Choice::Named(vec!["raw0".into(), "qcow0".into()]);
    machine::disks(monitor, &choice).await.unwrap().disks
}

pub(crate) fn uri(export: &str, socket: &Path) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

pub(crate) fn name(backup: &str) -> BitmapName {
    BitmapName::new("archive", "tenant", "vm/disk", backup, None).unwrap()
}

pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
}

pub(crate) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
