//! Servers that break every rule, each in its own way.

use super::{extent, fake::*};
use crate::{Connection, Error, ErrorCode, Negotiation, Refusal, StatusRun, Violation};
use bytes::BufMut;
use proptest::prelude::*;
use std::time::Duration;
use tokio::{io::AsyncWriteExt, time::timeout};

/// Reads 4096 bytes at 8192 while `serve` plays the server, which stays open.
async fn read_from<F: Future<Output = Server>>(
    speaks: Speaks,
    serve: impl FnOnce(Server, Seen) -> F,
) -> Result<Vec<u8>, Error> {
    let (connection, mut server) = connected(speaks).await;
    let client = connection.read(extent(8192, 4096), Vec::new());
    let server = async {
        let seen = server.request().await;
        assert_eq!((seen.command, seen.offset, seen.length), (0, 8192, 4096));
        serve(server, seen).await
    };
    let (read, _server) = soon(async { tokio::join!(client, server) }).await;
    if matches!(read, Err(Error::Violation(_))) {
        // The end of the connection is also the end for whoever comes later.
        let later = soon(connection.read(extent(0, 512), Vec::new())).await;
        assert_eq!(
            later.unwrap_err().to_string(),
            read.as_ref().unwrap_err().to_string()
        );
    }
    read
}

async fn status_from<F: Future<Output = Server>>(
    speaks: Speaks,
    length: u64,
    serve: impl FnOnce(Server, Seen) -> F,
) -> Result<Vec<StatusRun>, Error> {
    let (connection, mut server) = connected(speaks).await;
    let client = connection.block_status(extent(0, length));
    let server = async {
        let seen = server.request().await;
        assert_eq!((seen.command, seen.offset), (7, 0));
        serve(server, seen).await
    };
    let (runs, _server) = soon(async { tokio::join!(client, server) }).await;
    runs
}

fn violation<T: std::fmt::Debug>(result: Result<T, Error>) -> Violation {
    match result {
        Err(Error::Violation(violation)) => violation,
        other => panic!("expected a violation, got {other:?}"),
    }
}

#[tokio::test]
async fn an_export_says_what_it_is() {
    for speaks in [Speaks::Simple, Speaks::Structured, Speaks::Extended] {
        let (connection, _server) = connected(speaks).await;
        let info = *connection.info();
        assert_eq!(info.size, SIZE);
        assert!(!info.read_only && info.can_trim && info.can_multi_conn);
        assert_eq!(
            (info.min_block, info.preferred_block, info.max_block),
            (512, 4096, 1 << 20)
        );
    }
}

#[tokio::test]
async fn a_server_with_simple_replies_only_can_be_read() {
    let read = read_from(Speaks::Simple, async |mut server, seen| {
        server.simple(seen.cookie, 0, &[9; 4096]).await;
        server
    });
    assert_eq!(read.await.unwrap(), [9; 4096]);
}

#[tokio::test]
async fn chunks_may_come_out_of_order_and_mixed_with_another_reply() {
    for speaks in [Speaks::Structured, Speaks::Extended] {
        let (connection, mut server) = connected(speaks).await;
        let client = async {
            tokio::join!(
                connection.read(extent(0, 4096), vec![0xff; 512]),
                connection.read(extent(1 << 20, 2048), Vec::new()),
            )
        };
        let serve = async {
            let (a, b) = (server.request().await, server.request().await);
            server.chunk(&a, false, DATA, &data(3072, &[4; 1024])).await;
            server.chunk(&b, false, HOLE, &hole(1 << 20, 1024)).await;
            server.chunk(&a, false, HOLE, &hole(1024, 1024)).await;
            server
                .chunk(&b, true, DATA, &data((1 << 20) + 1024, &[5; 1024]))
                .await;
            server.chunk(&a, false, DATA, &data(0, &[1; 1024])).await;
            server.chunk(&a, false, DATA, &data(2048, &[3; 1024])).await;
            server.chunk(&a, true, 0, &[]).await;
        };
        let ((a, b), ()) = soon(async { tokio::join!(client, serve) }).await;
        assert_eq!(
            a.unwrap(),
            [
                &[0xff; 512][..],
                &[1; 1024],
                &[0; 1024],
                &[3; 1024],
                &[4; 1024]
            ]
            .concat()
        );
        assert_eq!(b.unwrap(), [[0; 1024], [5; 1024]].concat());
    }
}

