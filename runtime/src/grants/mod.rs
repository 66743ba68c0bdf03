//! The trusted side of each interface of the contract: check, charge, act.
//!
//! A sandbox process sends calls; here they are answered. Everything in a call is a claim by an attacker: ranges are
//! checked against the plan and the books, quotas are charged, and only then is anything read, stored or given back.
//! [`run`] serves one run on one volume; [`image`] serves one opened image at read-back, verify and restore.

pub mod account;
pub mod image;
mod names;
mod pace;
mod provider_log;
mod put;
pub mod run;
mod stream;
pub mod target;

pub(crate) use provider_log::LINE_COST;

/// Largest `content.reader.read` and `image.read`, in bytes: what the payload file of the channel holds.
pub const MAX_READ: u32 = 4 << 20;

/// Largest `output-stream.write`, in bytes: what the payload file of the channel holds.
pub const MAX_WRITE: u32 = 4 << 20;

/// Largest `writer.put`, in bytes: one frame of a pack, so that reading one block back decodes no more than this.
pub const MAX_PUT: u64 = crate::archive::FRAME_LIMIT as u64;

/// Most regions in one answer: 24 bytes each, well within one message.
pub const MAX_REGIONS: u32 = 4096;

/// Output streams open at once in one run. Each holds a file and up to a frame of bytes.
pub const MAX_STREAMS: usize = 64;

/// Largest attachment, in bytes: it travels in one payload.
pub const MAX_ATTACHMENT: usize = MAX_READ as usize;
