//! The host's own record of one backup. That it is there means that the backup happened.

use super::block_table::TableRoot;
use super::error::{Damage, Error};
use super::name::{ArchiveId, BackupId, ComponentId, NamespaceName, ObjectName};
use super::needs::Needs;
use super::object::ObjectInfo;
use super::sealed;
use super::words::{BitmapModeWord, GuestLimitsWords, WorldWord};
use fleecebox_contract::digest::Digest;
use fleecebox_contract::{BitmapMode, GuestLimits, World};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

/// Changes when an older reader would misunderstand a manifest. Fields that it may ignore can be added without.
pub const MANIFEST_FORMAT: u32 = 1;

/// Version of the rules that a backup is made under. It grows where an older version could commit what cannot be restored,
/// or not as it was: nothing is built on such a backup without proof.
///
/// 0: until 0.1. An increment believed the bitmap of the active node, whatever became of the chain beneath it; a known
/// chunk was referred to unseen; claims were proven in other pieces than they are restored in; whether what the base
/// needs is still there was not asked.
/// 1: all of that is proven, read back or looked at.
pub const RULES: u32 = 1;

/// Longest manifest, in bytes: what lists of objects and receipts may grow to, and what a reader takes into memory.
pub const MANIFEST_LIMIT: u64 = 64 << 20;

/// One committed backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// The archive that it was written into.
    pub archive: ArchiveId,
    /// The namespace that it was written into.
    pub namespace: NamespaceName,
    /// Its own id.
    pub backup: BackupId,
    /// What the provider created, by name.
    pub objects: Vec<ObjectInfo>,
    /// What the archive counted.
    pub stats: Stats,
    /// The [`RULES`] under which it was made; 0 where it does not say.
    #[serde(default)]
    pub rules: u32,
    /// What each of [`BackupRecord::volumes`] needs, in their order; none at all where it does not say.
    #[serde(default)]
    pub needs: Vec<Needs>,
    /// What the job recorded.
    pub record: BackupRecord,
}

/// What a job says of the backup that it made; the archive adds the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// As the operator calls the VM.
    pub vm: String,
    /// The point in time, in RFC 3339. For people: nothing is decided by it.
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    /// Who made it.
    pub provider: ProviderRecord,
    /// Version of the host's program.
    pub host_version: String,
    /// In the order of the VM's disks.
    pub volumes: Vec<VolumeRecord>,
    /// What nobody ever wrote, so that versions which expect it are content.
    pub attachments: Vec<Attachment>,
    /// What the host keeps beside the volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<Kept>,
    /// Whether the volumes are as of one moment.
    #[serde(default, skip_serializing_if = "Moment::is_one")]
    pub moment: Moment,
    /// Disks of the VM that are in no volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

impl BackupRecord {
    /// Whether a disk is missing that nobody excluded.
    pub fn is_incomplete(&self) -> bool {
        self.left_out.iter().any(|disk| !disk.excluded)
    }
}

/// Of when the volumes of a backup are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// All of one moment.
    #[default]
    One,
    /// Not all: what was written in one order may be there in another.
    OneForEach,
}

impl Moment {
    fn is_one(&self) -> bool {
        *self == Self::One
    }
}

/// A disk that the VM has and a backup does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// As a volume of it would be called.
    pub name: String,
    /// Why, in words.
    pub reason: String,
    /// Whether somebody wrote down that it is not wanted.
    pub excluded: bool,
}

/// The provider of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProviderRecord {
    /// As the operator calls it.
    pub name: String,
    /// The component, kept in the namespace.
    pub component: ComponentId,
    /// The world that it is for.
    #[serde(with = "WorldWord")]
    pub world: World,
    /// What it was given (TOML), for its `image` to be given again.
    pub settings: String,
    /// What it was proven under, and so what it needs to give back what it claims.
    #[serde(with = "GuestLimitsWords")]
    pub limits: GuestLimits,
}

/// One volume of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Stable across backups, such as `drive-scsi0`.
    pub name: String,
    /// The disk behind it, to notice when another one takes its place.
    pub disk: DiskRecord,
    /// What was tracked.
    #[serde(with = "BitmapModeWord")]
    pub mode: BitmapMode,
    /// The backup that this one builds on.
    pub base: Option<BackupId>,
    /// Why the volume was read in full although an incremental was wanted.
    pub fallback: Option<String>,
    /// The bitmap that starts at this backup.
    pub bitmap: Option<String>,
    /// The block table; it also tells size and block size.
    pub root: TableRoot,
    /// What `run` returned.
    #[serde(with = "hex::serde")]
    pub receipt: Vec<u8>,
    /// Bytes that this backup had to cover.
    pub dirty_bytes: u64,
    /// Of these, zero.
    pub zero_bytes: u64,
    /// Of these, placed by the host.
    pub placed_bytes: u64,
    /// Of these, claimed by the provider.
    pub claimed_bytes: u64,
    /// Whether all that was claimed was read back.
    pub proof: Proof,
}

/// A disk as QEMU shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Such as `raw` or `qcow2`.
    pub format: String,
    /// Its image as QEMU names it, for people.
    pub identity: String,
    /// The image, then what it builds on, in this order: what a bitmap is believed by. Empty in manifests of versions
    /// that did not record it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerRecord>,
    /// Where the block begins that the bitmap which starts at this backup calls dirty from its birth. One that does not
    /// was cleared, or is another of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<u64>,
}

