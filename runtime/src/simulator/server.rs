//! What the disks in memory have for the NBD server.

use super::disk::{self, CLUSTER, Export};
use crate::extent::{Extent, ExtentSet};
use crate::nbd::server::{self, ALLOCATION, Bounds, DIRTY, HOLE, Refused};
use crate::nbd::{ErrorCode, StatusRun};
use std::io;
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;

/// As many as QEMU's own takes, which a job counts on.
const CLIENTS: usize = 100;

/// A server that runs until it is dropped, which also ends its connections and removes its socket.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    _server: server::Server,
}

impl Server {
    /// Listens on `path`, in a folder that nobody else can enter. Must be called within a tokio runtime.
    pub fn start(path: impl Into<PathBuf>, exports: Vec<Export>) -> io::Result<Self> {
        let path = path.into();
        let listener = UnixListener::bind(&path)?;
        let bounds = Bounds {
            clients: CLIENTS,
            of_one_user: CLIENTS,
            ..Bounds::default()
        };
        Ok(Self {
            path,
            _server: server::Server::start(listener, exports, bounds),
        })
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl server::Export for Export {
    fn name(&self) -> &str {
        self.name()
    }

    fn size(&self) -> u64 {
        self.bytes().len() as u64
    }

    fn preferred_block(&self) -> u32 {
        CLUSTER
    }

    fn can_trim(&self) -> bool {
        true
    }

    fn contexts(&self) -> Vec<String> {
        let all = std::iter::once(ALLOCATION).chain(self.dirty_context());
        all.map(str::to_owned).collect()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<u8>, Refused> {
        Ok(self.read(extent).map_err(refused)?.to_vec())
    }

    async fn trim(&self, extent: Extent) -> Result<(), Refused> {
        self.trim(extent);
        Ok(())
    }

    async fn status(
        &self,
        context: &str,
        extent: Extent,
        most: usize,
    ) -> Result<Vec<StatusRun>, Refused> {
        Ok(match context {
            ALLOCATION => runs(self.holes(), extent, HOLE, most),
            _ => runs(&self.dirty(), extent, DIRTY, most),
        })
    }
}

fn refused(refused: disk::Refused) -> Refused {
    match refused {
        // What QEMU's snapshot-access says of it.
        disk::Refused::Trimmed => ErrorCode::Einval.into(),
        disk::Refused::Unreadable => ErrorCode::Eio.into(),
    }
}

/// `asked`, in turn in `set` and not, with `flag` for what is in it.
fn runs(set: &ExtentSet, asked: Extent, flag: u64, most: usize) -> Vec<StatusRun> {
    let run = |flags| move |extent| StatusRun { extent, flags };
    let inside = set.within(asked).map(run(flag));
    let mut all: Vec<_> = inside.chain(set.gaps(asked).map(run(0))).collect();
    all.sort_unstable_by_key(|run| run.extent.start());
    all.truncate(most);
    all
}
