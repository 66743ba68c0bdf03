//! The C SDK's bindings, which are checked in so that no author needs their generator, are what it makes of the contract.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use wit_bindgen_c::{Enabled, Opts};
use wit_bindgen_core::Files;
use wit_bindgen_core::wit_parser::Resolve;

#[test]
fn the_bindings_for_c_are_what_their_generator_makes_of_the_contract() -> Result<()> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let bindings = checkout.join("guest-sdk/c/bindings");
    for world in ["provider", "blind-provider"] {
        let mut resolve = Resolve::default();
        let contract = std::fs::read_to_string(checkout.join("wit/provider.wit"))?;
        let package = resolve.push_source("provider.wit", &contract)?;
        let id = resolve.select_world(&[package], Some(world))?;
        // The options of the command in the bindings' page.
        let options = Opts {
            rename_world: Some("fleecebox".into()),
            autodrop_borrows: Enabled::Yes,
            ..Opts::default()
        };
        let mut files = Files::default();
        options.build().generate(&mut resolve, id, &mut files)?;
        let mut made = 0;
        for (name, bytes) in files.iter() {
            let path = bindings.join(world).join(name);
            let held = std::fs::read(&path).with_context(|| format!("{path:?}"))?;
            ensure!(
                held == bytes,
                "guest-sdk/c/bindings/{world}/{name} is not what wit-bindgen makes of the contract: see bindings/README.md"
            );
            made += 1;
        }
        ensure!(
            made == 3,
            "{made} files, and a header, a source and an object were expected"
        );
    }
    Ok(())
}
