//! From names and paths on the command line to open archives, folders and components. Below, ambient authority is used only
//! where `tests/walls.rs` lists it.

use super::{Failure, Session, Status};
use crate::archive::{self, Archive};
use crate::config::{self, Vm};
use crate::contract::{MAX_COMPONENT, with_causes};
use crate::job::audit::{Audit, Outcome, Record};
use crate::job::slots::{self, Slot};
use crate::policy::{Decision, Denied, Tenancy};
use crate::sandbox::Cache;
use anyhow::{Context, anyhow};
use cap_std::ambient_authority;
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Opens the archive `name`, which may be left out where the configuration has only one.
pub(super) fn archive(
    session: &Session,
    name: Option<&str>,
    make: bool,
) -> Result<Archive, Failure> {
    let name = match name {
        Some(name) => name,
        None => only(session.config.archive.keys(), "archive", "--archive")?,
    };
    let configured = session.config.archive(name)?;
    let path = &configured.path;
    let dir = archive_folder(path)?;
    let opened = match Archive::open(dir.try_clone().map_err(failed)?) {
        Err(archive::Error::NotAnArchive) if make => Archive::create(dir),
        opened => opened,
    };
    let opened = opened.map_err(|error| unusable(path, error))?;
    Ok(as_configured(opened, &configured))
}

/// As [`archive()`] for a backup, where nothing may be made: none where the folder is empty and would become one.
pub(super) fn archive_if_made(
    session: &Session,
    name: Option<&str>,
) -> Result<Option<Archive>, Failure> {
    let name = match name {
        Some(name) => name,
        None => only(session.config.archive.keys(), "archive", "--archive")?,
    };
    let configured = session.config.archive(name)?;
    let path = configured.path.clone();
    let dir = archive_folder(&path)?;
    match Archive::open(dir.try_clone().map_err(failed)?) {
        Ok(archive) => Ok(Some(as_configured(archive, &configured))),
        Err(archive::Error::NotAnArchive) => match dir.entries().map_err(failed)?.next() {
            None => Ok(None),
            Some(_) => Err(unusable(&path, archive::Error::NotEmpty)),
        },
        Err(error) => Err(unusable(&path, error)),
    }
}

fn as_configured(archive: Archive, configured: &config::Archive) -> Archive {
    archive
        .rechecking(configured.recheck())
        .compressing(configured.zstd_level)
}

fn archive_folder(path: &Path) -> Result<Dir, Failure> {
    Dir::open_ambient_dir(path, ambient_authority())
        .with_context(|| {
            format!(
                "the archive {} cannot be opened (make the folder first)",
                path.display()
            )
        })
        .map_err(Failure::Unusable)
}

fn unusable(path: &Path, error: archive::Error) -> Failure {
    Failure::of(anyhow::Error::from(error).context(format!("the archive {}", path.display())))
}

/// In a VM's state folder: the archive that records what tools have of it.
const RECORDS: &str = "exports";

/// The records of what tools have of the VM of that state folder.
pub(super) fn records(vm_state: &Path) -> Result<Archive, Failure> {
    let (folder, _) = folder(&vm_state.join(RECORDS))?;
    let opened = match Archive::open(folder.try_clone().map_err(failed)?) {
        Err(archive::Error::NotAnArchive) => Archive::create(folder),
        opened => opened,
    };
    opened.map_err(unreadable_records)
}

/// The same where nothing may be made: none where the VM was never exported.
pub(super) fn records_if_made(vm_state: &Dir) -> Result<Option<Archive>, Failure> {
    let folder = match vm_state.open_dir(RECORDS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        folder => folder.map_err(failed)?,
    };
    match Archive::open(folder) {
        Err(archive::Error::NotAnArchive) => Ok(None),
        opened => opened.map(Some).map_err(unreadable_records),
    }
}

fn unreadable_records(error: archive::Error) -> Failure {
    let error = anyhow::Error::from(error);
    Failure::of(error.context("the records of what tools have, in the state folder"))
}

