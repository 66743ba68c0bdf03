//! What the job process and a sandbox process say to each other.
//!
//! One socket carries small messages in strict turns: the sandbox sends a [`Call`], the job answers with one
//! [`Answer`]. Bytes never travel in a message: they lie at the start of a payload file that both
//! processes hold, and the message gives their number. Both sides copy out of it before they look at a byte,
//! so nothing that has been checked can change afterwards.
//!
//! - `message`: the words, and how long each may be
//! - [`Bounds`]: which of them an order allows its sandbox to say
//! - [`Socket`], [`AsyncSocket`]: frames of a known length around the words
//! - [`Payload`]: the file that the bytes lie in
//! - [`hand_over`], [`take_over`]: how the files get into a fresh sandbox process
//! - [`room()`]: what a sandbox process needs beside its guest

#![deny(missing_docs)]

mod bounds;
mod files;
mod message;
mod octets;
mod payload;
mod room;
mod socket;

pub use bounds::{Bounds, Violation};
pub use files::{hand_over, take_over};
pub use message::*;
pub use payload::{Payload, PayloadError};
pub use room::{COMPILE_CPU_SECONDS, COMPILE_MEMORY, room};
pub use socket::{AsyncSocket, MAX_MESSAGE, Socket, SocketError};

/// First argument that turns the program into a sandbox process. Nobody types it.
pub const ARGUMENT: &str = "sandbox-process";
