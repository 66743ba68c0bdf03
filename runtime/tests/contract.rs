//! A released version of the contract never changes, but for its comments.

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
