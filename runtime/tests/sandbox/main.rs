//! Real sandbox processes, tiny providers, and a scripted job on the other side.

mod budget;
mod component;
mod confinement;
#[path = "../../../tests/src/report.rs"]
#[expect(unreachable_pub, reason = "the tests' harness exports it")]
mod report;
mod wasi;

use bytes::Bytes;
use cap_std::ambient_authority;
use cap_std::fs::Dir;
use component::*;
use fleecebox::channel::*;
use fleecebox::contract::*;
use fleecebox::sandbox::*;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

const MIB: u32 = 1 << 20;

struct Bench {
    program: Program,
    cache: Cache,
    folder: tempfile::TempDir,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let dir = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
    Bench {
        program: Program::at(env!("CARGO_BIN_EXE_fleecebox")),
        cache: Cache::new(dir),
        folder,
    }
}

impl Bench {
    async fn compile(&self, component: Vec<u8>) -> Compiled {
        compile(&self.program, Bytes::from(component), &self.cache)
            .await
            .unwrap()
    }

    async fn start(&self, component: Vec<u8>, order: Order) -> Process {
        let compiled = self.compile(component).await;
        Process::start(&self.program, &order, &compiled.file)
            .await
            .unwrap()
    }

    /// Runs a provider to its end, answering each call by `job`.
    async fn run(
        &self,
        component: Vec<u8>,
        order: Order,
        job: impl FnMut(&Process, &Call) -> Answer,
    ) -> Outcome {
        let mut process = self.start(component, order).await;
        to_the_end(&mut process, job).await
    }
}

async fn to_the_end(
    process: &mut Process,
    mut job: impl FnMut(&Process, &Call) -> Answer,
) -> Outcome {
    loop {
        match process.next().await.unwrap() {
            Call::Done(outcome) => return outcome,
            call => {
                let answer = job(process, &call);
                process.answer(&answer).unwrap();
            }
        }
    }
}

fn no_calls(_: &Process, call: &Call) -> Answer {
    panic!("unexpected {call:?}")
}

fn limits() -> GuestLimits {
    GuestLimits {
        memory: 64 << 20,
        cpu_ms: 10_000,
    }
}

fn context() -> Context {
    Context {
        id: "job-1".into(),
        settings: "level = 3".into(),
    }
}

fn run_order() -> Run {
    Run {
        world: World::Provider,
        wasi: BTreeSet::new(),
        limits: limits(),
        context: context(),
        volume: VolumeInfo {
            name: "drive".into(),
            size: 1 << 30,
            block_size: 65536,
            mode: BitmapMode::None,
        },
        reader: true,
        discarder: true,
        base: None,
        max_read: MIB,
        max_write: MIB,
    }
}

fn blind_order() -> Order {
    Order::Run(Run {
        world: World::BlindProvider,
        reader: false,
        ..run_order()
    })
}

