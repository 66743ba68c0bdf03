//! The server before clients that lie, stall or flood. Before honest tools it stands in the product's own tests.

use super::{ALLOCATION, Bounds, Export, HOLE, Refused, Server};
use crate::{Connection, ErrorCode, StatusRun};
use bytes::BufMut;
use fleecebox_contract::extent::Extent;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

const SIZE: u64 = 64 << 20;
/// What is read of here waits for ever.
const SLOW: u64 = 32 << 20;
/// What is read of here cannot be had.
const BAD: u64 = 48 << 20;

/// Each byte is the low one of its offset's thousands.
struct Pattern;

fn pattern(extent: Extent) -> Vec<u8> {
    (extent.start()..extent.end())
        .map(|at| (at / 1000) as u8)
        .collect()
}

impl Export for Pattern {
    fn name(&self) -> &str {
        "pattern"
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn preferred_block(&self) -> u32 {
        65536
    }

    fn can_trim(&self) -> bool {
        false
    }

    fn contexts(&self) -> Vec<String> {
        vec![ALLOCATION.into()]
    }

    async fn read(&self, extent: Extent) -> Result<Vec<u8>, Refused> {
        if extent.start() == SLOW {
            std::future::pending::<()>().await;
        }
        if extent.end() > BAD {
            return Err(Refused {
                code: ErrorCode::Eio,
                message: "the bytes are gone".into(),
                at: Some(BAD.max(extent.start())),
            });
        }
        Ok(pattern(extent))
    }

    async fn trim(&self, _: Extent) -> Result<(), Refused> {
        Ok(())
    }

    async fn status(&self, _: &str, extent: Extent, _: usize) -> Result<Vec<StatusRun>, Refused> {
        Ok(vec![StatusRun {
            extent,
            flags: HOLE,
        }])
    }
}

struct Scene {
    _folder: TempDir,
    socket: PathBuf,
    server: Server,
}

impl Scene {
    fn new(bounds: Bounds) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd");
        let listener = UnixListener::bind(&socket).unwrap();
        Self {
            _folder: folder,
            socket,
            server: Server::start(listener, vec![Pattern], bounds),
        }
    }

    async fn honest(&self) -> Connection {
        open(&self.socket).await.expect("an honest client")
    }

    async fn raw(&self) -> UnixStream {
        UnixStream::connect(&self.socket).await.unwrap()
    }

    /// Waits until there are so many clients.
    async fn clients(&self, expected: usize) {
        let mut clients = self.server.clients();
        let waited = timeout(SOON, clients.wait_for(|count| *count == expected)).await;
        waited.expect("so many clients").unwrap();
    }

    async fn still_serves(&self) {
        let extent = extent(5000, 70_000);
        let client = self.honest().await;
        assert_eq!(read(&client, extent).await.unwrap(), pattern(extent));
    }
}

const SOON: Duration = Duration::from_secs(20);

fn extent(offset: u64, length: u64) -> Extent {
    Extent::new(offset, length).unwrap()
}

async fn open(socket: &Path) -> Result<Connection, crate::Error> {
    let stream = UnixStream::connect(socket).await.unwrap();
    Connection::connect(stream, "pattern", Some(ALLOCATION)).await
}

async fn read(client: &Connection, extent: Extent) -> Result<Vec<u8>, crate::Error> {
    client.read(extent, Vec::new()).await
}

fn quick() -> Bounds {
    Bounds {
        handshake: Duration::from_millis(200),
        request: Duration::from_millis(200),
        reply: Duration::from_millis(500),
        idle: Duration::from_millis(100),
        ..Bounds::default()
    }
}

fn request(command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(0x2560_9513);
    bytes.put_u16(0);
    bytes.put_u16(command);
    bytes.put_u64(7);
    bytes.put_u64(offset);
    bytes.put_u32(length);
    bytes
}

/// As a client of old: without options but the name, and with simple replies.
async fn old_client(scene: &Scene) -> UnixStream {
    let mut stream = scene.raw().await;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.unwrap();
    let mut hello = Vec::new();
    hello.put_u32(3);
    hello.put_slice(b"IHAVEOPT");
    hello.put_u32(1);
    hello.put_u32(7);
    hello.put_slice(b"pattern");
    stream.write_all(&hello).await.unwrap();
    assert_eq!(stream.read_u64().await.unwrap(), SIZE);
    let flags = stream.read_u16().await.unwrap();
    assert_eq!(flags & 0b10, 0b10, "read-only");
    stream
}

/// The error of a simple reply.
async fn simple(stream: &mut UnixStream) -> u32 {
    assert_eq!(stream.read_u32().await.unwrap(), 0x6744_6698);
    let error = stream.read_u32().await.unwrap();
    assert_eq!(stream.read_u64().await.unwrap(), 7);
    error
}

