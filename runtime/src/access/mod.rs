//! A volume of a backup that is read at any place: what the host can say of it alone, from the block table and the archive.
//!
//! - [`Image`]: from a range to the pieces that make it up, and which of them are zero;
//! - [`Placed`]: the bytes of a piece that the host placed, compared with their digests;
//! - [`Kept`]: what was read last, within a bound.
//!
//! What a provider claimed is only named here. Who asks for it is the job, through the grants.

mod image;
mod kept;
mod placed;

pub use image::{Allocation, Image, Piece};
pub use kept::Kept;
pub use placed::{Placed, PlacedError};