#[tokio::test]
async fn an_error_answer_names_its_code_and_the_connection_lives_on() {
    let (connection, mut server) = connected(Speaks::Extended).await;
    let serve = async {
        let seen = server.request().await;
        server
            .chunk(&seen, false, ERROR, &error(22, "snapshot\x1b denies"))
            .await;
        server.chunk(&seen, false, DATA, &data(0, &[1; 512])).await;
        server
            .chunk(
                &seen,
                true,
                ERROR_OFFSET,
                &[error(5, ""), 512u64.to_be_bytes().to_vec()].concat(),
            )
            .await;
        let seen = server.request().await;
        server.chunk(&seen, true, DATA, &data(0, &[2; 512])).await;
    };
    let client = async {
        let failed = connection.read(extent(0, 1024), Vec::new()).await;
        (failed, connection.read(extent(0, 512), Vec::new()).await)
    };
    let ((failed, fine), ()) = soon(async { tokio::join!(client, serve) }).await;
    match failed.unwrap_err() {
        Error::Answered {
            code,
            message,
            extent: range,
            ..
        } => {
            assert_eq!((code, range), (ErrorCode::Einval, extent(0, 1024)));
            assert_eq!(message, "snapshot\\u{1b} denies");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fine.unwrap(), [2; 512]);
}

#[tokio::test]
async fn a_hostile_length_is_refused_before_its_bytes_come() {
    for speaks in [Speaks::Structured, Speaks::Extended] {
        for (kind, length) in [
            (DATA, 8 + 4097),
            (DATA, u64::from(u32::MAX)),
            (DATA, 8),
            (DATA, 3),
            (HOLE, 13),
            (HOLE, 11),
            (ERROR, 1 << 20),
            (0, 1),
        ] {
            // Only the header and an offset come: a client that believed the length would hang.
            let read = read_from(speaks, async |mut server, seen| {
                server
                    .chunk_announcing(&seen, true, kind, length, &8192u64.to_be_bytes())
                    .await;
                server
            });
            assert!(
                matches!(
                    violation(read.await),
                    Violation::ChunkLength { .. } | Violation::ChunkOutside { .. }
                ),
                "{kind} {length}"
            );
        }
    }
    let read = read_from(Speaks::Extended, async |mut server, seen| {
        server
            .chunk_announcing(&seen, true, DATA, u64::MAX, &8192u64.to_be_bytes())
            .await;
        server
    });
    assert!(matches!(
        violation(read.await),
        Violation::ChunkOutside { .. }
    ));
}

#[tokio::test]
async fn chunks_that_do_not_cover_the_read_once_are_refused() {
    let wrong = [
        vec![(DATA, data(8192, &[1; 2048]))],
        vec![(DATA, data(8192, &[1; 4096])), (HOLE, hole(12287, 1))],
        vec![(HOLE, hole(8192, 4096)), (DATA, data(8192, &[1; 512]))],
        vec![
            (DATA, data(10240, &[1; 2048])),
            (DATA, data(8192, &[1; 2049])),
        ],
        vec![(DATA, data(8191, &[1; 4096]))],
        vec![(HOLE, hole(8192, u32::MAX))],
        vec![(HOLE, hole(u64::MAX, 1))],
        vec![(HOLE, hole(8192, 0))],
        vec![],
    ];
    for chunks in wrong {
        let read = read_from(Speaks::Structured, async |mut server, seen| {
            for (kind, payload) in &chunks {
                server.chunk(&seen, false, *kind, payload).await;
            }
            server.chunk(&seen, true, 0, &[]).await;
            server
        });
        let violation = violation(read.await);
        assert!(
            matches!(
                violation,
                Violation::ReadIncomplete { .. }
                    | Violation::ChunksOverlap { .. }
                    | Violation::ChunkOutside { .. }
            ),
            "{violation:?}"
        );
    }
}

#[tokio::test]
async fn what_does_not_belong_into_a_reply_is_refused() {
    let read = read_from(Speaks::Structured, async |mut server, seen| {
        server
            .chunk(
                &Seen {
                    cookie: seen.cookie + 1,
                    ..seen
                },
                true,
                DATA,
                &data(8192, &[1; 4096]),
            )
            .await;
        server
    });
    assert!(matches!(violation(read.await), Violation::UnknownCookie(_)));

    let read = read_from(Speaks::Structured, async |mut server, seen| {
        server.simple(seen.cookie, 0, &[1; 4096]).await;
        server
    });
    assert_eq!(violation(read.await), Violation::SimpleReplyToRead);

    let read = read_from(Speaks::Extended, async |mut server, seen| {
        server.simple(seen.cookie, 0, &[1; 4096]).await;
        server
    });
    assert!(matches!(violation(read.await), Violation::ReplyMagic(_)));

    let read = read_from(Speaks::Extended, async |mut server, seen| {
        server
            .chunk(
                &Seen { offset: 0, ..seen },
                true,
                DATA,
                &data(8192, &[1; 4096]),
            )
            .await;
        server
    });
    assert!(matches!(
        violation(read.await),
        Violation::ReplyOffset {
            expected: 8192,
            actual: 0
        }
    ));

    let read = read_from(Speaks::Structured, async |mut server, seen| {
        server
            .chunk(&seen, true, STATUS, &status(CONTEXT_ID, &[(4096, 0)]))
            .await;
        server
    });
    assert!(matches!(violation(read.await), Violation::ChunkType { .. }));

    let read = read_from(Speaks::Structured, async |mut server, seen| {
        server.chunk(&seen, false, 0, &[]).await;
        server
    });
    assert_eq!(violation(read.await), Violation::EmptyChunkNotLast);

    for payload in [
        error(0, "fine"),
        vec![0, 0, 0, 5, 0, 9, b'x'],
        vec![0, 0, 0, 5],
    ] {
        let read = read_from(Speaks::Structured, async |mut server, seen| {
            server.chunk(&seen, true, ERROR, &payload).await;
            server
        });
        assert_eq!(violation(read.await), Violation::ErrorChunkMalformed);
    }
}

#[tokio::test]
async fn a_reply_that_is_answered_twice_ends_the_connection() {
    let (connection, mut server) = connected(Speaks::Structured).await;
    let client = connection.read(extent(0, 512), Vec::new());
    let serve = async {
        let seen = server.request().await;
        server.chunk(&seen, true, DATA, &data(0, &[1; 512])).await;
        server.chunk(&seen, true, DATA, &data(0, &[2; 512])).await;
    };
    let (first, ()) = soon(async { tokio::join!(client, serve) }).await;
    assert_eq!(first.unwrap(), [1; 512]);
    let second = soon(connection.read(extent(0, 512), Vec::new())).await;
    assert!(matches!(violation(second), Violation::UnknownCookie(_)));
}

#[tokio::test]
async fn block_status_is_clipped_merged_and_continued() {
    let (connection, mut server) = connected(Speaks::Structured).await;
    let client = connection.block_status(extent(0, 10240));
    let serve = async {
        let seen = server.request().await;
        assert_eq!((seen.offset, seen.length), (0, 10240));
        server
            .chunk(
                &seen,
                true,
                STATUS,
                &status(CONTEXT_ID, &[(1024, 0), (1024, 0), (2048, 3)]),
            )
            .await;
        let seen = server.request().await;
        assert_eq!((seen.offset, seen.length), (4096, 6144));
        server
            .chunk(
                &seen,
                false,
                STATUS,
                &status(CONTEXT_ID, &[(512, 3), (u32::MAX, 0)]),
            )
            .await;
        server.chunk(&seen, true, 0, &[]).await;
    };
    let (runs, ()) = soon(async { tokio::join!(client, serve) }).await;
    let runs: Vec<_> = runs
        .unwrap()
        .into_iter()
        .map(|run| (run.extent, run.flags))
        .collect();
    assert_eq!(
        runs,
        [
            (extent(0, 2048), 0),
            (extent(2048, 2560), 3),
            (extent(4608, 5632), 0)
        ]
    );
}

#[tokio::test]
async fn extended_block_status_carries_64_bits() {
    let runs = status_from(Speaks::Extended, SIZE, async |mut server, seen| {
        assert_eq!(seen.length, SIZE);
        let runs = status_ext(CONTEXT_ID, 2, &[(512, 1 << 40), (u64::MAX, 2)]);
        server.chunk(&seen, true, STATUS_EXT, &runs).await;
        server
    });
    let runs: Vec<_> = runs
        .await
        .unwrap()
        .into_iter()
        .map(|run| (run.extent, run.flags))
        .collect();
    assert_eq!(
        runs,
        [(extent(0, 512), 1 << 40), (extent(512, SIZE - 512), 2)]
    );
}

#[tokio::test]
async fn block_status_that_breaks_the_rules_is_refused() {
    let extended = |payload: Vec<u8>| (Speaks::Extended, STATUS_EXT, payload);
    let structured = |payload: Vec<u8>| (Speaks::Structured, STATUS, payload);
    for (speaks, kind, payload) in [
        structured(status(CONTEXT_ID, &[(0, 0)])),
        structured(status(CONTEXT_ID, &[(512, 0), (0, 1)])),
        structured(status(CONTEXT_ID, &[(4096, 0), (512, 0)])),
        structured(status(CONTEXT_ID, &[])),
        structured(status(CONTEXT_ID + 1, &[(4096, 0)])),
        structured(status(CONTEXT_ID, &[(4096, 0)])[..9].to_vec()),
        extended(status_ext(CONTEXT_ID, 2, &[(4096, 0)])),
        extended(status_ext(CONTEXT_ID, 0, &[])),
        extended(status_ext(CONTEXT_ID, 1, &[(0, 0)])),
        (
            Speaks::Structured,
            STATUS_EXT,
            status_ext(CONTEXT_ID, 1, &[(4096, 0)]),
        ),
        (Speaks::Structured, 0, vec![]),
    ] {
        let runs = status_from(speaks, 4096, async |mut server, seen| {
            server.chunk(&seen, true, kind, &payload).await;
            server
        });
        violation(runs.await);
    }
    // More descriptors than bytes, of which none has come yet.
    let runs = status_from(Speaks::Structured, 512, async |mut server, seen| {
        server
            .chunk_announcing(&seen, true, STATUS, 4 + 8 * 513, &CONTEXT_ID.to_be_bytes())
            .await;
        server
    });
    assert!(matches!(
        violation(runs.await),
        Violation::ChunkLength { .. }
    ));
    let runs = status_from(Speaks::Structured, 4096, async |mut server, seen| {
        server
            .chunk(&seen, false, STATUS, &status(CONTEXT_ID, &[(4096, 0)]))
            .await;
        server
            .chunk(&seen, true, STATUS, &status(CONTEXT_ID, &[(4096, 0)]))
            .await;
        server
    });
    assert!(matches!(
        violation(runs.await),
        Violation::StatusChunks { count: 2, .. }
    ));
}

#[tokio::test]
async fn a_trim_is_acknowledged_by_either_kind_of_reply() {
    for speaks in [Speaks::Simple, Speaks::Structured, Speaks::Extended] {
        let (connection, mut server) = connected(speaks).await;
        let serve = async {
            let seen = server.request().await;
            assert_eq!(
                (seen.command, seen.offset, seen.length),
                (4, 512, SIZE - 512)
            );
            match speaks {
                Speaks::Simple | Speaks::Structured => server.simple(seen.cookie, 0, &[]).await,
                Speaks::Extended => server.chunk(&seen, true, 0, &[]).await,
            }
        };
        let (trimmed, ()) =
            soon(async { tokio::join!(connection.trim(extent(512, SIZE - 512)), serve) }).await;
        trimmed.unwrap();
    }
}

#[tokio::test]
async fn what_cannot_be_asked_is_refused_without_asking() {
    let (connection, _server) = connected(Speaks::Simple).await;
    let read = async |range| connection.read(range, Vec::new()).await;
    assert!(matches!(
        read(extent(SIZE, 512)).await,
        Err(Error::OutOfBounds { .. })
    ));
    assert!(matches!(
        read(extent(SIZE - 512, 1024)).await,
        Err(Error::OutOfBounds { .. })
    ));
    assert!(matches!(
        read(extent(0, (1 << 20) + 512)).await,
        Err(Error::TooLong { .. })
    ));
    assert!(matches!(
        read(extent(0, 100)).await,
        Err(Error::Misaligned { .. })
    ));
    assert!(matches!(
        connection.trim(extent(1, 511)).await,
        Err(Error::Misaligned { .. })
    ));
    assert!(matches!(
        connection.block_status(extent(0, 512)).await,
        Err(Error::WithoutContext)
    ));
}

#[tokio::test]
async fn every_waiting_request_fails_at_once_when_the_server_goes() {
    let (connection, mut server) = connected(Speaks::Structured).await;
    let client = async {
        tokio::join!(
            connection.read(extent(0, 4096), Vec::new()),
            connection.block_status(extent(0, 4096)),
            connection.trim(extent(0, 4096)),
        )
    };
    let serve = async {
        let seen = server.request().await;
        server.request().await;
        server.request().await;
        // It dies within the bytes of the first.
        server
            .chunk_announcing(&seen, true, DATA, 8 + 4096, &data(0, &[1; 1000]))
            .await;
        drop(server);
    };
    let ((read, status, trim), ()) = soon(async { tokio::join!(client, serve) }).await;
    assert!(matches!(read, Err(Error::Lost(_))));
    assert!(matches!(status, Err(Error::Lost(_))));
    assert!(matches!(trim, Err(Error::Lost(_))));
}

#[tokio::test]
async fn a_late_reply_to_a_dropped_request_harms_nobody() {
    let (connection, mut server) = connected(Speaks::Structured).await;
    let first = timeout(
        Duration::from_millis(50),
        connection.read(extent(0, 4096), Vec::new()),
    )
    .await;
    assert!(first.is_err());
    let serve = async {
        let (dropped, waiting) = (server.request().await, server.request().await);
        server
            .chunk(&dropped, false, DATA, &data(0, &[1; 2048]))
            .await;
        server
            .chunk(&waiting, false, DATA, &data(0, &[2; 512]))
            .await;
        server
            .chunk(&dropped, true, DATA, &data(2048, &[1; 2048]))
            .await;
        server.chunk(&waiting, true, 0, &[]).await;
    };
    let (second, ()) =
        soon(async { tokio::join!(connection.read(extent(0, 512), Vec::new()), serve) }).await;
    assert_eq!(second.unwrap(), [2; 512]);
}

#[tokio::test]
async fn requests_that_the_socket_does_not_take_are_sent_later() {
    const REQUESTS: u64 = 20_000;
    let (connection, mut server) = connected(Speaks::Structured).await;
    let mut trims = tokio::task::JoinSet::new();
    for n in 0..REQUESTS {
        let connection = connection.clone();
        trims.spawn(async move { connection.trim(extent(n * 512, 512)).await });
    }
    // Each trim is sent before the server takes the first byte, or queued where the socket is full.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    let serve = async {
        for _ in 0..REQUESTS {
            let seen = server.request().await;
            server.simple(seen.cookie, 0, &[]).await;
        }
    };
    soon(async {
        tokio::join!(serve, async {
            while let Some(trim) = trims.join_next().await {
                trim.unwrap().unwrap()
            }
        })
    })
    .await;
}

