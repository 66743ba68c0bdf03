//! Compiled components on disk: `KEY.entry` says what a component imports and exports and names the file that holds
//! its machine code, by that file's own digest.
//!
//! Files are replaced whole, never changed. Whatever is missing, cut short, damaged or from another version counts as
//! not there. The directory must be the operator's alone: its files become machine code in sandbox processes.

use crate::channel::Interface;
use cap_std::fs::{Dir, Permissions, PermissionsExt};
use cap_tempfile::TempFile;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;

/// The compiler's version. wasmtime refuses what another version made; with the version in the key, the two do not
/// take turns in throwing each other's work away.
const COMPILER: &str = "wasmtime-48.0.8";

/// Largest entry that is looked at, in bytes: the names in it have at most 64 KiB.
const MAX_ENTRY: u64 = 1 << 20;

/// Only the owner reads and writes.
const MODE: u32 = 0o600;

/// A directory of compiled components.
#[derive(Debug, Clone)]
pub struct Cache(Arc<Dir>);

/// The cache's directory failed.
#[derive(Debug, thiserror::Error)]
#[error("the cache of compiled components failed")]
pub struct CacheError(#[from] std::io::Error);

/// Which component, compiled by which version of Fleecebox and of its compiler.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    sha256: [u8; 32],
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    interface: Interface,
    /// BLAKE3 of the machine code.
    code: [u8; 32],
}

impl Key {
    pub(super) fn of(component: &[u8]) -> Self {
        Self {
            sha256: Sha256::digest(component).into(),
        }
    }

    pub(super) fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    fn file_name(&self) -> String {
        format!(
            "{}-{}-{COMPILER}.entry",
            hex::encode(self.sha256),
            env!("CARGO_PKG_VERSION")
        )
    }
}

impl Cache {
    /// Uses `directory`, which no other user may write to.
    pub fn new(directory: Dir) -> Self {
        Self(Arc::new(directory))
    }

    /// Throws a component's compiled form away. For when a sandbox calls it stale
    /// ([`crate::channel::Failure::Stale`]): the machine has another kind of processor now.
    pub fn forget(&self, sha256: [u8; 32]) -> Result<(), CacheError> {
        match self.0.remove_file(Key { sha256 }.file_name()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// What was kept under `key`, proven to be whole.
    pub(super) fn find(&self, key: &Key) -> Result<Option<(Interface, File)>, CacheError> {
        let Some(entry) = absent_as_none(self.0.open(key.file_name()))? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        entry.take(MAX_ENTRY).read_to_end(&mut bytes)?;
        let Ok(entry) = postcard::from_bytes::<Entry>(&bytes) else {
            return Ok(None);
        };
        let Some(code) = absent_as_none(self.0.open(code_name(&entry.code)))? else {
            return Ok(None);
        };
        let mut digest = blake3::Hasher::new();
        digest.update_reader(&code)?;
        if *digest.finalize().as_bytes() != entry.code {
            return Ok(None);
        }
        Ok(Some((entry.interface, code.into_std())))
    }

    /// Keeps a compiled component under `key`.
    pub(super) fn keep(
        &self,
        key: &Key,
        interface: Interface,
        code: &[u8],
    ) -> Result<(Interface, File), CacheError> {
        let entry = Entry {
            interface,
            code: *blake3::hash(code).as_bytes(),
        };
        let name = code_name(&entry.code);
        self.replace(&name, code)?;
        let encoded = postcard::to_stdvec(&entry).map_err(std::io::Error::other)?;
        self.replace(&key.file_name(), &encoded)?;
        Ok((entry.interface, self.0.open(name)?.into_std()))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), std::io::Error> {
        let mut file = TempFile::new(&self.0)?;
        file.as_file()
            .set_permissions(Permissions::from_mode(MODE))?;
        file.write_all(bytes)?;
        file.replace(name)
    }
}

fn code_name(digest: &[u8; 32]) -> String {
    format!("{}.code", hex::encode(digest))
}

fn absent_as_none<T>(opened: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cap_std::ambient_authority;

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let dir = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        (folder, Cache::new(dir))
    }

    fn interface() -> Interface {
        Interface {
            imports: vec!["a".into()],
            exports: vec!["b".into()],
        }
    }

    fn read(mut file: File) -> Vec<u8> {
        let mut bytes = vec![];
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_kept_is_found_and_is_the_owners_alone() {
        let (folder, cache) = cache();
        let key = Key::of(b"component");
        assert!(cache.find(&key).unwrap().is_none());
        cache.keep(&key, interface(), b"code").unwrap();
        let (found, file) = cache.find(&key).unwrap().unwrap();
        assert_eq!(found, interface());
        // `find` has read to the end to prove it; readers use positions of their own.
        use std::io::Seek;
        let mut file = file;
        file.rewind().unwrap();
        assert_eq!(read(file), b"code");
        assert!(cache.find(&Key::of(b"another")).unwrap().is_none());
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(
                entry.unwrap().metadata().unwrap().permissions().mode() & 0o777,
                0o600
            );
        }
        cache.forget(key.sha256()).unwrap();
        cache.forget(key.sha256()).unwrap();
        assert!(cache.find(&key).unwrap().is_none());
    }

    #[test]
    fn a_file_that_was_touched_counts_as_not_there() {
        let (folder, cache) = cache();
        let key = Key::of(b"component");
        for suffix in ["code", "entry"] {
            for damage in [&b""[..], b"cod", b"Code"] {
                cache.keep(&key, interface(), b"code").unwrap();
                assert!(cache.find(&key).unwrap().is_some());
                let name = std::fs::read_dir(folder.path())
                    .unwrap()
                    .map(|entry| entry.unwrap().path())
                    .find(|path| path.extension().unwrap() == suffix)
                    .unwrap();
                std::fs::write(name, damage).unwrap();
                assert!(cache.find(&key).unwrap().is_none(), "{suffix} {damage:?}");
            }
        }
    }

    #[test]
    fn the_named_compiler_is_the_one_that_is_built_in() {
        let lock = include_str!("../../../Cargo.lock");
        let version = COMPILER.strip_prefix("wasmtime-").unwrap();
        assert!(lock.contains(&format!("name = \"wasmtime\"\nversion = \"{version}\"\n")));
    }
}
