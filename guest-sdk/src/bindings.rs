//! What wit-bindgen makes of `wit/provider.wit`. No part of the SDK's interface; the export macros need it public.

#![allow(missing_docs, unsafe_code, unreachable_pub, clippy::all)]

pub mod sighted {
    wit_bindgen::generate!({
        path: "wit",
        world: "provider",
        pub_export_macro: true,
        default_bindings_module: "fleecebox_guest::bindings::sighted",
    });
}

pub mod blind {
    wit_bindgen::generate!({
        path: "wit",
        world: "blind-provider",
        pub_export_macro: true,
        default_bindings_module: "fleecebox_guest::bindings::blind",
        // The imports are the same in both worlds, so that one set of wrappers serves both.
        with: {
            "fleecebox:provider/types@0.1.0": crate::bindings::sighted::fleecebox::provider::types,
            "fleecebox:provider/volume@0.1.0": crate::bindings::sighted::fleecebox::provider::volume,
            "fleecebox:provider/archive@0.1.0": crate::bindings::sighted::fleecebox::provider::archive,
            "fleecebox:provider/job@0.1.0": crate::bindings::sighted::fleecebox::provider::job,
        },
    });
}

pub use blind::exports::fleecebox::provider as blind_exports;
pub use sighted::exports::fleecebox::provider as sighted_exports;
pub use sighted::fleecebox::provider as imports;
