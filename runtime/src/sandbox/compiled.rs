//! Loading machine code. The one place in Fleecebox that needs `unsafe`.

use super::engine;
use crate::channel::Failure;
use rustix::fs::fstat;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use wasmtime::component::Component;
use wasmtime::{Engine, Precompiled};

/// Serialises a component for [`load`].
pub(super) fn compile(component: &[u8]) -> Result<(Component, Vec<u8>), wasmtime::Error> {
    let component = Component::from_binary(&engine::engine()?, component)?;
    let bytes = component.serialize()?;
    Ok((component, bytes))
}

/// Loads what [`compile`] made, and closes the file: the provider's code never runs beside an open one.
///
/// The bytes are copied out of the file. A mapping would be faster for very large components, but it would keep the
/// file open, and the cache with it within reach of a broken sandbox.
pub(super) fn load(engine: &Engine, file: OwnedFd) -> Result<Component, Failure> {
    let file = File::from(file);
    let bytes = read(&file).map_err(|_| Failure::Stale)?;
    if Engine::detect_precompiled(&bytes) != Some(Precompiled::Component) {
        return Err(Failure::Stale);
    }
    // SAFETY: The bytes must have been made by wasmtime's own compiler. They come from the job process, which takes
    // them from its private cache after comparing them with the digest that it noted when a sandbox process made
    // them. Should that process have been broken by a hostile component, then these bytes are hostile code, and
    // this process holds nothing that the contract does not give such code anyway: that is why both are separate
    // processes. Another version, configuration or kind of processor is found by wasmtime and refused.
    #[allow(unsafe_code)]
    let component = unsafe { Component::deserialize(engine, &bytes) };
    component.map_err(|_| Failure::Stale)
}

/// The whole file, without moving the position that it shares with the job process.
fn read(file: &File) -> std::io::Result<Vec<u8>> {
    // Not by std, which asks with a call that also takes paths.
    let length = fstat(file)?.st_size;
    let mut bytes = vec![0; usize::try_from(length).map_err(std::io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
