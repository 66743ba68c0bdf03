//! A released version of the contract never changes, but for its comments.

use fleecebox::archive::MAX_BLOCK_SIZE;
use fleecebox::contract::{
    MAX_NAME, MAX_PASSED, MAX_PUT, MAX_READ, MAX_RECEIPT, MAX_TEXT, MAX_WRITE,
};
use std::path::Path;
use wit_component::WitPrinter;
use wit_parser::Resolve;

/// The package in a file, without comments and in one form.
fn words(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../wit")
        .join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    words_of(&text)
}

fn words_of(text: &str) -> String {
    let mut resolve = Resolve::default();
    let package = resolve.push_source("contract.wit", text).unwrap();
    let mut printer = WitPrinter::default();
    printer.emit_docs(false);
    printer.print(&resolve, package, &[]).unwrap();
    printer.output.to_string()
}

#[test]
fn what_was_released_as_0_1_0_is_what_is_built() {
    let released = words("released/provider-0.1.0.wit");
    assert!(released.contains("package fleecebox:provider@0.1.0;"));
    assert_eq!(
        words("provider.wit"),
        released,
        "a change of the contract is a new version, in a file of its own: see wit/README.md"
    );
}

/// Each SDK has a copy, as it is handed out without this checkout.
#[test]
fn every_sdk_has_the_contract_word_by_word() {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let contract = std::fs::read_to_string(checkout.join("wit/provider.wit")).unwrap();
    for copy in ["wit", "c/bindings", "javascript", "python/fleecebox_guest"] {
        let path = checkout.join("guest-sdk").join(copy).join("provider.wit");
        let copied = std::fs::read_to_string(&path).unwrap();
        assert!(copied == contract, "cp wit/provider.wit {}", path.display());
    }
}

#[test]
fn a_case_that_is_added_is_noticed_and_a_comment_is_not() {
    let text = include_str!("../../wit/provider.wit");
    let commented = text.replace(
        "        too-large,",
        "        /// Far too much.\n        too-large,",
    );
    assert_ne!(commented, text);
    assert_eq!(words_of(&commented), words_of(text));
    let added = text.replace(
        "        too-large,",
        "        too-large,\n        too-small,",
    );
    assert_ne!(words_of(&added), words_of(text));
}

/// The contract gives its bounds in words, beside the function that keeps to each. `%` stands for the number.
#[test]
fn every_bound_is_the_one_that_the_contract_names() {
    let lines = include_str!("../../wit/provider.wit").lines();
    let comments = lines.filter_map(|line| line.trim().strip_prefix("/// "));
    let text = comments.collect::<Vec<_>>().join(" ");
    let (kib, mib) = (|bytes: u64| bytes >> 10, |bytes: u64| bytes >> 20);
    for (words, number) in [
        ("power of two, at most % MiB", mib(MAX_BLOCK_SIZE.into())),
        ("`too-large` above % MiB; with `not-dirty`", mib(MAX_PUT)),
        ("or `io`. More than % MiB trap.", mib(MAX_PASSED as u64)),
        ("A plain name has 1 to % bytes", MAX_NAME as u64),
        ("cuts a message at % KiB", kib(MAX_TEXT as u64)),
        (
            "`too-large` above % MiB; or with `io`",
            mib(MAX_READ.into()),
        ),
        (
            "the receipt, is kept with the backup; it has at most % KiB",
            kib(MAX_RECEIPT as u64),
        ),
        (
            "exactly `length` bytes, at most % MiB",
            mib(MAX_READ.into()),
        ),
    ] {
        let said = words.replace('%', &number.to_string());
        assert!(text.contains(&said), "the contract does not say \"{said}\"");
    }
    // These, the least of `max-read` and `max-write`, and how an image is asked are all that it gives in numbers.
    let named = text.matches("KiB").count() + text.matches("MiB").count();
    assert_eq!(
        named, 11,
        "a bound came or went: hold it against its number here"
    );
    assert!(
        text.contains("Largest length that `read` accepts, in bytes: at least 64 KiB")
            && MAX_READ >= 64 << 10
    );
    assert!(
        text.contains("Largest list that `write` accepts, in bytes: at least 64 KiB")
            && MAX_WRITE >= 64 << 10
    );
}
