//! What the job process and a sandbox process say to each other.
//!
//! One socket carries small messages in strict turns: the sandbox sends a [`Call`], the job answers with one
//! [`Answer`]. Bytes never travel in a message: they lie at the start of a payload file that both
//! processes hold, and the message gives their number. Both sides copy out of it before they look at a byte,
//! so nothing that has been checked can change afterwards.

mod message;
// mod payload; mod socket;

pub use message::*;