#[tokio::test]
async fn a_stalled_server_holds_up_neither_dropping_nor_disconnecting() {
    let (connection, server) = connected(Speaks::Structured).await;
    let server = tokio::spawn(server.stall());
    let waiting = timeout(
        Duration::from_millis(20),
        connection.read(extent(0, 512), Vec::new()),
    )
    .await;
    assert!(waiting.is_err());
    drop(connection);
    soon(server).await.unwrap();

    let (connection, mut server) = connected(Speaks::Structured).await;
    let other = connection.clone();
    let waiting = tokio::spawn(async move { other.read(extent(0, 512), Vec::new()).await });
    assert_eq!(server.request().await.command, 0);
    soon(connection.disconnect()).await;
    assert!(matches!(waiting.await.unwrap(), Err(Error::Disconnected)));
    assert_eq!(server.request().await.command, 2);
    soon(server.stall()).await;
}

#[tokio::test]
async fn a_server_that_does_not_finish_the_handshake_is_left() {
    let (stream, mut server) = pair(Speaks::Structured);
    let serve = async {
        server.greet().await;
        server.stall().await;
    };
    let connect = Connection::connect_within(Duration::from_millis(50), stream, "x", None);
    let (connection, ()) = soon(async { tokio::join!(connect, serve) }).await;
    assert!(matches!(connection, Err(Error::HandshakeTimeout(_))));
}

