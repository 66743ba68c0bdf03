//! The text of a configuration.
//!
//! What must hold: no panic; an error names the file; what is accepted can be looked up by its names.

#![no_main]

use fleecebox::policy;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|text: &str| {
    match policy::parse(text, Path::new("some.toml")) {
        Ok(config) => {
            for name in config.archive.keys() {
                assert!(config.archive(name).is_ok());
            }
            for name in config.provider.keys() {
                let (found, _) = config.provider(name).expect("it is there by that name");
                assert_eq!(&found, name);
            }
            let _ = config.archive(text);
            let _ = config.provider(text);
        }
        Err(error) => {
            let message = error.to_string();
            assert!(
                message.contains("some.toml") && !message.contains('\n'),
                "{message}"
            );
        }
    }
});