/// Whether the server ends the connection soon.
async fn is_cut_off(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    timeout(SOON, stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_of_it_it_gives_and_what_it_cannot_it_names() {
    let scene = Scene::new(Bounds::default());
    let client = scene.honest().await;
    assert!(client.info().read_only);
    let asked = extent(999, 3 << 20);
    assert_eq!(read(&client, asked).await.unwrap(), pattern(asked));
    let refused = read(&client, extent(BAD - 10, 20)).await.unwrap_err();
    let told = refused.to_string();
    assert!(told.contains("EIO"), "{told}");
    assert!(told.contains("the bytes are gone"), "{told}");
    // The connection goes on.
    assert_eq!(read(&client, extent(0, 9)).await.unwrap(), [0; 9]);
    let runs = client.block_status(extent(0, SIZE)).await.unwrap();
    assert_eq!(runs.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_old_is_served_and_its_nonsense_refused() {
    let scene = Scene::new(Bounds::default());
    let mut client = old_client(&scene).await;
    client.write_all(&request(0, 2000, 3)).await.unwrap();
    assert_eq!(simple(&mut client).await, 0);
    let mut bytes = [0; 3];
    client.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, [2; 3]);
    for (command, offset, length, error) in [
        (0, SIZE - 1, 2, 22),
        (0, u64::MAX, 2, 22),
        (0, 0, 0, 22),
        (0, 0, (4 << 20) + 1, 22),
        (0, BAD, 1, 5),
        // Not granted, and not known.
        (4, 0, 4096, 22),
        (7, 0, 4096, 22),
        (99, 0, 4096, 22),
    ] {
        let asked = request(command, offset, length);
        client.write_all(&asked).await.unwrap();
        assert_eq!(
            simple(&mut client).await,
            error,
            "{command} {offset} {length}"
        );
    }
    let written = [request(1, 0, 5), b"hello".to_vec()].concat();
    client.write_all(&written).await.unwrap();
    assert_eq!(simple(&mut client).await, 1, "a write is not permitted");
    client.write_all(&request(2, 0, 0)).await.unwrap();
    assert!(is_cut_off(&mut client).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_or_half_of_it_is_cut_off_in_time() {
    let scene = Scene::new(quick());
    let mut silent = scene.raw().await;
    let mut half_an_option = scene.raw().await;
    half_an_option
        .write_all(b"\0\0\0\x03IHAVEOPT\0\0")
        .await
        .unwrap();
    let mut half_a_request = old_client(&scene).await;
    half_a_request
        .write_all(&request(0, 0, 1)[..20])
        .await
        .unwrap();
    let mut half_a_write = old_client(&scene).await;
    half_a_write
        .write_all(&request(1, 0, u32::MAX))
        .await
        .unwrap();
    scene.still_serves().await;
    for stream in [
        &mut silent,
        &mut half_an_option,
        &mut half_a_request,
        &mut half_a_write,
    ] {
        assert!(is_cut_off(stream).await);
    }
    scene.clients(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_no_replies_costs_a_bounded_share_and_is_cut_off() {
    let scene = Scene::new(quick());
    let mut slow = old_client(&scene).await;
    let flood = request(0, 0, 4 << 20).repeat(1000);
    // As much of it as the server reads; it does not read on.
    let _ = timeout(Duration::from_millis(100), slow.write_all(&flood)).await;
    scene.still_serves().await;
    scene.clients(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_cannot_have_more_under_way_than_its_share() {
    let scene = Scene::new(Bounds::default());
    let mut greedy = old_client(&scene).await;
    let waiting = request(0, SLOW, 1).repeat(Bounds::default().requests);
    greedy.write_all(&waiting).await.unwrap();
    // A quick one behind them waits for a place.
    greedy.write_all(&request(0, 0, 1)).await.unwrap();
    let answered = timeout(Duration::from_millis(200), greedy.read_u8()).await;
    assert!(answered.is_err(), "{answered:?}");
    scene.still_serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_gets_the_place_of_who_was_idle_longest_and_of_nobody_who_is_not() {
    let bounds = Bounds {
        clients: 2,
        idle: Duration::from_millis(300),
        ..Bounds::default()
    };
    let scene = Scene::new(bounds);
    let mut busy = old_client(&scene).await;
    busy.write_all(&request(0, SLOW, 1)).await.unwrap();
    let mut idle = old_client(&scene).await;
    scene.clients(2).await;
    let mut early = scene.raw().await;
    assert!(is_cut_off(&mut early).await, "both places are in use");
    tokio::time::sleep(bounds.idle * 2).await;
    scene.still_serves().await;
    assert!(is_cut_off(&mut idle).await);
    scene.clients(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_no_more_places_than_one_may_have() {
    let bounds = Bounds {
        of_one_user: 1,
        ..Bounds::default()
    };
    let scene = Scene::new(bounds);
    let first = scene.honest().await;
    let mut second = scene.raw().await;
    assert!(is_cut_off(&mut second).await);
    drop(first);
    scene.clients(0).await;
    scene.still_serves().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_clients_send_others_are_served(
        hello: bool,
        garbage in prop::collection::vec(any::<u8>(), 0..300),
        option in 0u32..14,
        length in prop_oneof![0u32..64, any::<u32>()],
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let scene = Scene::new(quick());
            let mut stream = scene.raw().await;
            let mut bytes = Vec::new();
            if hello {
                bytes.put_slice(b"\0\0\0\x03IHAVEOPT");
                bytes.put_u32(option);
                bytes.put_u32(length);
            }
            bytes.put_slice(&garbage);
            // It may have ended the connection already.
            let _ = stream.write_all(&bytes).await;
            scene.still_serves().await;
            drop(stream);
            scene.clients(0).await;
        });
    }
}
