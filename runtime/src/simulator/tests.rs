//! The server before libnbd's own tools, which share no line with it or with our client.

use super::{Disk, Export, Server, Switch};
use crate::extent::Extent;
use crate::volume::open;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const CLUSTER: u64 = 65536;

/// Data, written zeroes, holes and a short tail; the second point in time of a disk that changed in two places.
fn export() -> Export {
    let mut disk = Disk::new("scsi0", 40 * CLUSTER + 777);
    let pattern: Vec<u8> = (0..20 * CLUSTER).map(|i| (i * 7 % 251) as u8).collect();
    disk.write(3 * CLUSTER + 5, &pattern);
    disk.write(30 * CLUSTER, &[0; 1000]);
    disk.freeze(&Switch {
        stop: None,
        start: Some("a".into()),
    });
    disk.write(40 * CLUSTER + 700, b"tail");
    disk.discard(10 * CLUSTER, 3 * CLUSTER);
    disk.freeze(&Switch {
        stop: Some("a".into()),
        start: Some("b".into()),
    })
}

fn tool(name: &str, arguments: &[&str], socket: &Path) -> Vec<u8> {
    let uri = format!("nbd+unix:///scsi0?socket={}", socket.display());
    let output = Command::new(name)
        .args(arguments)
        .arg(uri)
        .output()
        .expect("a program of Debian's libnbd-bin");
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// What `nbdinfo --map` calls `kind`, neighbours joined.
fn mapped(socket: &Path, context: &str, kind: u64) -> Vec<(u64, u64)> {
    let map = tool("nbdinfo", &["--json", &format!("--map={context}")], socket);
    let map: Value = serde_json::from_slice(&map).unwrap();
    let of_kind = map.as_array().unwrap().iter().filter(|e| e["type"] == kind);
    let set: crate::extent::ExtentSet = of_kind
        .map(|e| Extent::new(e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap()).unwrap())
        .collect();
    set.iter().map(Into::into).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn libnbd_reads_and_maps_what_the_disk_held() {
    let folder = TempDir::new().unwrap();
    let export = export();
    let server = Server::start(folder.path().join("nbd"), vec![export.clone()]).unwrap();
    let socket = server.socket().to_owned();
    let copied = tokio::task::spawn_blocking(move || {
        // What `file` makes of the content may be no JSON, and the program may be missing.
        let info = tool("nbdinfo", &["--json", "--no-content"], &socket);
        let info: Value = serde_json::from_slice(&info).unwrap();
        let described = &info["exports"][0];
        assert_eq!(described["export-size"], 40 * CLUSTER + 777);
        assert_eq!(described["can_trim"], true);
        assert_eq!(described["can_multi_conn"], true);
        let holes: Vec<_> = export.holes().iter().map(Into::into).collect();
        assert_eq!(mapped(&socket, "base:allocation", 3), holes);
        let dirty = mapped(&socket, export.dirty_context().unwrap(), 1);
        let expected = [(10 * CLUSTER, 3 * CLUSTER), (40 * CLUSTER, 777)];
        assert_eq!(dirty, expected);
        let uri = format!("nbd+unix:///scsi0?socket={}", socket.display());
        let copy = Command::new("nbdcopy").args([&uri, "-"]).output().unwrap();
        assert!(copy.status.success(), "{copy:?}");
        (copy.stdout, export)
    });
    let (copy, export) = copied.await.unwrap();
    assert!(copy == export.bytes()[..], "nbdcopy read other bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_job_opens_it_and_cannot_read_what_it_trimmed() {
    let folder = TempDir::new().unwrap();
    let export = export();
    let server = Server::start(folder.path().join("nbd"), vec![export.clone()]).unwrap();
    let source = export.source(server.socket());
    let frozen = open::open(&source, 65536, 1, None).await.unwrap();
    assert_eq!(frozen.plan.dirty(), &export.dirty());
    let hole = Extent::new(10 * CLUSTER, 3 * CLUSTER).unwrap();
    assert_eq!(frozen.plan.zero().iter().collect::<Vec<_>>(), [hole]);

    let clean = Extent::new(4 * CLUSTER, 2 * CLUSTER).unwrap();
    let read = frozen.reader.read(clean).await.unwrap();
    assert!(read[..] == export.bytes()[4 * CLUSTER as usize..6 * CLUSTER as usize]);
    frozen.reader.trim(clean).await.unwrap();
    frozen.reader.read(clean).await.unwrap_err();
    let neighbour = Extent::new(6 * CLUSTER, 9).unwrap();
    frozen.reader.read(neighbour).await.unwrap();
}
