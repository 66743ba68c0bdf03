//! QEMU's own servers, with `nbdinfo` as the second opinion.

use super::extent;
use crate::{Connection, Error, ErrorCode, StatusRun};
use std::{
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::net::UnixStream;

const MIB: u64 = 1 << 20;

/// A running NBD server that ends with the test.
struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    /// Serves `image` as the export `disk`.
    fn start(dir: &Path, image: &Path, arguments: &[&str]) -> Self {
        let socket = dir.join("nbd.sock");
        let mut command = Command::new("qemu-nbd");
        command
            .args([
                "--persistent",
                "--shared=0",
                "--export-name=disk",
                "--socket",
            ])
            .arg(&socket)
            .args(arguments)
            .arg(image);
        Self::listening(command, socket)
    }

    /// Serves a frozen view of `disk.raw` in `dir`, kept by `fleecing.raw`, as the export `disk`.
    fn start_snapshot(dir: &Path) -> Self {
        let socket = dir.join("nbd.sock");
        let file = |name: &str| {
            let path = dir.join(format!("{name}.raw"));
            format!(
                "driver=raw,node-name={name},discard=unmap,file.driver=file,file.discard=unmap,file.filename={}",
                path.display()
            )
        };
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &file("disk"), "--blockdev", &file("fleecing")]);
        command.args([
            "--blockdev",
            "driver=copy-before-write,node-name=filter,file=disk,target=fleecing",
        ]);
        command.args([
            "--blockdev",
            "driver=snapshot-access,node-name=frozen,file=filter,discard=unmap",
        ]);
        command.args([
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", socket.display()),
        ]);
        command.args([
            "--export",
            "type=nbd,id=frozen,node-name=frozen,name=disk,writable=on",
        ]);
        Self::listening(command, socket)
    }

    fn listening(mut command: Command, socket: PathBuf) -> Self {
        let process = command
            .stdin(Stdio::null())
            .spawn()
            .expect("a program of Debian's qemu-utils");
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "the server does not listen"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { process, socket }
    }

    async fn connect(&self, meta_context: Option<&str>) -> Result<Connection, Error> {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        Connection::connect(stream, "disk", meta_context).await
    }

    /// What `nbdinfo --map` says of the whole export, neighbours merged.
    fn map(&self, context: &str) -> Vec<(u64, u64, u64)> {
        let output = Command::new("nbdinfo")
            .args([&format!("--map={context}"), "--json"])
            .arg(format!("nbd+unix:///disk?socket={}", self.socket.display()))
            .output()
            .expect("nbdinfo, of Debian's libnbd-bin");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for run in map.as_array().unwrap() {
            let field = |name: &str| run[name].as_u64().unwrap();
            match runs.last_mut() {
                Some(last) if last.2 == field("type") => last.1 += field("length"),
                _ => runs.push((field("offset"), field("length"), field("type"))),
            }
        }
        runs
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn plain(runs: Vec<StatusRun>) -> Vec<(u64, u64, u64)> {
    runs.into_iter()
        .map(|run| (run.extent.start(), run.extent.len(), run.flags))
        .collect()
}

/// Bytes that differ at every offset of the image, and between images.
fn pattern(seed: u64, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    for word in offset / 8..(offset + length as u64).div_ceil(8) {
        bytes.extend(
            (word ^ seed)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes(),
        );
    }
    bytes.truncate(length);
    bytes
}

/// A sparse raw image of 40 MiB and a bit; what it holds.
fn sparse_image(path: &Path) -> Vec<u8> {
    let size = 40 * MIB + 512;
    let mut file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut content = vec![0; size as usize];
    for (offset, length) in [
        (0, MIB),
        (3 * MIB, 65536),
        (8 * MIB + 4096, 5 * MIB),
        (40 * MIB, 512),
    ] {
        let bytes = pattern(1, offset, length as usize);
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(&bytes).unwrap();
        content[offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
    }
    content
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn what_is_read_from_qemu_is_what_the_image_holds() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.raw");
    let content = Arc::new(sparse_image(&image));
    let server = Server::start(dir.path(), &image, &["--format=raw", "--read-only"]);
    let connection = server.connect(None).await.unwrap();
    let info = *connection.info();
    assert_eq!(info.size, content.len() as u64);
    assert!(info.read_only && !info.can_trim && info.can_multi_conn);
    assert_eq!(info.max_block, 32 << 20);
    assert!(matches!(
        connection.trim(extent(0, 512)).await,
        Err(Error::CannotTrim)
    ));

    let mut readers = tokio::task::JoinSet::new();
    for reader in 0..4u64 {
        let (connection, content) = (connection.clone(), content.clone());
        readers.spawn(async move {
            let mut buffer = Vec::new();
            let whole = extent(0, content.len() as u64);
            for piece in whole.pieces(300_000 + 77_824 * reader) {
                buffer = connection.read(piece, buffer).await.unwrap();
                assert!(buffer == content[..piece.end() as usize], "{piece}");
            }
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader.unwrap();
    }
    let all = connection
        .read(extent(0, 32 * MIB), Vec::new())
        .await
        .unwrap();
    assert!(all == content[..32 << 20]);
    connection.disconnect().await;
}

#[tokio::test]
async fn an_unknown_export_or_context_is_refused_with_the_servers_words() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.raw");
    sparse_image(&image);
    let server = Server::start(dir.path(), &image, &["--format=raw", "--read-only"]);
    let stream = UnixStream::connect(&server.socket).await.unwrap();
    let error = Connection::connect(stream, "another", None)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the NBD server refused NBD_OPT_GO: no such export: export 'another' not present"
    );
    let context = server.connect(Some("qemu:dirty-bitmap:none")).await;
    assert!(
        matches!(context, Err(Error::NoSuchContext(_))),
        "{context:?}"
    );
}

#[tokio::test]
async fn allocation_is_what_nbdinfo_says() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.raw");
    let size = sparse_image(&image).len() as u64;
    let server = Server::start(dir.path(), &image, &["--format=raw", "--read-only"]);
    let connection = server.connect(Some("base:allocation")).await.unwrap();
    let runs = plain(connection.block_status(extent(0, size)).await.unwrap());
    assert!(runs.len() >= 5, "{runs:?}");
    assert_eq!(runs, server.map("base:allocation"));
    // A part begins and ends where it was asked.
    let part = connection
        .block_status(extent(512 * 1024, 3 * MIB))
        .await
        .unwrap();
    assert_eq!(part[0].extent.start(), 512 * 1024);
    assert_eq!(part.last().unwrap().extent.end(), 3 * MIB + 512 * 1024);
}

#[tokio::test]
async fn a_dirty_bitmap_is_what_nbdinfo_says() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.qcow2");
    let path = image.to_str().unwrap();
    // Longer than 32 bits can say.
    let size = 6 << 30;
    run("qemu-img", &["create", "-q", "-f", "qcow2", path, "6G"]);
    run(
        "qemu-img",
        &["bitmap", "--add", "-g", "65536", path, "since"],
    );
    run(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write 0 4k",
            "-c",
            "write 1M 192k",
            "-c",
            "write 1300k 1k",
            "-c",
            "write 5G 1M",
            "-c",
            "write 6291392k 64k",
            path,
        ],
    );
    let server = Server::start(
        dir.path(),
        &image,
        &["--format=qcow2", "--read-only", "--bitmap=since"],
    );
    let context = "qemu:dirty-bitmap:since";
    let connection = server.connect(Some(context)).await.unwrap();
    let runs = plain(connection.block_status(extent(0, size)).await.unwrap());
    assert_eq!(runs, server.map(context));
    let dirty: Vec<_> = runs
        .iter()
        .filter(|run| run.2 == 1)
        .map(|run| (run.0, run.1))
        .collect();
    let kib = 1024;
    assert_eq!(
        dirty,
        [
            (0, 64 * kib),
            (1024 * kib, 192 * kib),
            (1280 * kib, 64 * kib),
            (5 << 30, MIB),
            (size - 64 * kib, 64 * kib),
        ]
    );
}