/// Connects to a server that answers `NBD_OPT_GO` with these replies.
async fn go_answered(replies: &[(u32, Vec<u8>)]) -> Result<Connection, Error> {
    let (stream, mut server) = pair(Speaks::Structured);
    let serve = async {
        server.greet().await;
        server.option().await;
        server.reply_option(11, ERR_UNSUP, &[]).await;
        server.option().await;
        server.reply_option(8, ACK, &[]).await;
        assert_eq!(
            server.option().await,
            (7, b"\0\0\0\x01x\0\x01\0\x03".to_vec())
        );
        for (reply, data) in replies {
            server.reply_option(7, *reply, data).await;
        }
        server
    };
    soon(async { tokio::join!(Connection::connect(stream, "x", None), serve) })
        .await
        .0
}

#[tokio::test]
async fn a_handshake_that_breaks_the_rules_is_refused() {
    let info = || (INFO, export_info(SIZE, 1));
    let ack = || (ACK, vec![]);
    assert_eq!(
        violation(go_answered(&[ack()]).await),
        Violation::NoExportInfo
    );
    assert_eq!(
        violation(go_answered(&[(INFO, export_info(1 << 63, 1)), ack()]).await),
        Violation::ExportTooLarge(1 << 63)
    );
    for (min, preferred, max) in [
        (0, 4096, 4096),
        (513, 4096, 4096),
        (1 << 17, 1 << 17, 1 << 20),
        (512, 0, 4096),
        (4096, 4096, 512),
    ] {
        let replies = [info(), (INFO, block_sizes(min, preferred, max)), ack()];
        assert_eq!(
            violation(go_answered(&replies).await),
            Violation::BlockSizes {
                min,
                preferred,
                max
            }
        );
    }
    let malformed = Violation::OptionReplyMalformed(Negotiation::Go);
    assert_eq!(violation(go_answered(&[(INFO, vec![0])]).await), malformed);
    assert_eq!(
        violation(go_answered(&[(INFO, export_info(SIZE, 1)[..11].to_vec())]).await),
        malformed
    );
    assert!(matches!(
        violation(go_answered(&[(META_CONTEXT, vec![0; 4])]).await),
        Violation::OptionReplyType {
            reply: META_CONTEXT,
            ..
        }
    ));
    assert!(matches!(
        violation(go_answered(&[(INFO, vec![9; 5000])]).await),
        Violation::OptionReplyTooLong { length: 5000, .. }
    ));
    let endless = vec![info(); 100];
    assert!(matches!(
        violation(go_answered(&endless).await),
        Violation::OptionRepliesEndless(_)
    ));
    match go_answered(&[(0x8000_0006, b"no such\nthing".to_vec())]).await {
        Err(Error::Refused {
            option: Negotiation::Go,
            reason: Refusal::UnknownExport,
            message,
        }) => {
            assert_eq!(message, "no such\\nthing");
        }
        other => panic!("{other:?}"),
    }
    let connection = go_answered(&[info(), (INFO, vec![0, 1, b'x']), ack()])
        .await
        .unwrap();
    assert_eq!(connection.info().max_block, 32 << 20);
    let long = "x".repeat(4097);
    let (stream, _server) = pair(Speaks::Structured);
    assert!(matches!(
        Connection::connect(stream, &long, None).await,
        Err(Error::NameTooLong { length: 4097, .. })
    ));
}

