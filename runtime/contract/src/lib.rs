//! What all rooms stand on: the words and bounds of the contract with providers, each once, and the few values that both
//! sides of every boundary count in.
//!
//! - [`World`], [`Encoding`], [`ErrorCode`] and the other words of `wit/provider.wit`
//! - `MAX_READ` and the other bounds: how much passes at once
//! - [`world_of`]: which world a component is for, decided from names alone
//! - [`extent`]: ranges of bytes, and sets of them, that cannot be wrong
//! - [`digest`]: what names a block's bytes
//! - [`buffer`]: large memory that is used again
//! - [`terminal`]: text of others, made harmless
//! - [`with_causes`]: what an error says, with its causes
//!
//! It does nothing: no files, no sockets, no processes, no time.

#![deny(missing_docs)]

mod bounds;
pub mod buffer;
mod causes;
pub mod digest;
pub mod extent;
pub mod terminal;
mod words;
mod worlds;

pub use bounds::*;
pub use causes::with_causes;
pub use words::*;
pub use worlds::{BACKUP, BLIND_BACKUP, Interface, RESTORE, Refusal, wasi_of, world_of};