#[tokio::test]
async fn trimming_makes_holes() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.raw");
    let mut content = sparse_image(&image);
    let server = Server::start(dir.path(), &image, &["--format=raw", "--discard=unmap"]);
    let connection = server.connect(Some("base:allocation")).await.unwrap();
    assert!(connection.info().can_trim && !connection.info().read_only);
    let trimmed = extent(9 * MIB, 2 * MIB);
    connection.trim(trimmed).await.unwrap();
    content[9 << 20..11 << 20].fill(0);
    let runs = connection.block_status(trimmed).await.unwrap();
    assert_eq!(
        runs,
        [StatusRun {
            extent: trimmed,
            flags: 3
        }]
    );
    let read = connection
        .read(extent(8 * MIB, 4 * MIB), Vec::new())
        .await
        .unwrap();
    assert!(read == content[8 << 20..12 << 20]);
}

#[tokio::test]
async fn an_error_of_the_disk_is_answered_with_its_range() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.raw");
    sparse_image(&image);
    let options = format!(
        "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
         file.inject-error.0.event=none,file.inject-error.0.iotype=read,file.inject-error.0.sector=8,\
         file.inject-error.0.errno=5,file.inject-error.0.once=off",
        image.display()
    );
    let server = Server::start(
        dir.path(),
        Path::new(&options),
        &["--image-opts", "--read-only"],
    );
    let connection = server.connect(None).await.unwrap();
    match connection
        .read(extent(4096, 512), Vec::new())
        .await
        .unwrap_err()
    {
        Error::Answered {
            code,
            extent: range,
            ..
        } => {
            assert_eq!((code, range), (ErrorCode::Eio, extent(4096, 512)));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        connection.read(extent(0, 4096), Vec::new()).await.unwrap(),
        pattern(1, 0, 4096)
    );
}

