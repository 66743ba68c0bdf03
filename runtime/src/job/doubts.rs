//! Backups that an older version made and that may not be what they say: nobody can tell it from their manifests alone.

use crate::archive::{self, BackupId, Manifest, Namespace, RULES};
use std::collections::BTreeMap;
use std::fmt;

/// What may be wrong with a backup that was made under older [`RULES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doubt {
    /// What was written where the bitmap did not see it may be in no backup. No verify finds that.
    Increment,
    /// It refers to stored bytes that it never saw. A verify reads them.
    Unseen,
    /// Its claims were proven in other pieces than they are restored in. A verify asks as a restore does.
    Claims,
}

impl Doubt {
    /// Whether a complete verify that finds nothing settles it for that backup.
    pub fn is_settled_by_verify(self) -> bool {
        self != Self::Increment
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Increment => {
                "it is incremental, and what was written before an external snapshot, or past the bitmap in another way, \
                 may be missing from it (verify cannot tell)"
            }
            Self::Unseen => "it refers to stored bytes that it did not read (verify tells)",
            Self::Claims => {
                "what its provider claims was proven in other pieces than it is restored in (verify tells)"
            }
        })
    }
}

/// What may be wrong with one backup.
pub fn of(manifest: &Manifest) -> Vec<Doubt> {
    if manifest.rules >= RULES {
        return Vec::new();
    }
    let volumes = &manifest.record.volumes;
    let incremental = volumes.iter().any(|volume| volume.base.is_some());
    let claims = volumes.iter().any(|volume| volume.claimed_bytes > 0);
    let unseen = incremental || manifest.stats.known_chunks > 0;
    [
        (Doubt::Increment, incremental),
        (Doubt::Unseen, unseen),
        (Doubt::Claims, claims),
    ]
    .into_iter()
    .filter_map(|(doubt, is_there)| is_there.then_some(doubt))
    .collect()
}

/// A backup with doubts, its own or those of what it builds on.
#[derive(Debug)]
pub struct Suspect {
    /// The backup.
    pub manifest: Manifest,
    /// What may be wrong.
    pub doubts: Vec<Doubt>,
}

/// What a look through a namespace came to, in the order of the backups' ids.
#[derive(Debug)]
pub struct Looked {
    /// Backups with doubts.
    pub suspects: Vec<Suspect>,
    /// Those that cannot be read.
    pub unreadable: Vec<(BackupId, archive::Error)>,
}

/// Looks through all backups of a namespace.
pub fn in_namespace(namespace: &Namespace) -> Result<Looked, archive::Error> {
    let mut suspects = Vec::new();
    let mut unreadable = Vec::new();
    // A base is older than what builds on it, but for a clock that went back: that one's own doubts are still told.
    let mut known = BTreeMap::<BackupId, Vec<Doubt>>::new();
    for id in namespace.backups()? {
        let manifest = match namespace.manifest(id) {
            Ok(manifest) => manifest,
            Err(error) => {
                unreadable.push((id, error));
                continue;
            }
        };
        let mut doubts = of(&manifest);
        let bases = manifest.record.volumes.iter().filter_map(|it| it.base);
        for base in bases {
            doubts.extend(known.get(&base).into_iter().flatten());
        }
        doubts.sort_unstable();
        doubts.dedup();
        if !doubts.is_empty() {
            known.insert(id, doubts.clone());
            suspects.push(Suspect { manifest, doubts });
        }
    }
    Ok(Looked {
        suspects,
        unreadable,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Archive;
    use cap_std::ambient_authority;
    use cap_std::fs::Dir;

    /// As the last release before [`RULES`] wrote them: without rules, and without needs.
    fn as_before(manifest: &Manifest) -> serde_json::Value {
        let mut value = serde_json::to_value(manifest).unwrap();
        let fields = value.as_object_mut().unwrap();
        assert!(fields.remove("rules").is_some() && fields.remove("needs").is_some());
        value
    }

    #[test]
    fn a_backup_of_an_older_version_is_a_suspect_for_what_that_version_did_not_prove() {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        let archive = Archive::create(root).unwrap();
        let namespace = archive
            .create_namespace(&"tenant".parse().unwrap())
            .unwrap();
        let commit = |second, base: Option<BackupId>| {
            let time = time::OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(second);
            let writer = namespace.begin(BackupId::random(time).unwrap()).unwrap();
            let table = writer.block_table(1 << 20, 1 << 16, None).unwrap();
            let volume = crate::archive::VolumeRecord {
                name: "da".into(),
                disk: serde_json::from_str(r#"{"format":"raw","identity":""}"#).unwrap(),
                mode: crate::contract::BitmapMode::New,
                base,
                fallback: None,
                bitmap: None,
                root: table.finish().unwrap(),
                receipt: vec![],
                dirty_bytes: 0,
                zero_bytes: 0,
                placed_bytes: 0,
                claimed_bytes: 0,
                proof: crate::archive::Proof::Proven,
            };
            let record = crate::archive::BackupRecord {
                vm: "web".into(),
                created: time,
                provider: crate::archive::ProviderRecord {
                    name: "chunked".into(),
                    component: crate::archive::ComponentId::of(b""),
                    world: crate::contract::World::BlindProvider,
                    settings: String::new(),
                    limits: crate::contract::GuestLimits {
                        memory: 0,
                        cpu_ms: 0,
                    },
                },
                host_version: String::new(),
                volumes: vec![volume],
                moment: crate::archive::Moment::One,
                left_out: Vec::new(),
                attachments: vec![],
                kept: vec![],
            };
            writer.commit(record).unwrap()
        };
        let now = commit(1, None);
        assert_eq!(of(&now), []);
        let old = |manifest: &Manifest| -> Manifest {
            serde_json::from_value(as_before(manifest)).unwrap()
        };
        assert_eq!(of(&old(&now)), []);
        let increment = commit(2, Some(now.backup));
        assert_eq!(of(&increment), []);
        let suspected = [Doubt::Increment, Doubt::Unseen];
        assert_eq!(of(&old(&increment)), suspected);
        let mut claiming = old(&now);
        claiming.record.volumes[0].claimed_bytes = 1;
        assert_eq!(of(&claiming), [Doubt::Claims]);

        // In the archive as the older version left it, and with an increment upon it.
        let path = format!(
            "namespaces/tenant/backups/{}/manifest.json",
            increment.backup
        );
        let mut value = as_before(&increment);
        let digest = blake3::hash(&serde_json::to_vec(&value).unwrap());
        value["digest"] = digest.to_hex().to_string().into();
        std::fs::write(
            folder.path().join(path),
            serde_json::to_vec(&value).unwrap(),
        )
        .unwrap();
        let upon = commit(3, Some(increment.backup));
        let Looked {
            suspects,
            unreadable,
        } = in_namespace(&namespace).unwrap();
        assert!(unreadable.is_empty(), "{unreadable:?}");
        let named: Vec<_> = suspects
            .iter()
            .map(|it| (it.manifest.backup, &it.doubts[..]))
            .collect();
        let expected = [increment.backup, upon.backup].map(|id| (id, &suspected[..]));
        assert_eq!(named, expected);
    }
}
