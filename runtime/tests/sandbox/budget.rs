//! What the processes of a job use together.

use crate::*;

/// Grows by 40 MiB, asks for something that does not end until it is answered, and returns.
const GROWS: &str = "(if (i32.eq (memory.grow (i32.const 640)) (i32.const -1)) (then unreachable))
    (call $log (local.get $job) (i32.const 0) (i32.const 0) (i32.const 1))
    (call $ok (i32.const 0) (i32.const 0))";

#[tokio::test]
async fn memory_is_counted_over_all_that_run_and_comes_back_when_one_ends() {
    let bench = bench();
    let program = bench
        .program
        .clone()
        .within(Budget::new(64 << 20, Duration::from_secs(60)));
    let compiled = bench.compile(provider(GROWS)).await;
    let order = Order::Run(run_order());
    let start = || Process::start(&program, &order, &compiled.file);
    let mut first = start().await.unwrap();
    assert!(matches!(first.next().await.unwrap(), Call::Log { .. }));
    let mut second = start().await.unwrap();
    let outcome = to_the_end(&mut second, no_calls).await;
    assert_eq!(failure(outcome), Failure::Memory);
    drop(second);
    first.kill().await;
    let mut third = start().await.unwrap();
    let outcome = to_the_end(&mut third, |_, _| Answer::Unit).await;
    assert!(matches!(outcome, Outcome::Receipt(_)), "{outcome:?}");
}

#[tokio::test]
async fn processor_time_is_counted_over_all_that_ever_ran() {
    let bench = bench();
    let budget = Budget::new(64 << 20, Duration::from_secs(1));
    let program = bench.program.clone().within(budget);
    let spins = bench
        .compile(provider("(loop $l (br $l)) unreachable"))
        .await;
    let order = Order::Run(Run {
        limits: GuestLimits {
            // Each alone could go on for long.
            cpu_ms: 100_000,
            ..limits()
        },
        ..run_order()
    });
    let spin = async || {
        let mut process = Process::start(&program, &order, &spins.file).await.unwrap();
        let ended = process.next().await;
        assert!(matches!(&ended, Err(Error::CpuTime { .. })), "{ended:?}");
    };
    tokio::join!(spin(), spin());
    // Nothing is left for another one.
    spin().await;
}
