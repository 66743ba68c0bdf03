//! WASI: nothing of it unless it is granted, and then no more than was.

use crate::*;
use std::time::SystemTime;

/// Prints two and a half lines, sleeps 50 ms, and returns the seconds since 1970, how long it slept, and two random
/// numbers.
const USES_ALL: &str = "(local $slept i64) (local $timer i32)
    (i32.store (i32.const 1024) (i32.const 0x0a216968)) ;; hi!, and the end of the line
    (i32.store (i32.const 1028) (i32.const 0x6c6c6168)) ;; hall
    (call $print (call $stdout) (i32.const 1024) (i32.const 8) (i32.const 1200))
    (call $print (call $stderr) (i32.const 1024) (i32.const 4) (i32.const 1200))
    (call $wall (i32.const 1040))
    (local.set $slept (call $monotonic))
    (local.set $timer (call $timer (i64.const 50000000)))
    (call $block (local.get $timer))
    (call $drop-timer (local.get $timer))
    (i64.store (i32.const 1048) (i64.sub (call $monotonic) (local.get $slept)))
    (i64.store (i32.const 1056) (call $random))
    (i64.store (i32.const 1064) (call $random))
    (call $ok (i32.const 1040) (i32.const 32))";

fn order(parts: &[Wasi]) -> Order {
    Order::Run(Run {
        wasi: parts.iter().copied().collect(),
        ..run_order()
    })
}

