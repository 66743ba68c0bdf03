//! An archive that a target may put anything into.

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use fleecebox::archive::{
    Archive, BackupId, BackupRecord, ComponentId, DiskRecord, Manifest, Namespace, Proof,
    ProviderRecord, RULES, TableRoot, VolumeRecord,
};
use fleecebox::contract::{BitmapMode, World};
use std::path::PathBuf;
use tempfile::TempDir;
use time::OffsetDateTime;

/// The id of the backup that targets make up.
pub const BACKUP: &str = "20261123T003000Z-0123456789abcdef";

/// An archive with one namespace, in a temporary folder.
pub struct Scratch {
    /// The folder; removed with this.
    pub folder: TempDir,
    /// The namespace.
    pub namespace: Namespace,
}

impl Scratch {
    /// With nothing in it.
    pub fn new() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be made");
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority())
            .expect("a folder that was just made can be opened");
        let namespace = Archive::create(root)
            .and_then(|archive| archive.create_namespace(&"ns".parse().expect("it is a name")))
            .expect("an empty folder becomes an archive");
        Self { folder, namespace }
    }

    /// A path below the namespace's folder.
    pub fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join("namespaces/ns").join(below)
    }

    /// Writes a file below the namespace's folder.
    pub fn write(&self, below: &str, bytes: &[u8]) {
        std::fs::write(self.path(below), bytes).expect("a temporary file can be written");
    }

    /// Makes the folders of a backup of id [`BACKUP`], without a manifest.
    pub fn make_backup(&self) -> BackupId {
        std::fs::create_dir_all(self.path(&format!("backups/{BACKUP}/objects")))
            .expect("a temporary folder can be made");
        BACKUP.parse().expect("it is an id")
    }

    /// A manifest as the archive itself would write it, of one volume.
    pub fn manifest(&self, root: TableRoot) -> Manifest {
        Manifest {
            format: fleecebox::archive::MANIFEST_FORMAT,
            archive: self.namespace.archive(),
            namespace: self.namespace.name().clone(),
            backup: BACKUP.parse().expect("it is an id"),
            objects: Vec::new(),
            stats: Default::default(),
            rules: RULES,
            needs: Vec::new(),
            record: BackupRecord {
                vm: "vm".into(),
                created: OffsetDateTime::UNIX_EPOCH,
                provider: ProviderRecord {
                    name: "provider".into(),
                    component: ComponentId::of(b""),
                    world: World::Provider,
                    settings: String::new(),
                    limits: fleecebox::contract::GuestLimits {
                        memory: 1 << 20,
                        cpu_ms: 1000,
                    },
                },
                host_version: "0".into(),
                volumes: vec![VolumeRecord {
                    name: "scsi0".into(),
                    disk: DiskRecord {
                        format: "raw".into(),
                        identity: "disk".into(),
                        layers: Vec::new(),
                        mark: None,
                    },
                    mode: BitmapMode::New,
                    base: None,
                    fallback: None,
                    bitmap: None,
                    root,
                    receipt: vec![1, 2, 3],
                    dirty_bytes: 0,
                    zero_bytes: 0,
                    placed_bytes: 0,
                    claimed_bytes: 0,
                    proof: Proof::Proven,
                }],
                attachments: Vec::new(),
                kept: Vec::new(),
                moment: fleecebox::archive::Moment::One,
                left_out: Vec::new(),
            },
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}
