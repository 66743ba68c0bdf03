//! Write a Fleecebox backup provider in Rust.
//!
//! A provider backs up one volume per call. It is handed a few capabilities and reaches nothing else; the host moves
//! the bytes, remembers where each block is, and proves the backup before it counts. There are two kinds:
//!
//! - a [`BlindProvider`] arranges what the host stores and cannot see a byte of the disk. Most providers are best
//!   blind: they are as fast as the host, and there is nothing to restore, because the host does it by itself;
//! - a [`Provider`] reads the bytes, writes them in a form of its own, *claims* the ranges that it holds, and gives
//!   them back through its [`Image`].
//!
//! A whole blind provider, which keeps each volume's changes as one object:
//!
//! ```
//! use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};
//!
//! struct Mirror;
//!
//! impl BlindProvider for Mirror {
//!     fn run(
//!         job: Context,
//!         volume: BlindVolume,
//!         archive: Archive,
//!         _base: Option<Vec<u8>>,
//!     ) -> Result<Vec<u8>, Error> {
//!         let mut object = archive.create(&volume.snapshot.info().name, Encoding::Zstd)?;
//!         for run in volume.dirty.data_runs() {
//!             object.splice(&volume.snapshot, run?)?;
//!         }
//!         let size = object.finish()?;
//!         job.info(format_args!("stored {size} bytes"));
//!         Ok(Vec::new())
//!     }
//! }
//!
//! fleecebox_guest::export_blind!(Mirror);
//! ```
//!
//! It is a crate of type `cdylib`, built for `wasm32-unknown-unknown`; `guest-sdk/wasm-std.sh` sets that target up.
//! Natively, plain `cargo test` runs a provider against a host in memory, [`mock`]. The contract itself, with the rules
//! for ranges and names, is `wit/provider.wit`.

#![deny(unsafe_code)]

mod archive;
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod bindings;
mod context;
mod error;
#[doc(hidden)]
pub mod export;
mod extent;
#[cfg(not(target_arch = "wasm32"))]
pub mod mock;
mod objects;
mod provider;
mod runs;
mod volume;

#[cfg(target_arch = "wasm32")]
use bindings::imports;
#[cfg(not(target_arch = "wasm32"))]
use mock::imports;

pub use archive::{Archive, Encoding, MAX_PUT, OutputStream};
pub use context::{Context, Level};
pub use error::{Error, Quota};
pub use extent::{Extent, Pieces};
pub use objects::{Objects, StoredObject};
pub use provider::{BlindProvider, BlindVolume, Image, Provider, Volume};
pub use runs::DataRuns;
pub use volume::{
    BitmapMode, DirtyRegions, Discarder, Reader, Region, RegionKind, Snapshot, VolumeInfo,
};
