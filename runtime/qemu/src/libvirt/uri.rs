//! The URI of a connection, and the daemon's socket that it means on this host.

use super::DEFAULT_URI;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// `qemu:///system` or `qemu:///session`, or either with a socket: `qemu+unix:///system?socket=/run/libvirt-sock`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Uri {
    session: bool,
    socket: Option<PathBuf>,
}

/// Why it means no libvirt that can be used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Disks are read over a socket of this host.
    #[error(
        "'{0}' is a libvirt of another host: a VM is backed up on the host that it runs on, by qemu:///system or qemu:///session"
    )]
    Remote(String),
    /// Another hypervisor, or no URI.
    #[error("'{0}' is no URI of libvirt's QEMU: qemu:///system or qemu:///session")]
    Other(String),
    /// What follows `?` is not known.
    #[error("'{0}' is not known in a URI of libvirt's; socket=PATH is")]
    Option(String),
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let other = || UriError::Other(text.escape_debug().to_string());
        let (scheme, rest) = text.split_once("://").ok_or_else(other)?;
        let (path, options) = rest.split_once('?').unwrap_or((rest, ""));
        match scheme {
            "qemu" | "qemu+unix" => {}
            _ if scheme.starts_with("qemu+") => {
                return Err(UriError::Remote(text.escape_debug().to_string()));
            }
            _ => return Err(other()),
        }
        let session = match path {
            "/system" => false,
            "/session" => true,
            _ if !path.starts_with('/') => {
                return Err(UriError::Remote(text.escape_debug().to_string()));
            }
            _ => return Err(other()),
        };
        let mut socket = None;
        for option in options.split('&').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("socket", path)) if path.starts_with('/') => socket = Some(path.into()),
                _ => return Err(UriError::Option(option.escape_debug().to_string())),
            }
        }
        Ok(Self { session, socket })
    }
}

impl TryFrom<String> for Uri {
    type Error = UriError;

    fn try_from(text: String) -> Result<Self, UriError> {
        text.parse()
    }
}

impl From<Uri> for String {
    fn from(uri: Uri) -> Self {
        uri.to_string()
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.socket {
            None => f.write_str(self.name()),
            Some(socket) => {
                let (_, path) = self.name().split_at("qemu".len());
                write!(f, "qemu+unix{path}?socket={}", socket.display())
            }
        }
    }
}

impl Uri {
    /// What the daemon is asked for.
    pub(super) fn name(&self) -> &'static str {
        match self.session {
            false => DEFAULT_URI,
            true => "qemu:///session",
        }
    }

    /// The socket: that of the daemon for QEMU alone where there is one, else of the one for all, as libvirt's own
    /// programs choose.
    pub(super) fn socket(&self) -> PathBuf {
        if let Some(socket) = &self.socket {
            return socket.clone();
        }
        let folder = match self.session {
            false => PathBuf::from("/run/libvirt"),
            true => runtime_folder().join("libvirt"),
        };
        let [one, all] = ["virtqemud-sock", "libvirt-sock"].map(|name| folder.join(name));
        if one.exists() { one } else { all }
    }
}

fn runtime_folder() -> PathBuf {
    let user = || Path::new("/run/user").join(rustix::process::geteuid().as_raw().to_string());
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(user, PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_of_this_hosts_qemu_is_itself_again_and_no_other_is_taken() {
        for text in [
            "qemu:///system",
            "qemu:///session",
            "qemu+unix:///system?socket=/run/a b/sock",
        ] {
            assert_eq!(text.parse::<Uri>().unwrap().to_string(), text);
        }
        assert_eq!(
            "qemu+unix:///system".parse::<Uri>().unwrap(),
            Uri::default()
        );
        let error = |text: &str| text.parse::<Uri>().unwrap_err();
        for remote in [
            "qemu+ssh://host/system",
            "qemu://host/system",
            "qemu+tls:///system",
        ] {
            assert!(matches!(error(remote), UriError::Remote(_)), "{remote}");
        }
        for other in ["xen:///system", "web", "", "qemu:///", "qemu:///embed"] {
            assert!(matches!(error(other), UriError::Other(_)), "{other}");
        }
        for unknown in ["qemu:///system?socket=relative", "qemu:///system?a=b"] {
            assert!(matches!(error(unknown), UriError::Option(_)), "{unknown}");
        }
    }
}
