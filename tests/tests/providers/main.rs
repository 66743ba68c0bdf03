//! What authors of providers are given: the kit, the SDKs and their mocks, projects, recordings, registries.

mod c_bindings;
mod conformance;
mod languages;
mod mocks;
mod new_provider;
mod recording;
mod registry;
