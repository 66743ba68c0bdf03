//! The disks of a VM that is not there: bytes in memory, with holes and dirty bitmaps, exported as of a point in time by
//! a real NBD server. So a provider is tried through the very code of a real job, without QEMU.
//!
//! What a disk here does follows QEMU's rules as far as a backup can see them:
//! - [`Disk`]: a bitmap follows writes until it is stopped; the point in time stops one and starts another; a failed
//!   backup merges them again;
//! - [`Export`]: reads as of the point in time, tells holes and dirty ranges, and forgets what is trimmed;
//! - [`Server`]: the protocol, structured replies and all, on a unix socket.

mod disk;
mod server;
#[cfg(test)]
mod tests;

pub use disk::{Disk, Export, Switch};
pub use server::Server;