fn failure(outcome: Outcome) -> Failure {
    match outcome {
        Outcome::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

const OK_EMPTY: &str = "(call $ok (i32.const 0) (i32.const 0))";

#[tokio::test]
async fn a_provider_reads_and_writes_through_the_job_and_returns_its_receipt() {
    // Reads 1000 bytes at 4096, writes them to an object named by the first three bytes of its base, finishes it,
    // and returns what it read.
    let guest = provider(
        "(call $read (local.get $reader) (i64.const 4096) (i32.const 1000) (i32.const 16))
         (if (i32.load8_u (i32.const 16)) (then unreachable))
         (call $create (local.get $writer) (local.get $base) (i32.const 3) (i32.const 1) (i32.const 32))
         (if (i32.load8_u (i32.const 32)) (then unreachable))
         (call $write (i32.load (i32.const 36)) (i32.load (i32.const 20)) (i32.load (i32.const 24)) (i32.const 48))
         (if (i32.load8_u (i32.const 48)) (then unreachable))
         (call $finish (i32.load (i32.const 36)) (i32.const 64))
         (if (i64.ne (i64.load (i32.const 72)) (i64.const 1000)) (then unreachable))
         (call $ok (i32.load (i32.const 20)) (i32.load (i32.const 24)))",
    );
    let disk: Vec<u8> = (0..1000u32).map(|i| (i * 7 % 251) as u8).collect();
    let mut said = Vec::new();
    let order = Order::Run(Run {
        base: Some(b"abcdef".to_vec()),
        ..run_order()
    });
    let outcome = bench()
        .run(guest, order, |process, call| {
            said.push(format!("{call:?}"));
            match call {
                Call::Read {
                    offset: 4096,
                    length: 1000,
                } => Answer::Bytes {
                    length: process.give_payload(&disk).unwrap(),
                },
                Call::Create {
                    name,
                    encoding: Encoding::Zstd,
                } if name == "abc" => Answer::Stream(77),
                Call::Write { stream: 77, length } => {
                    assert_eq!(process.take_payload(*length).unwrap(), disk);
                    Answer::Unit
                }
                Call::Finish { stream: 77 } => Answer::Size(1000),
                other => panic!("{other:?}"),
            }
        })
        .await;
    assert!(matches!(outcome, Outcome::Receipt(receipt) if receipt == disk));
    assert_eq!(said.len(), 4);
}

#[tokio::test]
async fn a_blind_provider_puts_what_is_dirty_and_discards_it() {
    let guest = blind_provider(
        "(call $info (local.get $snapshot) (i32.const 16))
         (if (i64.ne (i64.load (i32.const 24)) (i64.const 1073741824)) (then unreachable))
         (if (i32.ne (i32.load (i32.const 32)) (i32.const 65536)) (then unreachable))
         (call $next (local.get $dirty) (i32.const -1) (i32.const 48))
         (if (i32.ne (i32.load (i32.const 56)) (i32.const 2)) (then unreachable))
         (call $put (local.get $writer) (local.get $snapshot)
           (i64.load (i32.add (i32.load (i32.const 52)) (i32.const 24)))
           (i64.load (i32.add (i32.load (i32.const 52)) (i32.const 32)))
           (i32.const 0) (i32.const 64))
         (if (i32.load8_u (i32.const 64)) (then unreachable))
         (call $discard (local.get $discarder) (i64.const 65536) (i64.const 131072) (i32.const 80))
         ;; The job refuses the discard with `not-dirty`, which this returns.
         (call $error (i32.load8_u (i32.const 84)))",
    );
    let outcome = bench()
        .run(guest, blind_order(), |_, call| match call {
            // As many as a message holds, whatever the guest wants.
            Call::NextRegions { limit: MAX_REGIONS } => {
                Answer::Regions(vec![(0, 65536, true), (65536, 131072, false)])
            }
            Call::Put(
                RawRange {
                    offset: 65536,
                    length: 131072,
                },
                Encoding::Identity,
            ) => Answer::Unit,
            Call::Discard(RawRange {
                offset: 65536,
                length: 131072,
            }) => Answer::Error(ErrorCode::NotDirty),
            other => panic!("{other:?}"),
        })
        .await;
    assert!(
        matches!(outcome, Outcome::GuestError(ErrorCode::NotDirty)),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn what_is_not_granted_is_absent() {
    let guest = provider(
        "(if (i32.or (local.get $has-reader) (local.get $has-discarder)) (then unreachable))
         (if (local.get $has-base) (then unreachable))
         (call $ok (i32.const 0) (i32.const 0))",
    );
    let order = Order::Run(Run {
        reader: false,
        discarder: false,
        ..run_order()
    });
    assert!(matches!(
        bench().run(guest.clone(), order, no_calls).await,
        Outcome::Receipt(_)
    ));
    let granted = bench().run(guest, Order::Run(run_order()), no_calls).await;
    assert!(matches!(failure(granted), Failure::Trapped(_)));
}

#[tokio::test]
async fn a_read_past_max_read_is_refused_without_asking_the_job() {
    let guest = provider(
        "(call $read (local.get $reader) (i64.const 0) (i32.const 1048577) (i32.const 16))
         (call $error (i32.load8_u (i32.const 20)))",
    );
    let outcome = bench().run(guest, Order::Run(run_order()), no_calls).await;
    assert!(
        matches!(outcome, Outcome::GuestError(ErrorCode::TooLarge)),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn a_write_past_max_write_is_refused_without_asking_the_job() {
    let guest = provider(
        "(call $create (local.get $writer) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 32))
         (call $write (i32.load (i32.const 36)) (i32.const 0) (i32.const 101) (i32.const 48))
         (call $error (i32.load8_u (i32.const 52)))",
    );
    let order = Order::Run(Run {
        max_write: 100,
        ..run_order()
    });
    let outcome = bench()
        .run(guest, order, |_, call| match call {
            Call::Create { .. } => Answer::Stream(0),
            other => panic!("{other:?}"),
        })
        .await;
    assert!(matches!(outcome, Outcome::GuestError(ErrorCode::TooLarge)));
}

#[tokio::test]
async fn a_stream_that_is_dropped_unfinished_is_reported() {
    let guest = provider(
        "(call $create (local.get $writer) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 32))
         (call $drop-stream (i32.load (i32.const 36)))
         (call $ok (i32.const 0) (i32.const 0))",
    );
    let mut dropped = 0;
    let outcome = bench()
        .run(guest, Order::Run(run_order()), |_, call| match call {
            Call::Create { .. } => Answer::Stream(5),
            Call::DropStream { stream: 5 } => {
                dropped += 1;
                Answer::Unit
            }
            other => panic!("{other:?}"),
        })
        .await;
    assert!(matches!(outcome, Outcome::Receipt(_)));
    assert_eq!(dropped, 1);
}

#[tokio::test]
async fn a_guests_text_is_cut() {
    let guest = provider(
        "(memory.fill (i32.const 1024) (i32.const 97) (i32.const 60000))
         (call $log (local.get $job) (i32.const 2) (i32.const 1024) (i32.const 60000))
         (call $ok (i32.const 0) (i32.const 0))",
    );
    let outcome = bench()
        .run(guest, Order::Run(run_order()), |_, call| match call {
            Call::Log {
                level: LogLevel::Warn,
                message,
            } => {
                assert_eq!(message.len(), MAX_TEXT);
                Answer::Unit
            }
            other => panic!("{other:?}"),
        })
        .await;
    assert!(matches!(outcome, Outcome::Receipt(_)));
}

#[tokio::test]
async fn an_image_is_opened_once_and_read_many_times() {
    // Reads come from the object named by the receipt, shifted by one byte; a read at 0 is an error of its own.
    let guest = provider_with_image(
        OK_EMPTY,
        "(if (result i32) (i64.eqz (local.get $offset))
           (then (call $error (i32.const 6)))
           (else
             (call $object-read (global.get $objects) (global.get $receipt) (global.get $receipt-length)
               (i64.add (local.get $offset) (i64.const 1)) (local.get $length) (i32.const 16))
             (call $ok (i32.load (i32.const 20)) (i32.load (i32.const 24)))))",
    );
    let order = Order::OpenImage(OpenImage {
        wasi: BTreeSet::new(),
        limits: limits(),
        context: context(),
        receipt: b"object".to_vec(),
        max_read: MIB,
        still: Default::default(),
    });
    let bench = bench();
    let mut process = bench.start(guest, order).await;
    let job = |process: &Process, call: &Call| match call {
        Call::ObjectRead {
            name,
            offset,
            length,
        } if name == "object" => {
            let bytes = vec![*offset as u8; *length as usize];
            Answer::Bytes {
                length: process.give_payload(&bytes).unwrap(),
            }
        }
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        to_the_end(&mut process, job).await,
        Outcome::Opened
    ));
    for offset in [1u64, 0, 41] {
        process
            .read_image(ImageRead {
                offset,
                length: 500,
            })
            .unwrap();
        match to_the_end(&mut process, job).await {
            Outcome::Bytes { length: 500 } => {
                assert_eq!(
                    process.take_payload(500).unwrap(),
                    vec![offset as u8 + 1; 500]
                );
            }
            Outcome::GuestError(ErrorCode::NotFound) => assert_eq!(offset, 0),
            other => panic!("{other:?}"),
        }
    }
    process.kill().await;
}

/// What a guest has at address 16 after a call: whether it failed, and how.
const RESULT: &str = "(call $ok (i32.const 16) (i32.const 8))";

const INVALID_NAME: (u8, u8) = (1, 4);

#[tokio::test]
async fn a_name_that_is_too_long_is_no_violation_however_long_it_is_and_is_answered_as_any_other() {
    let bench = bench();
    for length in [1, 127, 128, 129, 255, 256, 257, 70_000] {
        let create = format!(
            "(call $create (local.get $writer) (i32.const 1024) (i32.const {length}) (i32.const 0) (i32.const 16)) {RESULT}"
        );
        let mut named = Vec::new();
        let outcome = bench
            .run(
                blind_provider(&create),
                blind_order(),
                |_, call| match call {
                    Call::Create { name, .. } => {
                        named.push(name.len());
                        match name.len() <= MAX_NAME {
                            true => Answer::Stream(7),
                            false => Answer::Error(ErrorCode::InvalidName),
                        }
                    }
                    Call::DropStream { .. } => Answer::Unit,
                    other => panic!("{other:?}"),
                },
            )
            .await;
        let Outcome::Receipt(result) = outcome else {
            panic!("{length}: {outcome:?}")
        };
        assert_eq!(named, [length.min(MAX_NAME + 1)]);
        match length <= MAX_NAME {
            true => assert_eq!(result[0], 0),
            false => assert_eq!((result[0], result[4]), INVALID_NAME),
        }
    }
}

#[tokio::test]
async fn an_object_is_asked_for_by_a_name_of_any_length_and_the_job_says_what_is_none() {
    // The offset says how long the name is.
    let guest = provider_with_image(
        OK_EMPTY,
        &format!(
            "(call $object-read (global.get $objects) (i32.const 1024) (i32.wrap_i64 (local.get $offset))
               (i64.const 0) (i32.const 1) (i32.const 16)) {RESULT}"
        ),
    );
    let bench = bench();
    let mut process = bench.start(guest, open_order(vec![])).await;
    let mut asked = Vec::new();
    let opened = to_the_end(&mut process, no_calls).await;
    assert!(matches!(opened, Outcome::Opened));
    for length in [128, 129, 255, 256, 70_000] {
        let (offset, of) = (length, 8);
        process
            .read_image(ImageRead { offset, length: of })
            .unwrap();
        let job = |_: &Process, call: &Call| {
            let Call::ObjectRead { name, .. } = call else {
                panic!("{call:?}")
            };
            asked.push(name.len());
            Answer::Error(match name.len() <= MAX_NAME {
                true => ErrorCode::NotFound,
                false => ErrorCode::InvalidName,
            })
        };
        let outcome = to_the_end(&mut process, job).await;
        assert!(
            matches!(outcome, Outcome::Bytes { length: 8 }),
            "{outcome:?}"
        );
        let result = process.take_payload(8).unwrap();
        let expected = match length {
            128 => (1, 6),
            _ => INVALID_NAME,
        };
        assert_eq!((result[0], result[4]), expected, "{length}");
    }
    assert_eq!(asked, [128, 129, 129, 129, 129]);
    process.kill().await;
}

fn open_order(receipt: Vec<u8>) -> Order {
    Order::OpenImage(OpenImage {
        wasi: BTreeSet::new(),
        limits: limits(),
        context: context(),
        receipt,
        max_read: MIB,
        still: Default::default(),
    })
}

#[tokio::test]
async fn a_new_receipt_has_at_most_64_kib_and_an_older_one_of_a_mib_is_still_a_base_and_opens_an_image()
 {
    let bench = bench();
    for (length, over) in [(MAX_RECEIPT, false), (MAX_RECEIPT + 1, true)] {
        let run = format!("(call $ok (i32.const 1024) (i32.const {length}))");
        let outcome = bench.run(provider(&run), Order::Run(run_order()), no_calls);
        match outcome.await {
            Outcome::Receipt(receipt) if !over => assert_eq!(receipt.len(), 64 << 10),
            Outcome::Failed(Failure::TooLarge {
                length: 65_537,
                limit: 65_536,
            }) if over => {}
            other => panic!("{length}: {other:?}"),
        }
    }
    // Returns how long it is.
    let says = "(i32.store (i32.const 16) (local.get $base-length)) (call $ok (i32.const 16) (i32.const 4))";
    let order = Order::Run(Run {
        base: Some(vec![7; MAX_KEPT_RECEIPT]),
        ..run_order()
    });
    let Outcome::Receipt(said) = bench.run(provider(says), order, no_calls).await else {
        panic!("no receipt")
    };
    assert_eq!(said, (MAX_KEPT_RECEIPT as u32).to_le_bytes());
    let order = open_order(vec![7; MAX_KEPT_RECEIPT]);
    let mut process = bench.start(provider(OK_EMPTY), order).await;
    let opened = to_the_end(&mut process, no_calls).await;
    assert!(matches!(opened, Outcome::Opened), "{opened:?}");
    process.kill().await;
}

#[tokio::test]
async fn a_trap_is_said_in_one_line() {
    let failure = failure(
        bench()
            .run(provider("unreachable"), Order::Run(run_order()), no_calls)
            .await,
    );
    let text = failure.to_string();
    assert!(matches!(failure, Failure::Trapped(_)), "{text}");
    assert!(
        text.contains("unreachable") && text.lines().count() == 1,
        "{text}"
    );
}

#[tokio::test]
async fn a_guest_that_uses_up_its_stack_traps_and_its_last_calls_still_have_room() {
    let guest = blind_provider_with_more(
        "(call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1)) (call $down (local.get $job)) unreachable",
        "(func $down (param $job i32)
           (call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1))
           (call $down (local.get $job)))",
    );
    let mut calls = 0;
    let outcome = bench()
        .run(guest, blind_order(), |_, _| {
            calls += 1;
            Answer::Unit
        })
        .await;
    let Failure::Trapped(why) = failure(outcome) else {
        panic!("not a trap")
    };
    assert!(why.contains("stack"), "{why}");
    assert!(calls > 1000, "{calls}");
}

#[tokio::test]
async fn a_guest_that_spins_ends_by_its_cpu_limit() {
    let order = Run {
        limits: GuestLimits {
            cpu_ms: 200,
            ..limits()
        },
        ..run_order()
    };
    let began = Instant::now();
    let outcome = bench()
        .run(
            provider("(loop $l (br $l)) unreachable"),
            Order::Run(order),
            no_calls,
        )
        .await;
    assert!(matches!(failure(outcome), Failure::CpuTime));
    assert!(began.elapsed() > Duration::from_millis(200));
}

#[tokio::test]
async fn a_guest_that_waits_is_not_charged() {
    let guest = provider(
        "(call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1))
         (call $ok (i32.const 0) (i32.const 0))",
    );
    let order = Run {
        limits: GuestLimits {
            cpu_ms: 200,
            ..limits()
        },
        ..run_order()
    };
    let outcome = bench()
        .run(guest, Order::Run(order), |_, _| {
            std::thread::sleep(Duration::from_millis(500));
            Answer::Unit
        })
        .await;
    assert!(matches!(outcome, Outcome::Receipt(_)));
}

#[tokio::test]
async fn a_guest_that_takes_too_much_memory_ends_by_its_memory_limit() {
    let grow =
        "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable";
    let outcome = bench()
        .run(provider(grow), Order::Run(run_order()), no_calls)
        .await;
    assert!(matches!(failure(outcome), Failure::Memory));
    // One that asks for too much from the start does not even begin.
    let order = Run {
        limits: GuestLimits {
            memory: 65536,
            ..limits()
        },
        ..run_order()
    };
    let outcome = bench()
        .run(provider(OK_EMPTY), Order::Run(order), no_calls)
        .await;
    assert!(matches!(failure(outcome), Failure::Memory));
}

#[tokio::test]
async fn a_receipt_past_the_limit_fails_the_run() {
    let receipt = "(call $ok (call $alloc (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 1048577)) (i32.const 1048577))";
    let outcome = bench()
        .run(provider(receipt), Order::Run(run_order()), no_calls)
        .await;
    assert_eq!(
        failure(outcome),
        Failure::TooLarge {
            length: 1048577,
            limit: 65536
        }
    );
}

#[tokio::test]
async fn a_component_that_imports_a_socket_is_refused_by_name() {
    let compiled = bench().compile(provider_with_a_socket()).await;
    match world_of(&compiled.interface, &BTreeSet::new()) {
        Err(Refusal::NotGranted {
            import,
            world: Some(World::BlindProvider),
        }) => {
            assert_eq!(import, "wasi:sockets/tcp@0.2.0");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_component_of_another_world_is_not_run_even_if_somebody_tries() {
    let bench = bench();
    let outcome = bench
        .run(provider_with_a_socket(), blind_order(), no_calls)
        .await;
    let reason = failure(outcome).to_string();
    assert!(reason.contains("wasi:sockets/tcp"), "{reason}");
    let reads = provider(
        "(call $read (local.get $reader) (i64.const 0) (i32.const 1) (i32.const 16)) (i32.const 0)",
    );
    let outcome = bench.run(reads, blind_order(), no_calls).await;
    assert!(matches!(failure(outcome), Failure::CannotLink(_)));
}

#[tokio::test]
async fn whether_a_component_fits_its_world_is_known_before_it_runs() {
    let bench = bench();
    let fits = async |component: Vec<u8>, world, wasi: &[Wasi]| {
        let compiled = bench.compile(component).await;
        let wasi = wasi.iter().copied().collect();
        fit(&bench.program, &compiled, world, wasi).await
    };
    let (seeing, blind) = (World::Provider, World::BlindProvider);
    assert!(fits(provider(OK_EMPTY), seeing, &[]).await.is_ok());
    assert!(fits(blind_provider(OK_EMPTY), blind, &[]).await.is_ok());
    // None of its code runs.
    let spins = blind_provider_with_more(OK_EMPTY, "(func $on (loop $l (br $l))) (start $on)");
    assert!(fits(spins, blind, &[]).await.is_ok());
    for (component, world) in [
        (of_other_types(), blind),
        (blind_provider(OK_EMPTY), seeing),
        (provider_with_a_socket(), blind),
    ] {
        let refused = fits(component, world, &Wasi::ALL).await.unwrap_err();
        let unfit = matches!(&refused, FitError::Refused(Failure::CannotLink(_)));
        assert!(unfit, "{refused:?}");
    }
}

#[tokio::test]
async fn what_was_refused_is_refused_again_without_another_try() {
    let bench = bench();
    let refused = async |program: &Program| {
        let rubbish = Bytes::from_static(b"\0asm\x0d\0\x01\0 and no more");
        let refused = compile(program, rubbish, &bench.cache).await;
        refused.unwrap_err().to_string()
    };
    let first = refused(&bench.program).await;
    assert!(first.contains("not a component that can be run"), "{first}");
    // There is nothing that could be started.
    assert_eq!(refused(&Program::at("/nowhere")).await, first);
    // What was compiled is not, however it was refused before.
    let compiled = bench.compile(blind_provider(OK_EMPTY)).await;
    let bytes = Bytes::from(blind_provider(OK_EMPTY));
    let again = compile(&Program::at("/nowhere"), bytes, &bench.cache).await;
    assert_eq!(again.unwrap().sha256, compiled.sha256);
}

#[tokio::test]
async fn each_world_is_told_by_its_exports() {
    let bench = bench();
    let blind = bench.compile(blind_provider(OK_EMPTY)).await;
    assert_eq!(
        world_of(&blind.interface, &BTreeSet::new()),
        Ok(World::BlindProvider)
    );
    let seeing = bench.compile(provider(OK_EMPTY)).await;
    assert_eq!(
        world_of(&seeing.interface, &BTreeSet::new()),
        Ok(World::Provider)
    );
    let empty = bench.compile(empty()).await;
    assert_eq!(
        world_of(&empty.interface, &BTreeSet::new()),
        Err(Refusal::NoProvider)
    );
}

#[tokio::test]
async fn what_is_no_component_is_refused() {
    let bench = bench();
    let refused = async |bytes: Vec<u8>| {
        compile(&bench.program, bytes.into(), &bench.cache)
            .await
            .unwrap_err()
    };
    assert!(matches!(refused(module()).await, CompileError::CoreModule));
    for bytes in [
        b"".to_vec(),
        b"#!/bin/sh\n".to_vec(),
        empty()[..6].to_vec(),
        provider(OK_EMPTY)[..900].to_vec(),
    ] {
        let error = refused(bytes).await;
        assert!(
            matches!(error, CompileError::Refused(Failure::NotAComponent(_))),
            "{error:?}"
        );
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
    }
    let huge = vec![0; MAX_COMPONENT as usize + 1];
    assert!(matches!(refused(huge).await, CompileError::TooLarge { .. }));
}

#[tokio::test]
async fn a_component_is_compiled_once_and_again_where_the_cache_is_damaged() {
    let bench = bench();
    let component = Bytes::from(provider(OK_EMPTY));
    let first = compile(&bench.program, component.clone(), &bench.cache)
        .await
        .unwrap();
    // Where no process can be started, only the cache can answer.
    let nowhere = Program::at("/nowhere");
    let second = compile(&nowhere, component.clone(), &bench.cache)
        .await
        .unwrap();
    assert_eq!(
        (first.sha256, first.interface),
        (second.sha256, second.interface)
    );
    let code = std::fs::read_dir(bench.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            path.extension()
                .is_some_and(|extension| extension == "code")
        })
        .unwrap();
    let mut bytes = std::fs::read(&code).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&code, bytes).unwrap();
    assert!(matches!(
        compile(&nowhere, component.clone(), &bench.cache).await,
        Err(CompileError::Process(Error::Start(_)))
    ));
    compile(&bench.program, component.clone(), &bench.cache)
        .await
        .unwrap();
    compile(&nowhere, component.clone(), &bench.cache)
        .await
        .unwrap();
    bench.cache.forget(first.sha256).unwrap();
    assert!(compile(&nowhere, component, &bench.cache).await.is_err());
}

#[tokio::test]
async fn machine_code_of_another_make_is_stale() {
    let bench = bench();
    let file = bench.folder.path().join("foreign");
    for bytes in [&b""[..], b"\x7fELF", &provider(OK_EMPTY)] {
        std::fs::write(&file, bytes).unwrap();
        let file = File::open(&file).unwrap();
        let mut process = Process::start(&bench.program, &Order::Run(run_order()), &file)
            .await
            .unwrap();
        assert_eq!(
            failure(to_the_end(&mut process, no_calls).await),
            Failure::Stale
        );
    }
}

#[tokio::test]
async fn a_sandbox_that_is_killed_is_seen_as_dead() {
    let bench = bench();
    let guest = provider(
        "(call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1)) unreachable",
    );
    let mut process = bench.start(guest, Order::Run(run_order())).await;
    assert!(matches!(process.next().await.unwrap(), Call::Log { .. }));
    signal(process.id(), rustix::process::Signal::KILL);
    match process.next().await {
        Err(Error::Died { status, .. }) => assert_eq!(status.signal(), Some(9)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_dropped_process_is_gone_and_no_zombie() {
    let bench = bench();
    let process = bench
        .start(
            provider("(loop $l (br $l)) unreachable"),
            Order::Run(run_order()),
        )
        .await;
    let folder = format!("/proc/{}", process.id());
    assert!(std::fs::exists(&folder).unwrap());
    drop(process);
    let began = Instant::now();
    while std::fs::exists(&folder).unwrap() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "it is still there"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_sandbox_ends_when_the_other_end_of_its_socket_does() {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    let bench = bench();
    let compiled = bench
        .compile(provider("(loop $l (br $l)) unreachable"))
        .await;
    let (here, there) = UnixStream::pair().unwrap();
    let payload = Payload::create(Payload::TRANSFER_SIZE).unwrap();
    hand_over(&here, &[payload.as_fd(), compiled.file.as_fd()]).unwrap();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_fleecebox"))
        .arg(ARGUMENT)
        .stdin(OwnedFd::from(there))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut socket = Socket::new(here);
    let _: Confinement = socket.receive().unwrap();
    let order = Run {
        limits: GuestLimits {
            cpu_ms: u64::MAX,
            ..limits()
        },
        ..run_order()
    };
    socket.send(&Order::Run(order)).unwrap();
    assert!(matches!(socket.receive().unwrap(), Call::Grow { .. }));
    socket.send(&Answer::Unit).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it should be spinning");
    drop(socket);
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "it goes on without anybody to tell"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn a_running_sandbox_holds_its_socket_and_its_memory_file_and_nothing_else() {
    let bench = bench();
    if !rustix::process::geteuid().is_root() {
        return report::not_shown("only root may see what a sandbox process holds");
    }
    // A careless parent leaves a file open for its children.
    let careless = File::open(env!("CARGO_MANIFEST_DIR")).unwrap();
    rustix::io::fcntl_setfd(&careless, rustix::io::FdFlags::empty()).unwrap();
    let guest = provider(
        "(call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1)) unreachable",
    );
    let mut process = bench.start(guest, Order::Run(run_order())).await;
    assert!(matches!(process.next().await.unwrap(), Call::Log { .. }));
    let proc = std::path::PathBuf::from(format!("/proc/{}", process.id()));
    let held: BTreeSet<String> = std::fs::read_dir(proc.join("fd"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let target = std::fs::read_link(entry.path())
                .unwrap()
                .display()
                .to_string();
            let kind = target
                .split_once(":[")
                .map_or(target.as_str(), |(kind, _)| kind)
                .to_owned();
            match kind.as_str() {
                "pipe" => format!("pipe as {}", entry.file_name().display()),
                _ => kind,
            }
        })
        .collect();
    let expected = [
        "/dev/null",
        "pipe as 2",
        "socket",
        "/memfd:fleecebox-payload (deleted)",
    ];
    assert_eq!(held, expected.map(String::from).into());
    assert_eq!(std::fs::read(proc.join("environ")).unwrap(), b"");
    assert_eq!(
        std::fs::read_link(proc.join("cwd")).unwrap().to_str(),
        Some("/")
    );
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    assert!(
        status.contains(&format!("NSpgid:\t{}\n", process.id())),
        "{status}"
    );
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
}

/// A program that claims to be confined, writes `bytes` to its socket and waits.
fn broken_sandbox(bench: &Bench, bytes: &[u8]) -> Program {
    use std::os::unix::fs::PermissionsExt;
    let greeting = framed(&Confinement { missing: vec![] });
    let bytes = [&greeting, bytes].concat();
    let octal: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
    let path = bench.folder.path().join("broken");
    std::fs::write(
        &path,
        format!("#!/bin/sh\nprintf '{octal}' >&0\nread forever\n"),
    )
    .unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
    Program::at(path)
}

#[tokio::test]
async fn a_sandbox_that_does_not_keep_to_the_protocol_is_caught() {
    let bench = bench();
    let compiled = bench.compile(provider(OK_EMPTY)).await;
    let said = async |bytes: &[u8]| {
        let program = broken_sandbox(&bench, bytes);
        let mut process = Process::start(&program, &Order::Run(run_order()), &compiled.file)
            .await
            .unwrap();
        let folder = format!("/proc/{}", process.id());
        let error = process.next().await.unwrap_err();
        // It is dead before its handle is.
        let state = || std::fs::read_to_string(format!("{folder}/stat")).unwrap_or_default();
        while !state().is_empty() && !state().contains(") Z ") {
            tokio::task::yield_now().await;
        }
        error
    };
    assert!(matches!(
        said(b"\x01\0\0\0\xff").await,
        Error::Socket(SocketError::Malformed)
    ));
    assert!(matches!(
        said(b"\xff\xff\xff\xff").await,
        Error::Socket(SocketError::TooLong { .. })
    ));
    let foreign = framed(&Call::ObjectSize {
        name: "secret".into(),
    });
    assert!(matches!(
        said(&foreign).await,
        Error::Broken(Violation::NotGranted("objects.size"))
    ));
    let much = framed(&Call::Write {
        stream: 0,
        length: MIB + 1,
    });
    assert!(matches!(
        said(&much).await,
        Error::Broken(Violation::TooMuch { .. })
    ));
}

fn framed(message: &impl serde::Serialize) -> Vec<u8> {
    let body = postcard::to_stdvec(message).unwrap();
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Not a test: prints what the sandbox costs. `cargo test --release --test sandbox -- --ignored --nocapture`
#[tokio::test]
#[ignore = "measures, and proves nothing"]
async fn measure() {
    let bench = bench();
    let guest = provider(
        "(call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1)) unreachable",
    );
    bench.compile(guest.clone()).await;
    let (mut whole, mut process_only) = (vec![], vec![]);
    for _ in 0..50 {
        let began = Instant::now();
        let compiled = bench.compile(guest.clone()).await;
        let found = Instant::now();
        let mut process = Process::start(&bench.program, &Order::Run(run_order()), &compiled.file)
            .await
            .unwrap();
        assert!(matches!(process.next().await.unwrap(), Call::Log { .. }));
        process_only.push(found.elapsed());
        whole.push(began.elapsed());
        process.kill().await;
    }
    whole.sort();
    process_only.sort();
    println!(
        "from the component's bytes to its first call, cached: median {:.1?} (of it the process {:.1?}), worst {:.1?}",
        whole[25], process_only[25], whole[49]
    );

    let reads = 4000u32;
    let read_all = |length: u32| {
        provider(&format!(
            "(local $left i32) (local.set $left (i32.const {reads}))
             (loop $again
               (global.set $heap (i32.const 65536))
               (call $read (local.get $reader) (i64.const 0) (i32.const {length}) (i32.const 16))
               (local.set $left (i32.sub (local.get $left) (i32.const 1)))
               (br_if $again (local.get $left)))
             (call $ok (i32.const 0) (i32.const 0))"
        ))
    };
    for length in [4 << 10, 64 << 10, MIB] {
        let data = vec![7u8; length as usize];
        let mut process = bench.start(read_all(length), Order::Run(run_order())).await;
        let began = Instant::now();
        to_the_end(&mut process, |process, _| Answer::Bytes {
            length: process.give_payload(&data).unwrap(),
        })
        .await;
        let took = began.elapsed().as_secs_f64();
        println!(
            "content.read of {:>4} KiB: {:>6.0} MiB/s, {:>5.1} us a call",
            length >> 10,
            f64::from(reads) * f64::from(length) / f64::from(MIB) / took,
            took * 1e6 / f64::from(reads),
        );
    }

    let write = provider(&format!(
        "(local $left i32) (local.set $left (i32.const {reads}))
         (drop (call $alloc (i32.const 0) (i32.const 0) (i32.const 1) (i32.const {MIB})))
         (call $create (local.get $writer) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 32))
         (loop $again
           (call $write (i32.load (i32.const 36)) (i32.const 65536) (i32.const {MIB}) (i32.const 48))
           (local.set $left (i32.sub (local.get $left) (i32.const 1)))
           (br_if $again (local.get $left)))
         (call $ok (i32.const 0) (i32.const 0))"
    ));
    let began = Instant::now();
    bench
        .run(write, Order::Run(run_order()), |process, call| match call {
            Call::Write { length, .. } => {
                process.take_payload(*length).unwrap();
                Answer::Unit
            }
            Call::Create { .. } => Answer::Stream(0),
            _ => Answer::Unit,
        })
        .await;
    let took = began.elapsed().as_secs_f64();
    println!(
        "output-stream.write of 1024 KiB: {:>6.0} MiB/s",
        f64::from(reads) / took
    );
}