#[tokio::test]
async fn a_trimmed_range_of_a_snapshot_is_denied_and_the_rest_stays_readable() {
    let dir = TempDir::new().unwrap();
    let content = sparse_image(&dir.path().join("disk.raw"));
    std::fs::File::create(dir.path().join("fleecing.raw"))
        .unwrap()
        .set_len(content.len() as u64)
        .unwrap();
    let server = Server::start_snapshot(dir.path());
    let connection = server.connect(Some("base:allocation")).await.unwrap();
    assert!(connection.info().can_trim && connection.info().can_multi_conn);
    let runs = plain(
        connection
            .block_status(extent(0, content.len() as u64))
            .await
            .unwrap(),
    );
    assert_eq!(runs, server.map("base:allocation"));

    connection.trim(extent(9 * MIB, MIB)).await.unwrap();
    for range in [
        extent(9 * MIB, MIB),
        extent(10 * MIB - 512, 512),
        extent(8 * MIB, 4 * MIB),
    ] {
        let denied = connection.read(range, Vec::new()).await;
        assert!(
            matches!(denied, Err(Error::Answered { code: ErrorCode::Einval, extent, .. }) if extent == range),
            "{denied:?}"
        );
    }
    for (start, length) in [(8 * MIB, MIB), (10 * MIB, 4 * MIB)] {
        let read = connection
            .read(extent(start, length), Vec::new())
            .await
            .unwrap();
        assert!(read == content[start as usize..(start + length) as usize]);
    }
}

#[tokio::test]
async fn a_killed_server_fails_every_reader() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.raw");
    sparse_image(&image);
    let mut server = Server::start(dir.path(), &image, &["--format=raw", "--read-only"]);
    let connection = server.connect(None).await.unwrap();
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let connection = connection.clone();
        readers.spawn(async move {
            let mut buffer = Vec::new();
            loop {
                buffer = match connection.read(extent(0, 4 * MIB), buffer).await {
                    Ok(buffer) => buffer,
                    Err(error) => return error,
                };
            }
        });
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(readers.len(), 16);
    assert!(
        readers.try_join_next().is_none(),
        "a reader failed before the server died"
    );
    server.process.kill().unwrap();
    let all_fail = async {
        while let Some(reader) = readers.join_next().await {
            assert!(matches!(reader.unwrap(), Error::Lost(_)));
        }
    };
    tokio::time::timeout(Duration::from_secs(5), all_fail)
        .await
        .expect("a reader still waits");
}
