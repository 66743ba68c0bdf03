//! The bytes of a component, as they go through the compiler.
//!
//! What must hold: no panic; what compiles can be loaded; the names that come out fit in a message; and what is let run
//! imports nothing but the contract.

#![no_main]

use fleecebox::channel::Failure;
use fleecebox::contract::world_of;
use fleecebox_worker::compile_here;
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeSet;

fuzz_target!(|component: &[u8]| {
    match compile_here(component) {
        Err(failure) => {
            assert_ne!(
                failure,
                Failure::Stale,
                "what was compiled cannot be loaded"
            );
            assert!(!failure.to_string().contains('\n'), "{failure}");
        }
        Ok(interface) => {
            let names = interface.imports.iter().chain(&interface.exports);
            assert!(names.map(|name| name.len() + 1).sum::<usize>() <= 64 << 10);
            if world_of(&interface, &BTreeSet::new()).is_ok() {
                let granted = |name: &String| name.starts_with("fleecebox:provider/");
                assert!(interface.imports.iter().all(granted), "{interface:?}");
            }
        }
    }
});