/// The one name there is, where none was given.
fn only<'a>(
    mut names: impl Iterator<Item = &'a String>,
    kind: &str,
    option: &str,
) -> Result<&'a str, Failure> {
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name),
        (None, _) => Err(Failure::Mistake(anyhow!(
            "no {kind} is configured; name one with {option}"
        ))),
        (Some(_), Some(_)) => Err(Failure::Mistake(anyhow!(
            "several {kind}s are configured; name one with {option}"
        ))),
    }
}

/// The VM `name` of the configuration, or an empty one to be filled from the command line.
pub(super) fn vm(session: &Session, name: &str, on_command_line: bool) -> Result<Vm, Failure> {
    match session.config.vm.get(name) {
        Some(vm) => Ok(vm.clone()),
        None if on_command_line => Ok(Vm::default()),
        None => {
            let remedy = "name one of the configuration, or say where its monitor is with --libvirt or --qmp";
            Err(config::unknown("VM", name, session.config.vm.keys(), remedy).into())
        }
    }
}

/// Opens a folder, made with mode 0700 where it is not there, with its absolute path.
pub(super) fn folder(path: &Path) -> Result<(Dir, PathBuf), Failure> {
    let opened = || -> io::Result<(Dir, PathBuf)> {
        let dir = match Dir::open_ambient_dir(path, ambient_authority()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_private(path)?;
                Dir::open_ambient_dir(path, ambient_authority())?
            }
            dir => dir?,
        };
        Ok((dir, std::fs::canonicalize(path)?))
    };
    opened()
        .with_context(|| format!("the folder {} cannot be used", path.display()))
        .map_err(Failure::Mistake)
}

fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Whoever can write to the state folder decides what is run and what is cleaned up. One that is not there yet is made
/// for its owner alone.
pub(super) fn check_state(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::MetadataExt;
    let Ok(found) = std::fs::metadata(path) else {
        return Ok(());
    };
    let (own, whose) = (rustix::process::geteuid().as_raw(), found.uid());
    let wrong = if whose != own && whose != 0 {
        format!("belongs to user {whose}, and this is user {own}")
    } else if found.mode() & 0o022 != 0 {
        format!(
            "can be written to by others (its mode is {:04o})",
            found.mode() & 0o7777
        )
    } else {
        return Ok(());
    };
    Err(Failure::Mistake(anyhow!(
        "the state folder {} {wrong}: make it yours alone (chown, chmod 0700), or name another with --state",
        path.display()
    )))
}

/// The folder of one VM's journal and lock, named after the VM.
pub(super) fn vm_state(session: &Session, vm: &str) -> Result<(Dir, PathBuf), Failure> {
    folder(&session.state.join("vms").join(vm))
}

/// Compiled components.
pub(super) fn cache(session: &Session) -> Result<Cache, Failure> {
    let (dir, _) = folder(&session.state)?;
    let mut private = DirBuilder::new();
    private.mode(0o700);
    match dir.create_dir_with("compiled", &private) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Failure::Failed(error.into()));
        }
        _ => {}
    }
    Ok(Cache::new(
        dir.open_dir("compiled")
            .map_err(|error| Failure::Failed(error.into()))?,
    ))
}

/// The provider's component, no longer than it may be.
pub(super) fn component(decision: &Decision) -> Result<Vec<u8>, Failure> {
    let path = &decision.provider.component;
    let most = decision.provider.limits.component_bytes;
    // One that is far too large is not even read.
    match std::fs::metadata(path).map(|found| found.len()) {
        Ok(size) if size > most => Err(Failure::Mistake(anyhow!(
            "the component {} of the provider '{}' has {size} bytes, more than its limit of {most} (component-bytes)",
            path.display(),
            decision.provider_name,
        ))),
        _ => read(path, "provider's component"),
    }
}

