//! Between the traits that an author writes and those that wit-bindgen generates.

use std::marker::PhantomData;

use crate::{BlindProvider, Provider};

/// Makes a component of a [`Provider`]. Once per crate.
#[macro_export]
macro_rules! export {
    ($provider:ty) => {
        const _: () = {
            // Names the bound where a native build can check it, too.
            type Component = $crate::export::Sighted<$provider>;
            // Symbols such as `fleecebox:provider/backup@0.1.0#run` mean something only to WebAssembly's linker.
            #[cfg(target_arch = "wasm32")]
    $crate::bindings::sighted::export!(Component with_types_in $crate::bindings::sighted);
            $crate::export::Sighted::<$provider>::CHECKED
        };
    };
}

/// Makes a component of a [`BlindProvider`]. Once per crate.
#[macro_export]
macro_rules! export_blind {
    ($provider:ty) => {
        const _: () = {
            type Component = $crate::export::Blind<$provider>;
            #[cfg(target_arch = "wasm32")]
    $crate::bindings::blind::export!(Component with_types_in $crate::bindings::blind);
            $crate::export::Blind::<$provider>::CHECKED
        };
    };
}

/// Exports a [`Provider`].
pub struct Sighted<P>(PhantomData<P>);

impl<P: Provider> Sighted<P> {
    /// Exists if `P` can be exported, so that a native build finds out too.
    pub const CHECKED: () = ();
}

/// Exports a [`BlindProvider`].
pub struct Blind<P>(PhantomData<P>);

impl<P: BlindProvider> Blind<P> {
    /// Exists if `P` can be exported, so that a native build finds out too.
    pub const CHECKED: () = ();
}

#[cfg(target_arch = "wasm32")]
mod component {
    use std::cell::RefCell;

    use super::{Blind, Sighted};
    use crate::bindings::{blind_exports, imports, sighted_exports};
    use crate::{
        Archive, BlindProvider, BlindVolume, Context, DirtyRegions, Discarder, Image, Objects,
        Provider, Reader, Snapshot, Volume,
    };

    impl<P: Provider> sighted_exports::backup::Guest for Sighted<P> {
        fn run(
            job: imports::job::Context,
            volume: sighted_exports::backup::Grant,
            archive: imports::archive::Writer,
            base: Option<Vec<u8>>,
        ) -> Result<Vec<u8>, imports::types::ErrorCode> {
            let volume = Volume {
                snapshot: Snapshot::new(volume.snapshot),
                dirty: DirtyRegions::new(volume.dirty),
                reader: volume.reader.map(Reader::new),
                discarder: volume.discarder.map(Discarder::new),
            };
            Ok(P::run(
                Context::new(job),
                volume,
                Archive::new(archive),
                base,
            )?)
        }
    }

    impl<P: Provider> sighted_exports::restore::Guest for Sighted<P> {
        type Image = OpenImage<P::Image>;
    }

    /// Exports an [`Image`]. The cell is never borrowed twice: a component is not entered while it runs.
    pub struct OpenImage<I>(RefCell<I>);

    impl<I: Image> sighted_exports::restore::GuestImage for OpenImage<I> {
        fn open(
            job: imports::job::Context,
            objects: imports::stored::Objects,
            receipt: Vec<u8>,
        ) -> Result<sighted_exports::restore::Image, imports::types::ErrorCode> {
            let image = I::open(Context::new(job), Objects::new(objects), receipt)?;
            Ok(sighted_exports::restore::Image::new(OpenImage(
                RefCell::new(image),
            )))
        }

        fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, imports::types::ErrorCode> {
            Ok(self.0.borrow_mut().read(offset, length)?)
        }
    }

    impl<P: BlindProvider> blind_exports::blind_backup::Guest for Blind<P> {
        fn run(
            job: imports::job::Context,
            volume: blind_exports::blind_backup::Grant,
            archive: imports::archive::Writer,
            base: Option<Vec<u8>>,
        ) -> Result<Vec<u8>, imports::types::ErrorCode> {
            let volume = BlindVolume {
                snapshot: Snapshot::new(volume.snapshot),
                dirty: DirtyRegions::new(volume.dirty),
                discarder: volume.discarder.map(Discarder::new),
            };
            Ok(P::run(
                Context::new(job),
                volume,
                Archive::new(archive),
                base,
            )?)
        }
    }
}
