//! `--record` and `--replay`.

use super::{Failure, Session, Status, text};
use crate::archive::ComponentId;
use crate::contract::LogLevel;
use crate::job::component::Component;
use crate::recording::{self, Header, Recorder, Recording, ReplayError, Replayed};
use crate::sandbox::Program;
use anyhow::{Context, anyhow};
use clap::Args;
use serde_json::json;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Most lines that a replayed component's log is shown of.
const LOG_LINES: usize = 1000;

/// Whether a job is recorded.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Write what the provider asks and is answered to a new file, for its vendor; no byte of a disk, but names, ranges,
    /// settings, receipts and what the provider logs
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Record also the bytes that the provider reads and writes: the file is then as secret as the disks
    #[arg(long, requires = "record")]
    record_bytes: bool,
}

impl Options {
    /// A dry run asks no provider anything.
    pub(super) fn refuse_for_dry_run(&self) -> Result<(), Failure> {
        match &self.record {
            None => Ok(()),
            Some(path) => Err(Failure::Mistake(anyhow!(
                "--dry-run runs no provider, so that there is nothing to record in {}; leave out --record or --dry-run",
                path.display()
            ))),
        }
    }

    /// Begins the recording, if one is wanted.
    pub(super) fn begin(
        &self,
        provider: &str,
        component: &[u8],
    ) -> Result<Option<Recorder>, Failure> {
        let Some(path) = &self.record else {
            return Ok(None);
        };
        let component = ComponentId::of(component).to_string();
        let header = Header::new(provider.to_owned(), component, self.record_bytes);
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| Recorder::start(file, &header))
            .with_context(|| format!("the recording {} cannot be begun", path.display()))
            .map_err(Failure::Mistake)
            .map(Some)
    }
}

/// Ends a recording; the job is done, whatever came of it.
pub(super) fn end(recorder: Option<Recorder>) {
    if let Some(Err(why)) = recorder.map(|recorder| recorder.finish()) {
        warn!("the recording is not whole: {why}");
    }
}

/// Runs the component against the recording in `path`.
pub(super) async fn replay(
    session: &Session,
    path: &Path,
    component: &Component,
    program: &Program,
) -> Result<(), Failure> {
    let recording = File::open(path)
        .map_err(Into::into)
        .and_then(|file| Recording::read(&mut BufReader::new(file)))
        .map_err(|error| Failure::Mistake(anyhow!(error).context(path.display().to_string())))?;
    let header = &recording.header;
    let same = header.component == hex::encode(component.compiled.sha256);
    if !session.json {
        let which = if same {
            "the recorded component"
        } else {
            "another component"
        };
        show!(
            "{}: made with the provider {}; this is {which}",
            path.display(),
            text::one_line(&header.provider)
        );
    }
    let mut all = Vec::new();
    let mut lines = 0;
    for recorded in &recording.processes {
        let log = |level: LogLevel, message: &str| {
            lines += 1;
            if !session.json && lines <= LOG_LINES {
                show!("  {level:?}: {}", text::one_line(message));
            }
        };
        let compiled = (&component.compiled, component.world);
        let replaying = recording::replay(recorded, program, compiled, log);
        let replayed = tokio::select! {
            replayed = replaying => replayed.map_err(|error| match error {
                ReplayError::World { .. } => Failure::Mistake(error.into()),
                ReplayError::Sandbox(_) => Failure::Failed(error.into()),
            })?,
            () = session.cancel.cancelled() => return Err(Failure::Cancelled(anyhow!("cancelled"))),
        };
        if !session.json {
            tell(&replayed);
        }
        all.push(replayed);
    }
    let cut = recording.cut.as_deref().map(text::one_line);
    if session.json {
        let result = json!({
            "recording": path,
            "provider": header.provider,
            "component": header.component,
            "same_component": same,
            "bytes": header.bytes,
            "cut": cut,
            "processes": all,
        });
        show!("{result:#}");
    } else {
        if let Some(why) = cut {
            show!("the recording is not whole: {why}");
        }
        if all.iter().any(|replayed| replayed.withheld) {
            show!(
                "it holds no bytes of the disks (--record-bytes): what was read there is zeroes here, and what was written is compared by its length"
            );
        }
    }
    match all.iter().filter(|it| it.difference.is_some()).count() {
        0 => Ok(()),
        count => Err(Failure::Told(
            Status::Failed,
            anyhow!("{count} of {} do not go as recorded", all.len()),
        )),
    }
}

fn tell(replayed: &Replayed) {
    let what = match &replayed.process {
        recording::Process::Run(volume) => format!("volume {}", text::one_line(volume)),
        recording::Process::Image => "image".into(),
    };
    let calls = replayed.same_calls;
    match (&replayed.difference, &replayed.end) {
        (Some(difference), _) => {
            show!("{what}: {calls} calls as recorded, then another one");
            show!("  recorded: {}", text::one_line(&difference.recorded));
            show!("  now:      {}", text::one_line(&difference.now));
        }
        (None, Some(end)) => show!(
            "{what}: {calls} calls as recorded; the end: {}",
            text::one_line(end)
        ),
        (None, None) => show!("{what}: {calls} calls as recorded; there the host ended it"),
    }
}
