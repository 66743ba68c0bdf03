//! An asynchronous NBD client, the way in of a volume's bytes; and a server, their way out.
//!
//! A [`Connection`] is one Unix socket after the newstyle handshake. Any number of tasks use it at
//! once; requests are told apart by their cookie, and the server answers in the order it likes.
//!
//! - `wire` encodes and parses, and does no I/O;
//! - `assembly` decides whether the pieces of an answer make up what was asked;
//! - `handshake` negotiates;
//! - `replies` receives: one task for each connection, which owns the buffers of waiting requests;
//! - `client` is what the rest of the program calls;
//! - [`server`] is the other side, for whatever can be read at any place. It shares the wire with the client, and no more.
//!
//! What holds:
//! - Nothing is allocated because a server said a length. A length is compared with what was asked
//!   first, and bytes of a read go straight into the buffer that the caller lent.
//! - Whatever the server does that the protocol forbids ends the connection with a [`Violation`]
//!   that names the rule; every waiting request gets it at once.
//! - A request whose future is dropped stays in the table until its reply has been received, so its
//!   late bytes meet its own buffer and never another's.
//! - Nothing here waits longer than for the handshake: a time limit of a request is its caller's.
//!
//! The rules are those of the NBD protocol, `doc/proto.md` of the reference implementation, which
//! is meant wherever a comment names a section or an `NBD_` constant.

#![deny(missing_docs)]

mod assembly;
mod client;
mod error;
mod handshake;
mod replies;
pub mod server;
#[cfg(test)]
mod tests;
mod uri;
#[allow(
    missing_docs,
    reason = "the names are those of the protocol's document, which tells what they mean"
)]
pub mod wire;

pub use assembly::StatusRun;
pub use client::Connection;
pub use error::{Error, ErrorCode, Refusal, Violation};
pub use handshake::ExportInfo;
pub use uri::uri;
pub use wire::{Command, Negotiation};
