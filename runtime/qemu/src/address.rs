//! Where a VM's monitor is.

use super::libvirt;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::{PathBuf, absolute};

/// The way to a monitor, or to a guest agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Address {
    /// A unix socket of QEMU's own.
    Socket(PathBuf),
    /// libvirt has it.
    Libvirt(libvirt::Address),
}

impl Address {
    /// The same for a process that lives in another folder.
    ///
    /// # Errors
    /// When the folder of this one is gone.
    pub fn absolute(&self) -> io::Result<Self> {
        match self {
            Self::Socket(path) => absolute(path).map(Self::Socket),
            libvirt => Ok(libvirt.clone()),
        }
    }

    /// The domain, where libvirt has the VM.
    pub fn libvirt(&self) -> Option<&libvirt::Address> {
        match self {
            Self::Libvirt(domain) => Some(domain),
            Self::Socket(_) => None,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Libvirt(domain) => domain.fmt(f),
        }
    }
}