/// A place for one more job of the tenant.
pub(super) fn slot(session: &Session, tenant: Option<&Tenancy>) -> Result<Option<Slot>, Failure> {
    let Some(tenant) = tenant else {
        return Ok(None);
    };
    let (dir, _) = folder(&session.state.join("tenants").join(&tenant.name))?;
    slots::take(&dir, tenant).map_err(failed)
}

/// Writes down that a job begins, now that it is known what it is granted.
pub(super) fn begun(session: &Session, record: &mut Record) -> Result<(), Failure> {
    let (dir, _) = folder(&session.state)?;
    Audit::open(&dir)
        .and_then(|mut audit| audit.begin(&dir, record))
        .context("the audit cannot be written")
        .map_err(Failure::Failed)
}

/// Writes down which jobs have died since anybody looked. Whoever may only read the audit does without.
pub(super) fn find_dead(session: &Session) -> Result<(), Failure> {
    let (dir, _) = folder(&session.state)?;
    if let Err(error) = Audit::open(&dir).and_then(|mut audit| audit.find_dead(&dir)) {
        warn!(
            "jobs that died cannot be written down: {}",
            with_causes(&error)
        );
    }
    Ok(())
}

/// Writes down what became of a job, and gives that back.
///
/// A job of which nobody knows what it would have been granted has nothing to be audited.
pub(super) fn audited<T>(
    session: &Session,
    mut record: Record,
    ended: Result<T, Failure>,
) -> Result<T, Failure> {
    let denied = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(denied) if !matches!(denied, Denied::Config(_)));
    let ended = ended.map_err(|failure| failure.cancelled_if(session.cancel.is_cancelled()));
    let outcome = match &ended {
        Ok(_) => Outcome::Done,
        Err(failure) => match failure.status() {
            Status::Mistake
                if record.granted.is_none() && !record.has_begun() && !denied(failure.error()) =>
            {
                return ended;
            }
            Status::Mistake | Status::Denied => Outcome::Refused,
            Status::Incomplete => Outcome::Done,
            Status::Cancelled => Outcome::Cancelled,
            Status::Failed | Status::Unusable | Status::Busy => Outcome::Failed,
        },
    };
    record.end(outcome, ended.as_ref().err().map(Failure::line));
    let written = folder(&session.state).and_then(|(dir, _)| {
        let written = Audit::open(&dir).and_then(|mut audit| audit.end(&mut record));
        written
            .context("the audit cannot be written")
            .map_err(Failure::Failed)
    });
    match (ended, written) {
        (Ok(_), Err(failure)) => Err(failure),
        // The job's own failure is the worse news.
        (ended, _) => ended,
    }
}

/// Reads a file that the user named: none is larger than a component may be, and one that is another's work may have no
/// end.
pub(super) fn read(path: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    let most = MAX_COMPONENT;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(most.saturating_add(1)).read_to_end(&mut bytes))
        .with_context(|| format!("the {what} {} cannot be read", path.display()))
        .map_err(Failure::Mistake)?;
    if bytes.len() as u64 > most {
        return Err(Failure::Mistake(anyhow!(
            "the {what} {} has more than the {most} bytes that are allowed",
            path.display()
        )));
    }
    Ok(bytes)
}

/// Reads a provider's settings.
pub(super) fn settings(path: &Path) -> Result<toml::Table, Failure> {
    let bytes = read(path, "provider's settings")?;
    let text = String::from_utf8(bytes).map_err(|_| {
        Failure::Mistake(anyhow!("the settings {} are no UTF-8 text", path.display()))
    })?;
    toml::from_str(&text).map_err(|error| {
        Failure::Mistake(anyhow!(
            "the settings {} are wrong: {}",
            path.display(),
            error.message()
        ))
    })
}

/// For `map_err`: not the user's mistake, unless the error says what it is.
pub(super) fn failed(error: impl Into<anyhow::Error>) -> Failure {
    Failure::of(error)
}
