//! Fleecebox backs up running QEMU virtual machines through WebAssembly providers that nobody has to trust.

#![deny(missing_docs)]

pub mod archive;
pub mod channel;
pub mod cli;
pub mod config;
pub mod digest;
pub mod extent;
pub mod grants;
pub mod job;
pub mod nbd;
pub mod policy;
pub mod qemu;
pub mod sandbox;
pub mod volume;
