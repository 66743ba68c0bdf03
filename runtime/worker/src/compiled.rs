//! Loading machine code. The one place in Fleecebox that needs `unsafe`.

use super::engine;
use fleecebox_channel::Failure;
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
/// The file is mapped where that works, so that a component of 35 MB, such as a whole Python, costs only the pages that
/// it comes to use. Else it is copied: on a file system that forbids execution, for one.
pub(super) fn load(engine: &Engine, file: OwnedFd) -> Result<Component, Failure> {
    let file = File::from(file);
    if let Some(component) = mapped(engine, &file) {
        return Ok(component);
    }
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

/// Loads the component from pages that it shares with the file, for as long as the process lives.
#[cfg(target_arch = "x86_64")]
fn mapped(engine: &Engine, file: &File) -> Option<Component> {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    let length = usize::try_from(fstat(file).ok()?.st_size).ok()?;
    // SAFETY: A mapping at an address of the kernel's choice touches no memory of anybody's.
    #[allow(unsafe_code)]
    let start = unsafe {
        mmap(
            std::ptr::null_mut(),
            length,
            ProtFlags::READ,
            MapFlags::PRIVATE,
            file,
            0,
        )
    };
    let start = std::ptr::NonNull::new(start.ok()?.cast::<u8>())?;
    let memory = std::ptr::NonNull::slice_from_raw_parts(start, length);
    // SAFETY: It was just mapped, readable and as long as the file, and it is never unmapped. Nobody changes the file:
    // the cache replaces files whole.
    #[allow(unsafe_code)]
    let bytes = unsafe { memory.as_ref() };
    if Engine::detect_precompiled(bytes) != Some(Precompiled::Component) {
        return None;
    }
    // SAFETY: As in `load`, and see above.
    #[allow(unsafe_code)]
    let component = unsafe { Component::deserialize_raw(engine, memory) };
    component.ok()
}

/// Other processors have to be told of new code, which wasmtime does for memory of its own.
#[cfg(not(target_arch = "x86_64"))]
fn mapped(_: &Engine, _: &File) -> Option<Component> {
    None
}

/// Makes pages executable that wasmtime does not own: those of [`mapped`]. None of them is ever writable again.
#[cfg(target_arch = "x86_64")]
pub(super) struct Publisher;

#[cfg(target_arch = "x86_64")]
impl wasmtime::CustomCodeMemory for Publisher {
    fn required_alignment(&self) -> usize {
        // This processor's smallest pages, in bytes.
        4096
    }

    fn publish_executable(&self, start: *const u8, length: usize) -> wasmtime::Result<()> {
        use rustix::mm::{MprotectFlags, mprotect};
        let flags = MprotectFlags::READ | MprotectFlags::EXEC;
        // SAFETY: wasmtime names the pages of machine code that it is about to use, and nobody writes to them.
        #[allow(unsafe_code)]
        let published = unsafe { mprotect(start.cast_mut().cast(), length, flags) };
        Ok(published?)
    }

    fn unpublish_executable(&self, start: *const u8, length: usize) -> wasmtime::Result<()> {
        use rustix::mm::{MprotectFlags, mprotect};
        let flags = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: wasmtime says that none of this code runs any more, and frees the pages.
        #[allow(unsafe_code)]
        let unpublished = unsafe { mprotect(start.cast_mut().cast(), length, flags) };
        Ok(unpublished?)
    }
}

/// The whole file, without moving the position that it shares with the job process.
fn read(file: &File) -> std::io::Result<Vec<u8>> {
    // Not by std, which asks with a call that also takes paths.
    let length = fstat(file)?.st_size;
    let mut bytes = vec![0; usize::try_from(length).map_err(std::io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
