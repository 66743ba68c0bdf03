//! A VM of libvirt's, by its name: its monitor, its guest agent, start and stop, through libvirt's own daemon.
//!
//! The daemon has QEMU's monitor and the agent's socket to itself, and passes on what it is given for either. This is a
//! client of its protocol (`src/rpc/virnetprotocol.x`, `remote_protocol.x` and `qemu_protocol.x` of libvirt's sources):
//! calls with a header of 28 bytes and XDR behind it (RFC 4506), over a unix socket. Measured on two cores, libvirt 11.3:
//! 0.4 ms for a command; `virsh` as a child needs 17 ms for each, in the freeze window too, and a `virsh` that is kept
//! needs 0.8 ms, but can be handed no descriptor once it runs. The procedures used are the same from libvirt 8.2 on.
//!
//! [`Uri`] → `Connection` (calls and notices) → [`Domain`] (what is asked of libvirt itself) → `Link` (QMP through it, and
//! over a daemon that was started again). [`Definition`] is what is read of a domain's XML.
//!
//! Absences: no library of libvirt's; no remote host; nothing is changed in a domain's configuration. All that comes is
//! bounded before it is kept: the daemon is trusted with the VM, but not with our memory.

mod connection;
mod definition;
mod domain;
mod link;
mod message;
#[cfg(test)]
mod tests;
mod uri;
mod xdr;

pub use definition::{Agent as AgentChannel, Definition};
pub use domain::Domain;
pub use link::Link;
pub use uri::{Uri, UriError};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::PathBuf;

/// The connection where none is named.
pub const DEFAULT_URI: &str = "qemu:///system";

/// Which domain, of which libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The connection, as `virsh -c` has it.
    pub uri: Uri,
    /// The domain's name or UUID.
    pub domain: String,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.domain, self.uri)
    }
}

/// Why libvirt did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// Nobody takes the connection.
    #[error("cannot connect to libvirt's socket {} (is its daemon running, and is the URI right?)", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not answer.
    #[error("libvirt did not answer {what} within {seconds} s")]
    Silent {
        /// What was asked.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// It wants a login.
    #[error(
        "libvirt wants a login for this user; let it in by the group of the socket, or by polkit, or run as root"
    )]
    Login,
    /// There is no such domain.
    #[error("libvirt ({uri}) has no domain '{domain}'")]
    NoDomain {
        /// The name that was given.
        domain: String,
        /// The connection.
        uri: Uri,
    },
    /// It does not run.
    #[error("the domain '{domain}' is shut off")]
    ShutOff {
        /// Its name.
        domain: String,
    },
    /// It said no.
    #[error("libvirt refused {what}: {message}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its error code: `virErrorNumber`.
        code: i32,
        /// Its own words.
        message: String,
    },
    /// What came is not its protocol.
    #[error("what libvirt sent cannot be understood")]
    Malformed {
        /// Where it is wrong.
        #[from]
        source: Malformed,
    },
    /// The connection is gone.
    #[error("the connection to libvirt was lost: {reason}")]
    Lost {
        /// How it ended.
        reason: String,
    },
}

/// Not as the protocol has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends before it is whole.
    #[error("it ends too early")]
    Short,
    /// Longer than any that is meant.
    #[error("a length is out of bounds")]
    TooLong,
    /// A text that is none.
    #[error("a text is no UTF-8")]
    NoText,
    /// A number that means nothing.
    #[error("a number has no meaning")]
    Unknown,
}

/// `VIR_ERR_NO_DOMAIN`.
const NO_DOMAIN: i32 = 42;
/// `VIR_ERR_RPC`: it does not know the procedure.
const RPC: i32 = 39;
/// `VIR_ERR_OPERATION_INVALID`: not in the state that the domain is in.
const OPERATION_INVALID: i32 = 55;
/// `VIR_ERR_OPERATION_TIMEOUT`: another operation of libvirt's has the domain.
const OPERATION_TIMEOUT: i32 = 68;
/// `VIR_ERR_ACCESS_DENIED`.
const ACCESS_DENIED: i32 = 88;

impl LibvirtError {
    /// Whether libvirt said no before it told anybody else, so that nothing was changed.
    pub fn is_refusal(&self) -> bool {
        const BEFORE: [i32; 5] = [
            NO_DOMAIN,
            RPC,
            OPERATION_INVALID,
            OPERATION_TIMEOUT,
            ACCESS_DENIED,
        ];
        matches!(self, Self::Refused { code, .. } if BEFORE.contains(code))
    }

    /// Whether there is no libvirt, no right to it, or no such domain: the user's to mend.
    pub fn is_mistake(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. } | Self::Login | Self::NoDomain { .. } | Self::ShutOff { .. }
        ) || matches!(self, Self::Refused { code, .. } if *code == ACCESS_DENIED)
    }

    /// Whether the connection is no more.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }

    /// Whether there is no QEMU of this domain.
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::ShutOff { .. })
    }

    /// Whether there is no such VM any more, for who has had one.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::ShutOff { .. } | Self::NoDomain { .. })
    }

    /// Whether it is the daemon that is not there, of which nothing follows for its VMs.
    pub fn is_away(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. } | Self::Lost { .. } | Self::Silent { .. }
        )
    }
}
