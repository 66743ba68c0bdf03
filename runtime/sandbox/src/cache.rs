//! Compiled components on disk: `KEY.entry` says what a component imports and exports and names the file that holds
//! its machine code, by that file's own digest. `KEY.refused` says why there is none.
//!
//! Files are replaced whole, never changed. Whatever is missing, cut short, damaged or from another version counts as
//! not there. The directory must be the operator's alone: its files become machine code in sandbox processes.

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt, Permissions, PermissionsExt};
use cap_tempfile::TempFile;
use fleecebox_channel::Failure;
use fleecebox_contract::Interface;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The compiler's version. wasmtime refuses what another version made; with the version in the key, the two do not
/// take turns in throwing each other's work away.
const COMPILER: &str = "wasmtime-48.0.8";

/// Largest entry that is looked at, in bytes: the names in it have at most 64 KiB.
const MAX_ENTRY: u64 = 1 << 20;

/// Only the owner reads and writes.
const MODE: u32 = 0o600;

/// Components that all who use one cache compile at once: each may take 2 GiB and a processor.
const AT_ONCE: u32 = 2;

/// How often it is looked for a turn.
const LOOKS_EVERY: Duration = Duration::from_millis(50);

/// For how long it is believed without another try that a component takes too much, in seconds: memory and time may have
/// been short for other reasons. What the compiler says of a component it says again.
const BELIEVED: u64 = 3600;

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

/// Why a component was not compiled, kept so that it is not tried for each job anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Refusal {
    /// The compiler's reason.
    Refused(Failure),
    /// It takes too much of the processor.
    ProcessorTime,
    /// It takes too much memory.
    Memory,
}

#[derive(Serialize, Deserialize)]
struct RefusedEntry {
    /// In seconds since 1970.
    at: u64,
    refusal: Refusal,
}

/// A turn to compile, until it is dropped, however its process ends.
#[derive(Debug)]
pub(super) struct Turn(#[allow(dead_code, reason = "held for its lock")] cap_std::fs::File);

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
        self.named("entry")
    }

    fn named(&self, kind: &str) -> String {
        format!(
            "{}-{}-{COMPILER}.{kind}",
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
    /// ([`fleecebox_channel::Failure::Stale`]): the machine has another kind of processor now.
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

    /// Why the component of `key` was refused lately.
    pub(super) fn refusal(&self, key: &Key) -> Result<Option<Refusal>, CacheError> {
        let Some(file) = absent_as_none(self.0.open(key.named("refused")))? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(MAX_ENTRY).read_to_end(&mut bytes)?;
        let entry = postcard::from_bytes::<RefusedEntry>(&bytes).ok();
        let believed = |entry: &RefusedEntry| {
            let age = now().checked_sub(entry.at);
            matches!(entry.refusal, Refusal::Refused(_)) || age.is_some_and(|age| age < BELIEVED)
        };
        Ok(entry.filter(believed).map(|entry| entry.refusal))
    }

    /// Keeps it.
    pub(super) fn refuse(&self, key: &Key, refusal: Refusal) -> Result<(), CacheError> {
        let entry = RefusedEntry { at: now(), refusal };
        let encoded = postcard::to_stdvec(&entry).map_err(std::io::Error::other)?;
        Ok(self.replace(&key.named("refused"), &encoded)?)
    }

    /// Waits until fewer than [`AT_ONCE`] components are being compiled.
    pub(super) async fn turn(&self) -> Result<Turn, CacheError> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).mode(MODE);
        loop {
            for number in 0..AT_ONCE {
                let file = self.0.open_with(format!("compiling-{number}"), &options)?;
                match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => return Ok(Turn(file)),
                    Err(Errno::WOULDBLOCK) => {}
                    Err(error) => return Err(CacheError(error.into())),
                }
            }
            tokio::time::sleep(LOOKS_EVERY).await;
        }
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

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
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
    fn that_a_component_takes_too_much_is_believed_for_an_hour() {
        let (_folder, cache) = cache();
        let key = Key::of(b"component");
        assert_eq!(cache.refusal(&key).unwrap(), None);
        cache.refuse(&key, Refusal::Memory).unwrap();
        assert_eq!(cache.refusal(&key).unwrap(), Some(Refusal::Memory));
        assert_eq!(cache.refusal(&Key::of(b"another")).unwrap(), None);
        for at in [now() - BELIEVED, now() + BELIEVED] {
            let refusal = Refusal::ProcessorTime;
            let entry = postcard::to_stdvec(&RefusedEntry { at, refusal }).unwrap();
            cache.replace(&key.named("refused"), &entry).unwrap();
            assert_eq!(cache.refusal(&key).unwrap(), None);
        }
    }

    #[tokio::test]
    async fn as_many_compile_at_once_as_may_and_the_next_waits_for_one_to_end() {
        let (_folder, cache) = cache();
        let mut turns = Vec::new();
        for _ in 0..AT_ONCE {
            turns.push(cache.turn().await.unwrap());
        }
        let wait = tokio::time::timeout(LOOKS_EVERY * 3, cache.turn()).await;
        assert!(wait.is_err(), "{wait:?}");
        turns.pop();
        cache.turn().await.unwrap();
    }

    #[test]
    fn the_named_compiler_is_the_one_that_is_built_in() {
        let lock = include_str!("../../../Cargo.lock");
        let version = COMPILER.strip_prefix("wasmtime-").unwrap();
        assert!(lock.contains(&format!("name = \"wasmtime\"\nversion = \"{version}\"\n")));
    }
}
