//! `fleecebox serve`.

use super::progress::Progress;
use super::socket::Socket;
use super::stored::{self, Stored};
use super::{AllowWasi, Failure, Sandboxes, Session, Status, places};
use crate::archive::VolumeRecord;
use crate::contract::with_causes;
use crate::job::audit::{Job, Record};
use crate::job::means::Means;
use crate::job::reading::Reading;
use crate::job::serve::{self, Ended, Served};
use crate::nbd;
use anyhow::{Context, anyhow};
use clap::Args;
use serde_json::json;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A day, as a run of a provider has: who forgets to end it does not keep it for ever.
const WALL_SECONDS: u64 = 24 * 3600;

/// Serve a backup's volumes over NBD, read-only.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecebox serve 20261123T020000Z-0123456789abcdef --archive /srv/backups
  fleecebox serve 20261123T020000Z-0123456789abcdef --archive /srv/backups --volume scsi0 --idle-seconds 60
  fleecebox serve 20261123T020000Z-0123456789abcdef --archive /srv/backups --socket /run/backup.sock --json

Prints where the volumes can be read, one line each (name, NBD URI), once they can be, and serves them until a signal, \
or until --wall-seconds or --idle-seconds have passed. nbdcopy, nbdinfo, qemu-img and QEMU take such a URI, QEMU as a \
backing file too. Each block is compared with its digest before it is given out; one that is not as it was backed up is \
an I/O error for the client, and told here. The socket is its owner's alone, and goes with the command.")]
pub(super) struct Serve {
    #[command(flatten)]
    stored: Stored,
    /// Only this volume; may be repeated
    #[arg(long = "volume", value_name = "NAME")]
    volumes: Vec<String>,
    /// Listen here [default: in a folder of its own below the state folder]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// End after so long
    #[arg(long, value_name = "SECONDS", default_value_t = WALL_SECONDS, value_parser = clap::value_parser!(u64).range(1..))]
    wall_seconds: u64,
    /// End once no client was connected for so long [default: go on]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    idle_seconds: Option<u64>,
    #[command(flatten)]
    wasi: AllowWasi,
    #[command(flatten)]
    sandboxes: Sandboxes,
}

impl Serve {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let found = self.stored.find(session)?;
        let allowed = self.wasi.parts(session)?;
        let (namespace, manifest) = (&found.namespace, &found.manifest);
        let reading = Reading::new(&session.config, namespace, manifest, allowed);
        let mut record = reading.record(Job::Serve);
        let ended = self.make(session, &reading, &mut record).await;
        record.used = reading.account.used();
        places::audited(session, record, ended)
    }

    async fn make(
        &self,
        session: &Session,
        reading: &Reading<'_>,
        record: &mut Record,
    ) -> Result<(), Failure> {
        let _slot = places::slot(session, reading.restores.tenant().as_ref())?;
        let volumes = stored::volumes(&self.volumes, &reading.manifest.record.volumes)?;
        let cache = places::cache(session)?;
        let program = self.sandboxes.program();
        let mut socket = Socket::listen(session, self.socket.as_deref())?;
        let listener = socket.listener().context("the socket");
        let listener = listener.map_err(Failure::Failed)?;
        places::begun(session, record)?;
        let (events, progress) = Progress::start(session.quiet);
        let (cancel, account) = (session.cancel.clone(), Arc::clone(&reading.account));
        let means = Means::new(events, cancel, account, program);
        let serve = serve::Serve {
            volumes: &volumes,
            listener,
            wall: Duration::from_secs(self.wall_seconds),
            idle: self.idle_seconds.map(Duration::from_secs),
        };
        let ready = || self.tell(session, reading, &volumes, socket.path());
        let served = serve::serve(reading, serve, &cache, &means, ready).await;
        drop(means);
        progress.finish().await;
        drop(socket);
        self.tell_end(session, served.ended);
        judge(&served)
    }

    fn tell_end(&self, session: &Session, ended: Ended) {
        if session.quiet {
            return;
        }
        match ended {
            Ended::Signal => say!("a signal ended the serving"),
            Ended::WallTime => say!(
                "the backup was served for {} s (--wall-seconds)",
                self.wall_seconds
            ),
            Ended::Idle => say!("nobody is connected any more (--idle-seconds)"),
        }
    }

    /// One line for each volume, for scripts; the reader may be waiting for it.
    fn tell(
        &self,
        session: &Session,
        reading: &Reading<'_>,
        volumes: &[&VolumeRecord],
        socket: &Path,
    ) {
        let uri = |volume: &VolumeRecord| nbd::uri(socket, &volume.name);
        if session.json {
            let volumes = volumes.iter().map(|volume| {
            json!({ "name": volume.name, "size": volume.root.size(), "uri": uri(volume), "nbd_export": volume.name })
        });
            let volumes: Vec<_> = volumes.collect();
            let backup = reading.manifest.backup;
            let served = json!({ "backup": backup, "socket": socket, "volumes": volumes });
            match serde_json::to_string(&served) {
                Ok(line) => show!("{line}"),
                Err(error) => say!("warning: {}", with_causes(&error)),
            }
        } else {
            for volume in volumes {
                show!("{}\t{}", volume.name, uri(volume));
            }
        }
        let _ = io::stdout().flush();
        if !session.quiet {
            say!("served until a signal, or for {} s", self.wall_seconds);
        }
    }
}

/// All that somebody read could be read, or it is a failure after what was told.
fn judge(served: &Served) -> Result<(), Failure> {
    let Some(first) = served.unread.first() else {
        return Ok(());
    };
    let status = match served.unread.iter().all(|unread| unread.is_denied) {
        true => Status::Denied,
        false => Status::Unusable,
    };
    let said = anyhow!(
        "the backup cannot be read in {} places, volume {} at {} first",
        served.unread.len(),
        first.volume,
        first.extent
    );
    Err(Failure::Told(status, said))
}
