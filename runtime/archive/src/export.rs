//! The record of an export: a point in time that a tool has, for the next one to build on. The bytes are the tool's, so
//! that there is nothing but the record.

use super::directory;
use super::error::{Damage, Error};
use super::manifest::DiskRecord;
use super::name::{ArchiveId, BackupId, NamespaceName};
use super::namespace::Namespace;
use super::sealed;
use serde::{Deserialize, Serialize};
use std::io;
use time::OffsetDateTime;

/// Changes when an older reader would misunderstand a record. Fields that it may ignore can be added without.
const FORMAT: u32 = 1;

/// Longest record, in bytes: far more than all disks that a VM can have make.
const LIMIT: u64 = 16 << 20;

/// In the namespace's directory, a file for each.
const EXPORTS: &str = "exports";

/// What a tool has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRecord {
    /// As the operator calls the VM.
    pub vm: String,
    /// When the tool said so, in RFC 3339. For people: nothing is decided by it.
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    /// Version of the host's program.
    pub host_version: String,
    /// In the order of the VM's disks.
    pub disks: Vec<ExportedDisk>,
}

/// One disk of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedDisk {
    /// As a volume of it is called in backups.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// The disk, to notice when another one takes its place.
    pub disk: DiskRecord,
    /// The export that its dirty regions were since; none where all of it was dirty.
    pub base: Option<BackupId>,
    /// The bitmap that starts at this point in time.
    pub bitmap: Option<String>,
}

/// The file: the record, and what it belongs to.
#[derive(Serialize, Deserialize)]
struct ExportFile {
    format: u32,
    archive: ArchiveId,
    namespace: NamespaceName,
    export: BackupId,
    record: ExportRecord,
}

impl Namespace {
    /// Keeps the record, durably. After any error but [`Error::CommitUnknown`] it is not there.
    pub fn record_export(&self, export: BackupId, record: ExportRecord) -> Result<(), Error> {
        let root = &self.store().root;
        let dir = directory::open_or_make_dir(root, EXPORTS).map_err(Error::at(EXPORTS))?;
        directory::sync(root).map_err(Error::at(EXPORTS))?;
        let file = ExportFile {
            format: FORMAT,
            archive: self.archive(),
            namespace: self.name().clone(),
            export,
            record,
        };
        let json = sealed::seal(&file)?;
        let (name, temporary) = (file_name(export), directory::temporary(export, EXPORTS));
        directory::write_new(&dir, &temporary, &json).map_err(Error::at(&name))?;
        dir.rename(&temporary, &dir, &name)
            .and_then(|()| directory::sync(&dir))
            .map_err(|source| Error::CommitUnknown { source })
    }

    /// The record of an export, made durable before it is believed, as with [`Namespace::durable_manifest`].
    /// [`Error::NotFound`] means that there is none, and [`Error::Damaged`] that there was one.
    pub fn durable_export(&self, export: BackupId) -> Result<ExportRecord, Error> {
        let dir = self.store().root.open_dir(EXPORTS);
        let dir = dir.map_err(Error::at(EXPORTS))?;
        let name = file_name(export);
        let json = directory::read(&dir, &name, LIMIT)?;
        let path = format!("{EXPORTS}/{name}");
        let file = sealed::unseal::<ExportFile>(&json, FORMAT, "no record of an export");
        let file = file.map_err(Error::damaged(&path))?;
        let actual = (file.archive, &file.namespace, file.export);
        let expected = (self.archive(), self.name(), export);
        if actual != expected {
            return Err(Error::damaged(&path)(Damage::Foreign {
                expected: format!("{expected:?}"),
                actual: format!("{actual:?}"),
            }));
        }
        directory::sync(&dir).map_err(Error::at(&path))?;
        Ok(file.record)
    }

    /// Removes what is left of a record that was never there.
    pub(super) fn discard_unrecorded_export(&self, export: BackupId) -> Result<(), Error> {
        match self.store().root.open_dir(EXPORTS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            dir => dir
                .and_then(|dir| directory::remove_temporaries(&dir, export))
                .map_err(Error::at(EXPORTS)),
        }
    }
}

fn file_name(export: BackupId) -> String {
    format!("{export}.json")
}

#[cfg(test)]
mod tests {
    use super::super::Archive;
    use super::*;
    use cap_std::ambient_authority;
    use cap_std::fs::Dir;

    fn record() -> ExportRecord {
        ExportRecord {
            vm: "web".into(),
            created: OffsetDateTime::UNIX_EPOCH,
            host_version: "1".into(),
            disks: vec![ExportedDisk {
                name: "scsi0".into(),
                size: 1 << 30,
                disk: DiskRecord {
                    format: "qcow2".into(),
                    identity: "/disk".into(),
                    layers: Vec::new(),
                    mark: None,
                },
                base: None,
                bitmap: Some("bitmap".into()),
            }],
        }
    }

    #[test]
    fn a_record_reads_back_and_is_no_backup_nor_another_exports() {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        let archive = Archive::create(root.try_clone().unwrap()).unwrap();
        let tool = archive.create_namespace(&"tool".parse().unwrap()).unwrap();
        let id = || BackupId::random(OffsetDateTime::UNIX_EPOCH).unwrap();
        let (export, other) = (id(), id());
        let missing = |id| matches!(tool.durable_export(id), Err(Error::NotFound { .. }));
        assert!(missing(export));
        tool.record_export(export, record()).unwrap();
        assert_eq!(tool.durable_export(export).unwrap(), record());
        assert!(missing(other));
        assert_eq!(tool.backups().unwrap(), []);
        assert!(tool.manifest(export).is_err());
        // Under another's name it is not believed, nor is what is changed, cut short or of a format to come.
        let exports = root.open_dir("namespaces/tool/exports").unwrap();
        let mut json = exports.read_to_string(file_name(export)).unwrap();
        let damaged = |text: &str| {
            exports.write(file_name(other), text).unwrap();
            matches!(tool.durable_export(other), Err(Error::Damaged { .. }))
        };
        assert!(damaged(&json));
        assert!(damaged(&json.replace("\"format\":1", "\"format\":2")));
        assert!(damaged(&json.replace("scsi0", "scsi1")));
        json.truncate(json.len() / 2);
        assert!(damaged(&json));
    }

    #[test]
    fn what_a_record_that_never_appeared_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        let archive = Archive::create(root.try_clone().unwrap()).unwrap();
        let tool = archive.create_namespace(&"tool".parse().unwrap()).unwrap();
        let export = BackupId::random(OffsetDateTime::UNIX_EPOCH).unwrap();
        tool.discard_uncommitted(export).unwrap();
        tool.record_export(export, record()).unwrap();
        let exports = root.open_dir("namespaces/tool/exports").unwrap();
        let torn = directory::temporary(export, EXPORTS);
        exports.write(&torn, "{").unwrap();
        tool.discard_uncommitted(export).unwrap();
        assert!(!exports.exists(&torn));
        assert_eq!(tool.durable_export(export).unwrap(), record());
    }
}