#[tokio::test]
async fn only_the_context_that_was_asked_for_is_taken() {
    let granted = |id: u32, name: &str| {
        (
            META_CONTEXT,
            [&id.to_be_bytes()[..], name.as_bytes()].concat(),
        )
    };
    for (replies, foreign) in [
        (vec![granted(1, "base:other")], true),
        (vec![granted(1, CONTEXT), granted(2, CONTEXT)], true),
        (vec![], false),
    ] {
        let (stream, mut server) = pair(Speaks::Extended);
        let serve = async {
            server.greet().await;
            server.option().await;
            server.reply_option(11, ACK, &[]).await;
            assert_eq!(server.option().await.0, 10);
            for (reply, data) in &replies {
                server.reply_option(10, *reply, data).await;
            }
            server.reply_option(10, ACK, &[]).await;
            server
        };
        let (connection, _server) =
            soon(async { tokio::join!(Connection::connect(stream, "x", Some(CONTEXT)), serve) })
                .await;
        match connection {
            Err(Error::Violation(Violation::ForeignContext)) => assert!(foreign),
            Err(Error::NoSuchContext(name)) => assert!(!foreign && name == CONTEXT),
            other => panic!("{other:?}"),
        }
    }
}

/// Bytes that look like replies as far as a server without shame would make them.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        Just(0u64),
        Just(8),
        Just(512),
        Just(520),
        Just(1024),
        Just(u64::MAX),
        any::<u64>()
    ];
    let chunk = (
        prop_oneof![
            Just(0x668e_33ef_u32),
            Just(0x6e8a_278c),
            Just(0x6744_6698),
            any::<u32>()
        ],
        0u16..2,
        prop_oneof![
            Just(0u16),
            Just(1),
            Just(2),
            Just(5),
            Just(6),
            Just(0x8001),
            Just(0x8002),
            any::<u16>()
        ],
        0u64..4,
        prop::collection::vec(number, 0..4),
        prop::collection::vec(any::<u8>(), 0..1100),
    )
        .prop_map(|(magic, flags, kind, cookie, numbers, tail)| {
            let mut bytes = Vec::new();
            bytes.put_u32(magic);
            bytes.put_u16(flags);
            bytes.put_u16(kind);
            bytes.put_u64(cookie);
            for number in numbers {
                bytes.put_u64(number);
            }
            bytes.extend(tail);
            bytes
        });
    prop::collection::vec(chunk, 0..5).prop_map(|chunks| chunks.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_a_server_sends_every_request_gets_an_answer(
        bytes in garbage(),
        speaks in prop_oneof![Just(Speaks::Structured), Just(Speaks::Extended)],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (connection, mut server) = connected(speaks).await;
            let client = async {
                tokio::join!(
                    connection.read(extent(0, 512), Vec::new()),
                    connection.block_status(extent(0, 1024)),
                    connection.trim(extent(512, 512)),
                )
            };
            let serve = async {
                for _ in 0..3 {
                    server.request().await;
                }
                let _ = server.stream.write_all(&bytes).await;
                drop(server);
            };
            let ((read, status, _), ()) = soon(async { tokio::join!(client, serve) }).await;
            if let Ok(bytes) = read {
                assert_eq!(bytes.len(), 512);
            }
            if let Ok(runs) = status {
                assert_eq!(runs.iter().map(|run| run.extent.len()).sum::<u64>(), 1024);
            }
        });
    }

    #[test]
    fn whatever_a_server_greets_with_connecting_ends(bytes: Vec<u8>, honest_start: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (stream, mut server) = pair(Speaks::Structured);
            let serve = async {
                if honest_start {
                    server.greet().await;
                }
                let _ = server.stream.write_all(&bytes).await;
                drop(server);
            };
            let (connection, ()) = soon(async { tokio::join!(Connection::connect(stream, "x", None), serve) }).await;
            assert!(connection.is_err());
        });
    }
}