/// One image of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Such as `raw` or `qcow2`.
    pub format: String,
    /// As QEMU names its file.
    pub name: String,
    /// In bytes, as the guest sees it.
    pub size: u64,
    /// What tells its file from any other.
    pub file: FileRecord,
    /// The same of the file that holds its bytes, where that is another one, and its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<(String, FileRecord)>,
}

/// What tells a file from any other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum FileRecord {
    /// A file of the host.
    File {
        /// Within its file system.
        inode: u64,
        /// When the inode was made, in nanoseconds since 1970, where the file system keeps that.
        born: Option<i64>,
        /// In bytes.
        length: u64,
        /// When it was last written, in nanoseconds since 1970.
        modified: i64,
    },
    /// A block device of the host.
    Device {
        /// What stays the same over restarts of the host, where it has such a thing.
        id: Option<String>,
    },
    /// Its name is all that was known.
    Named,
    /// It could not be told from others.
    Unknown,
}

/// How far a provider's claims were checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// Every claimed block was read back with the right digest, or none was claimed.
    Proven,
    /// Only a sample was.
    Unproven,
}

/// A file of the host's in the backup, which no provider sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Such as `domain.xml`, the VM's definition in libvirt.
    pub name: ObjectName,
    /// How many it has, at most [`KEPT_LIMIT`].
    pub bytes: u64,
    /// Of all of them.
    pub digest: Digest,
}

/// Longest of them, in bytes: definitions have some ten thousand, and libvirt hands out no longer text.
pub const KEPT_LIMIT: u64 = 4 << 20;

/// An object that is kept beside the volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// As the operator calls it, such as `guest-config`.
    pub name: String,
    /// Where its bytes are.
    pub object: ObjectName,
}

/// What a backup's chunks came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Chunks that were put.
    pub chunks: u64,
    /// Of these, chunks that the namespace had already.
    pub known_chunks: u64,
    /// Bytes that were put, before encoding.
    pub put_bytes: u64,
    /// Bytes that packs grew by.
    pub stored_bytes: u64,
}

impl Manifest {
    /// As JSON with sorted keys and a digest of itself.
    pub(super) fn render(&self) -> Result<Vec<u8>, Error> {
        let bytes = sealed::seal(self)?;
        if bytes.len() as u64 > MANIFEST_LIMIT {
            return Err(Error::ManifestTooLarge {
                limit: MANIFEST_LIMIT,
                actual: bytes.len() as u64,
            });
        }
        Ok(bytes)
    }

    /// The reverse of [`Self::render`], where nothing was changed since.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Damage> {
        sealed::unseal(bytes, MANIFEST_FORMAT, "not a manifest")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use fleecebox_contract::digest::Digest;
    use proptest::prelude::*;

    pub(in super::super) fn record(volumes: Vec<VolumeRecord>) -> BackupRecord {
        BackupRecord {
            vm: "web".into(),
            created: time::macros::datetime!(2026-11-23 00:30 UTC),
            provider: ProviderRecord {
                name: "chunked".into(),
                component: ComponentId::of(b"component"),
                world: World::BlindProvider,
                settings: String::new(),
                limits: GuestLimits {
                    memory: 1 << 20,
                    cpu_ms: 1000,
                },
            },
            host_version: "0.1.0".into(),
            volumes,
            attachments: vec![],
            kept: vec![],
            moment: Moment::One,
            left_out: vec![],
        }
    }

    fn manifest() -> Manifest {
        Manifest {
            format: MANIFEST_FORMAT,
            archive: "0123456789abcdef".parse().unwrap(),
            namespace: "tenant".parse().unwrap(),
            backup: "20261123T003000Z-0123456789abcdef".parse().unwrap(),
            objects: vec![],
            stats: Stats::default(),
            rules: RULES,
            needs: vec![],
            record: record(vec![]),
        }
    }

    #[test]
    fn the_digest_is_over_sorted_compact_json() {
        let bytes = manifest().render().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with(r#"{"archive":"0123456789abcdef","backup":"20261123T"#));
        let at = text.find(r#""digest":""#).unwrap();
        let field = &text[at..at + r#""digest":"",""#.len() + 63];
        let rest = text.replacen(field, "", 1);
        assert_eq!(field[10..74], Digest::of(rest.as_bytes()).to_string());
    }

    #[test]
    fn a_manifest_of_a_later_format_is_refused_by_name() {
        let later = Manifest {
            format: 2,
            ..manifest()
        };
        let expected = Damage::Format {
            expected: 1,
            actual: 2,
        };
        assert_eq!(Manifest::parse(&later.render().unwrap()), Err(expected));
    }

    proptest! {
        #[test]
        fn every_changed_byte_is_noticed(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = manifest().render().unwrap();
            prop_assert_eq!(Manifest::parse(&bytes).unwrap(), manifest());
            let index = at.index(bytes.len());
            prop_assert!(Manifest::parse(&bytes[..index]).is_err());
            bytes[index] ^= flip;
            prop_assert!(Manifest::parse(&bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_are_no_manifest(bytes in prop::collection::vec(any::<u8>(), 0..300), text in "\\PC{0,100}") {
            prop_assert!(Manifest::parse(&bytes).is_err());
            prop_assert!(Manifest::parse(text.as_bytes()).is_err());
            let near = format!(r#"{{"format":1,"digest":{text:?}}}"#);
            prop_assert!(Manifest::parse(near.as_bytes()).is_err());
        }
    }
}
