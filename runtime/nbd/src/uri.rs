//! Where an export is, in one word.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// As the NBD URI specification writes one for a unix socket; what a URI cannot hold is escaped.
pub fn uri(socket: &Path, export: &str) -> String {
    let mut uri = String::from("nbd+unix:///");
    escape(&mut uri, export.as_bytes());
    uri.push_str("?socket=");
    escape(&mut uri, socket.as_os_str().as_bytes());
    uri
}

fn escape(into: &mut String, bytes: &[u8]) {
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                into.push(byte.into());
            }
            byte => into.push_str(&format!("%{byte:02X}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_escapes_what_would_end_its_query() {
        assert_eq!(
            uri(Path::new("/run/a b&c#?ü/nbd.sock"), "fbx-1-x0"),
            "nbd+unix:///fbx-1-x0?socket=/run/a%20b%26c%23%3F%C3%BC/nbd.sock"
        );
        assert_eq!(
            uri(Path::new("/run/nbd"), "tpm state?"),
            "nbd+unix:///tpm%20state%3F?socket=/run/nbd"
        );
    }
}
