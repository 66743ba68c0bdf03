//! The contract's two worlds. What both import is generated once, so that one set of stubs serves both.

pub(super) mod provider {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "provider",
        imports: { default: trappable },
        exports: { default: async },
        trappable_error_type: {
            "fleecebox:provider/types.error-code" => crate::stubs::Refused,
        },
    });
}

pub(super) mod blind {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "blind-provider",
        imports: { default: trappable },
        exports: { default: async },
        with: {
            "fleecebox:provider/types": super::provider::fleecebox::provider::types,
            "fleecebox:provider/volume": super::provider::fleecebox::provider::volume,
            "fleecebox:provider/archive": super::provider::fleecebox::provider::archive,
            "fleecebox:provider/job": super::provider::fleecebox::provider::job,
        },
    });
}

pub(super) use provider::fleecebox::provider::{archive, content, job, stored, types, volume};