fn log(lines: &mut Vec<String>) -> impl FnMut(&Process, &Call) -> Answer {
    |_, call| match call {
        Call::Log { level, message } => {
            lines.push(format!("{level:?} {message}"));
            Answer::Unit
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn granted_parts_work_in_the_confined_process_and_output_goes_to_the_log() {
    for version in ["0.2.0", "0.2.3", "0.2.99"] {
        granted_parts_work(version).await;
    }
}

async fn granted_parts_work(version: &str) {
    let mut lines = Vec::new();
    let component = provider_with_wasi_of(version, USES_ALL, OK_EMPTY);
    let outcome = bench()
        .run(component, order(&Wasi::ALL), log(&mut lines))
        .await;
    let Outcome::Receipt(receipt) = outcome else {
        panic!("{outcome:?}")
    };
    let numbers: Vec<u64> = receipt
        .chunks(8)
        .map(|it| u64::from_le_bytes(it.try_into().unwrap()))
        .collect();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    assert!(now.as_secs().abs_diff(numbers[0]) < 600, "{numbers:?}");
    assert!(numbers[1] >= 50_000_000, "{numbers:?}");
    assert_ne!(numbers[2], numbers[3]);
    assert_eq!(lines, ["Info hi!", "Warn hi!", "Info hall"]);
}

#[tokio::test]
async fn each_part_that_is_not_granted_is_refused_by_name_and_not_even_linked() {
    let bench = bench();
    let component = provider_with_wasi(USES_ALL);
    let compiled = bench.compile(component.clone()).await;
    assert_eq!(wasi_of(&compiled.interface), Wasi::ALL.into());
    let all = BTreeSet::from(Wasi::ALL);
    assert_eq!(world_of(&compiled.interface, &all), Ok(World::Provider));
    for (part, named) in Wasi::ALL
        .into_iter()
        .zip(["wasi:clocks/", "wasi:random/", "wasi:"])
    {
        let others: BTreeSet<Wasi> = all.iter().copied().filter(|it| *it != part).collect();
        let refusal = world_of(&compiled.interface, &others)
            .unwrap_err()
            .to_string();
        assert!(
            refusal.contains(&format!("it imports `{named}")),
            "{refusal}"
        );
        // Somebody tries all the same.
        let others: Vec<_> = others.into_iter().collect();
        let outcome = bench.run(component.clone(), order(&others), no_calls).await;
        assert!(matches!(failure(outcome), Failure::CannotLink(why) if why.contains("wasi:")));
    }
}

#[tokio::test]
async fn what_wasi_forbids_ends_the_provider_with_the_reason() {
    let bench = bench();
    let leaks = "(loop $more (drop (call $timer (i64.const 0))) (br $more)) unreachable";
    let one_too_many = format!(
        "{} {OK_EMPTY}",
        "(drop (call $timer (i64.const 0)))".repeat(129)
    );
    let zeroes = "(call $write-zeroes (call $stdout) (i64.const 4097) (i32.const 16)) unreachable";
    let write_now = "(call $write-now (call $stdout) (i32.const 0) (i32.const 4097) (i32.const 16)) unreachable";
    for (run, reason) in [
        (
            "(call $exit (i32.const 1)) unreachable",
            "it ended itself (wasi:cli/exit) with status 1",
        ),
        (leaks, "more timers and streams at once"),
        (&one_too_many, "more timers and streams at once"),
        (
            "(call $random-bytes (i64.const 65537) (i32.const 16)) unreachable",
            "requested len 65537 exceeds limit 65536",
        ),
        (
            "(call $print (call $stdout) (i32.const 0) (i32.const 4097) (i32.const 16)) unreachable",
            "expected at most 4096",
        ),
        (write_now, "wrote 4097 bytes at once"),
        (zeroes, "cannot write more zeroes"),
        (
            "(call $poll (i32.const 0) (i32.const 0) (i32.const 16)) unreachable",
            "empty poll list",
        ),
    ] {
        let component = provider_with_wasi(run);
        let outcome = bench.run(component, order(&Wasi::ALL), no_calls).await;
        let Failure::Trapped(why) = failure(outcome) else {
            panic!("{run}")
        };
        assert!(why.contains(reason), "{why}");
    }
}

#[tokio::test]
async fn the_most_that_wasi_allows_is_allowed() {
    let bench = bench();
    for (run, lines) in [
        ("(call $timer (i64.const 0)) drop".repeat(128), 0),
        (
            "(call $random-bytes (i64.const 65536) (i32.const 16))".into(),
            0,
        ),
        (
            // Without an end of the line: the messages are as long as one may be.
            "(call $print (call $stdout) (i32.const 65536) (i32.const 4096) (i32.const 16))".into(),
            4096_usize.div_ceil(fleecebox::contract::MAX_TEXT),
        ),
    ] {
        let component = provider_with_wasi(&format!("{run} {OK_EMPTY}"));
        let mut said = Vec::new();
        let outcome = bench
            .run(component, order(&Wasi::ALL), log(&mut said))
            .await;
        assert!(matches!(outcome, Outcome::Receipt(_)), "{outcome:?}");
        assert_eq!(said.len(), lines, "{said:?}");
    }
}

#[tokio::test]
async fn a_guest_that_sleeps_is_not_charged() {
    let order = Order::Run(Run {
        wasi: Wasi::ALL.into(),
        limits: GuestLimits {
            cpu_ms: 200,
            ..limits()
        },
        ..run_order()
    });
    let run = format!("(call $block (call $timer (i64.const 500000000))) {OK_EMPTY}");
    let began = Instant::now();
    let outcome = bench().run(provider_with_wasi(&run), order, no_calls).await;
    assert!(matches!(outcome, Outcome::Receipt(_)), "{outcome:?}");
    assert!(began.elapsed() >= Duration::from_millis(500));
}

/// Waits for the first of two timers, one of two hours and one of one, and returns how many were due, which, what time
/// it is, how long ago it began, and a random number.
const SLEEPS: &str = "(local $two i32) (local $one i32)
    (local.set $two (call $timer (i64.const 7200000000000)))
    (local.set $one (call $timer (i64.const 3600000000000)))
    (i32.store (i32.const 1024) (local.get $two))
    (i32.store (i32.const 1028) (local.get $one))
    (call $poll (i32.const 1024) (i32.const 2) (i32.const 1032))
    (i64.store (i32.const 1048) (i64.extend_i32_u (i32.load (i32.const 1036))))
    (i64.store (i32.const 1056) (i64.extend_i32_u (i32.load (i32.load (i32.const 1032)))))
    (call $drop-timer (local.get $two))
    (call $drop-timer (local.get $one))
    (call $wall (i32.const 1064))
    (i64.store (i32.const 1072) (call $monotonic))
    (i64.store (i32.const 1080) (call $random))
    (call $ok (i32.const 1048) (i32.const 40))";

#[tokio::test]
async fn in_an_image_clocks_stand_but_for_sleeping_and_chance_is_the_backups() {
    let bench = bench();
    let component = provider_with_wasi_of("0.2.0", OK_EMPTY, SLEEPS);
    let began = Instant::now();
    let read = async |seed: u8| -> Vec<[u64; 5]> {
        let order = Order::OpenImage(OpenImage {
            wasi: Wasi::ALL.into(),
            limits: limits(),
            context: context(),
            receipt: vec![],
            max_read: MIB,
            still: Still {
                seconds: 1_800_000_000,
                seed: [seed; 32],
            },
        });
        let mut process = bench.start(component.clone(), order).await;
        let opened = to_the_end(&mut process, no_calls).await;
        assert!(matches!(opened, Outcome::Opened), "{opened:?}");
        let mut all = Vec::new();
        for _ in 0..3 {
            // A clock that does not stand would show that it is later.
            std::thread::sleep(Duration::from_millis(20));
            let (offset, length) = (0, 40);
            process.read_image(ImageRead { offset, length }).unwrap();
            let outcome = to_the_end(&mut process, no_calls).await;
            assert!(
                matches!(outcome, Outcome::Bytes { length: 40 }),
                "{outcome:?}"
            );
            let bytes = process.take_payload(40).unwrap();
            let number = |at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            all.push([0, 8, 16, 24, 32].map(number));
        }
        process.kill().await;
        all
    };
    let first = read(1).await;
    for (hour, [due, which, wall, monotonic, _]) in (1..).zip(&first) {
        assert_eq!((*due, *which), (1, 1));
        assert_eq!(*wall, 1_800_000_000 + hour * 3600);
        assert_eq!(*monotonic, hour * 3_600_000_000_000);
    }
    assert_eq!(read(1).await, first);
    let other = read(2).await;
    assert!(
        first
            .iter()
            .zip(&other)
            .all(|(one, other)| one[..4] == other[..4] && one[4] != other[4])
    );
    assert!(began.elapsed() < Duration::from_secs(600));
}
