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
    let mut lines = Vec::new();
    let outcome = bench()
        .run(
            provider_with_wasi(USES_ALL),
            order(&Wasi::ALL),
            log(&mut lines),
        )
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
    for (run, reason) in [
        ("(call $exit (i32.const 1)) unreachable", "it ended itself"),
        (leaks, "more than 64 timers"),
        (
            "(call $random-bytes (i64.const 65537) (i32.const 16)) unreachable",
            "asked for 65537 random bytes",
        ),
        (
            "(call $print (call $stdout) (i32.const 0) (i32.const 4097) (i32.const 16)) unreachable",
            "wrote 4097 bytes at once",
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
