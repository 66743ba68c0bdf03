//! The conformance kit: what is honest passes, and every planted mistake is found and named.

use std::fs;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Outcome, Site, component};
use serde_json::Value;

/// `fleecebox provider test --json` on a component of that name.
fn kit(site: &Site, provider: &str, more: &[&str]) -> Result<Outcome> {
    let file = component(provider)?;
    let command = site.command(&["provider", "test", "--json", "--seed", "1"]);
    let command = more
        .iter()
        .fold(command.arg(file), |it, word| it.arg(*word));
    command.run()
}

fn cases(report: &Value) -> Result<&Vec<Value>> {
    report["cases"].as_array().context("no cases")
}

fn passes(provider: &str, needs: &Value, not_tried: &[&str]) -> Result<()> {
    let site = Site::new()?;
    let outcome = kit(&site, provider, &[])?.assert_success();
    let report = outcome.document()?;
    ensure!(report["passed"] == true, "{report:#}");
    let all = cases(&report)?;
    ensure!(all.len() == 13, "{report:#}");
    for case in all {
        let name = case["case"].as_str().context("a case without a name")?;
        let expected = match not_tried.contains(&name) {
            true => "not-tried",
            false => "passed",
        };
        ensure!(case["result"] == expected, "{case:#}");
    }
    let found = &report["needs"];
    for (name, need) in needs.as_object().context("an object")? {
        ensure!(found[name] == *need, "{name}: {found:#}");
    }
    Ok(())
}

#[test]
fn chunked_passes_and_needs_nothing_optional() -> Result<()> {
    let needs = serde_json::json!({"world": "blind-provider", "reader": "unused", "discarder": "unused", "objects": 0});
    passes("chunked", &needs, &["any-order", "failing-restore"])
}

#[test]
fn image_passes_and_needs_to_read() -> Result<()> {
    let needs = serde_json::json!({"world": "provider", "reader": "required", "discarder": "unused", "objects": 1});
    passes("image", &needs, &[])
}

/// One test for each: the component, the case that has to find its mistake, and the words that name it.
macro_rules! planted {
    ($($sentence:ident: $component:literal, $case:literal, $says:literal;)*) => {
        $(
            #[test]
            fn $sentence() -> Result<()> {
                is_named($component, $case, $says)
            }
        )*
    };
}

planted! {
    a_short_last_block_that_is_skipped: "skips-the-last-short-block", "full", "skips the last short block";
    two_volumes_that_are_mixed_up: "mixes-up-two-volumes", "full", "mixes up two volumes";
    a_claim_that_is_forgotten: "forgets-a-claim", "full", "forgets a claim";
    a_byte_that_is_corrupted_in_restore: "corrupts-one-byte-in-restore", "full", "corrupts one byte";
    a_stream_that_leaks: "leaks-a-stream", "full", "leaks a stream";
    an_order_of_calls_that_is_relied_on: "depends-on-call-order", "any-order", "depends on call order";
    a_state_that_is_kept_between_instances: "keeps-state-between-instances", "full", "keeps state between instances";
    a_name_that_two_volumes_use: "names-objects-by-a-counter", "full", "both create an object named 'object-0'";
    an_error_that_is_swallowed: "swallows-errors", "failing-calls", "`writer.put` failed with `io`, `run` returned success";
    an_error_that_traps: "traps-on-errors", "failing-calls", "`reader.read` failed with `io`, it trapped";
    a_handle_that_is_taken_for_granted: "traps-on-errors", "grants", "without a reader, it trapped";
    a_limit_that_traps: "traps-on-errors", "limits", "output-bytes, it trapped";
    a_cancel_that_is_not_heard: "never-gives-up", "cancelled", "more calls before it returned";
    a_cancel_in_the_midst_of_a_call_that_is_not_heard: "never-gives-up", "cancelled", "midst of call 1, `run` made";
    a_cancel_in_the_midst_of_a_call_that_traps: "traps-on-errors", "cancelled", "midst of call 1, it trapped";
    a_name_that_is_too_long: "names-an-object-at-length", "full", "nnn\")` failed with `invalid-name`";
    a_receipt_that_is_too_long: "returns-more-than-a-receipt", "full", "the receipt has 65537 bytes, more than 65536";
    a_claim_without_bytes: "claims-without-bytes", "full", "the bytes were here a moment ago";
    a_trap: "traps-half-way", "full", "trapped";
}

fn is_named(provider: &str, case: &str, says: &str) -> Result<()> {
    let site = Site::new()?;
    let outcome = kit(&site, provider, &["--only", case])?;
    ensure!(outcome.code() == Some(1), "{}", outcome.stderr);
    let report = outcome.document()?;
    ensure!(report["passed"] == false, "{report:#}");
    let [only] = &cases(&report)?[..] else {
        anyhow::bail!("{report:#}");
    };
    ensure!(
        only["case"] == case && only["result"] == "failed",
        "{only:#}"
    );
    let mistakes = only["mistakes"].as_array().context("no mistakes")?;
    let named = |it: &Value| it["what"].as_str().is_some_and(|what| what.contains(says));
    ensure!(mistakes.iter().any(named), "{says:?}: {only:#}");
    for mistake in mistakes {
        for field in ["what", "means", "remedy"] {
            let words = mistake[field].as_str().unwrap_or_default();
            ensure!(!words.is_empty() && !words.contains('\n'), "{mistake:#}");
        }
    }
    Ok(())
}

#[test]
fn a_mistake_is_told_with_what_it_means_and_what_to_do() -> Result<()> {
    let site = Site::new()?;
    let file = component("skips-the-last-short-block")?;
    let command = site.command(&["provider", "test", "--seed", "1"]).arg(file);
    let outcome = command.run()?;
    ensure!(outcome.code() == Some(1), "{}", outcome.stderr);
    let table = &outcome.stdout;
    for part in [
        "full",
        "FAILED",
        "skips the last short block",
        "means: ",
        "do: ",
        "not tried",
    ] {
        ensure!(table.contains(part), "{part:?}:\n{table}");
    }
    ensure!(outcome.stderr.lines().count() == 1, "{}", outcome.stderr);
    ensure!(
        outcome.stderr.contains("--seed 1 tries the same again"),
        "{}",
        outcome.stderr
    );
    Ok(())
}

#[test]
fn a_file_that_is_no_provider_is_refused() -> Result<()> {
    let site = Site::new()?;
    let file = site.path("text.wasm");
    fs::write(&file, "no component")?;
    let command = site.command(&["provider", "test"]).arg(&file);
    command.run()?.assert_refused(2, "text.wasm");
    let file = component("imports-a-socket")?;
    let command = site.command(&["provider", "test"]).arg(file);
    command.run()?.assert_refused(2, "socket");
    Ok(())
}

#[test]
fn what_was_built_against_0_1_still_passes() -> Result<()> {
    let site = Site::new()?;
    for name in ["chunked", "image"] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kept/0.1");
        let file = folder.join(format!("{name}.wasm"));
        let command = site.command(&["provider", "test", "--seed", "1"]);
        command.arg(file).run()?.assert_success();
    }
    Ok(())
}
