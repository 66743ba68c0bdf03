use super::*;
use crate::archive::{
    BackupRecord, MANIFEST_FORMAT, Proof, ProviderRecord, RULES, Stats, TableRoot,
};
use crate::contract::{BitmapMode, World};
use crate::qemu::machine::Bitmap;
use crate::qemu::{Identity, Image};
use proptest::prelude::*;
use std::collections::BTreeSet;
use time::OffsetDateTime;

const SIZE: u64 = 64 << 20;
const BLOCK: u32 = 64 << 10;
const ARCHIVE: &str = "00000000000000a1";
const VOLUME: &str = "web/disk0";

fn owner() -> Owner {
    Owner {
        archive: ARCHIVE.parse().unwrap(),
        namespace: "ours".parse().unwrap(),
        vm: "web".into(),
    }
}

/// Backups are known by small numbers.
fn id(number: u8) -> BackupId {
    format!("20261123T0200{number:02}Z-00000000000000{number:02x}")
        .parse()
        .unwrap()
}

fn name(of: &Of, backup: u8, base: Option<u8>) -> BitmapName {
    let (archive, namespace, volume) = match of {
        Of::Ours => (ARCHIVE, "ours", VOLUME),
        Of::AnotherArchive => ("00000000000000b2", "ours", VOLUME),
        Of::AnotherNamespace => (ARCHIVE, "theirs", VOLUME),
        Of::AnotherDisk => (ARCHIVE, "ours", "web/disk1"),
        Of::AnotherVm => (ARCHIVE, "ours", "mail/disk0"),
    };
    let base = base.map(|base| id(base).to_string());
    let backup = id(backup).to_string();
    BitmapName::new(archive, namespace, volume, &backup, base.as_deref()).unwrap()
}

/// Whose a bitmap is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Of {
    Ours,
    AnotherArchive,
    AnotherNamespace,
    AnotherDisk,
    AnotherVm,
}

#[derive(Debug, Clone)]
struct Made {
    of: Of,
    backup: u8,
    base: Option<u8>,
    state: Bitmap,
}

impl Made {
    fn name(&self) -> BitmapName {
        name(&self.of, self.backup, self.base)
    }
}

fn bitmap(name: &BitmapName, recording: bool) -> Bitmap {
    Bitmap {
        name: name.to_string(),
        granularity: BLOCK,
        dirty: 0,
        recording,
        busy: false,
        persistent: false,
        inconsistent: false,
    }
}

fn made() -> impl Strategy<Value = Made> {
    let of = prop_oneof![
        4 => Just(Of::Ours),
        1 => Just(Of::AnotherArchive),
        1 => Just(Of::AnotherNamespace),
        1 => Just(Of::AnotherDisk),
        1 => Just(Of::AnotherVm),
    ];
    let flags = (
        any::<bool>(),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.1),
    );
    let sizes = (
        0..4u64,
        prop_oneof![Just(4096), Just(BLOCK), Just(2 * BLOCK)],
    );
    (of, 0..5u8, prop::option::of(0..5u8), flags, sizes).prop_map(
        |(of, backup, base, (recording, busy, inconsistent), (dirty, granularity))| Made {
            state: Bitmap {
                granularity,
                dirty,
                busy,
                inconsistent,
                // As QEMU shows one.
                ..bitmap(&name(&of, backup, base), recording && !inconsistent)
            },
            of,
            backup,
            base,
        },
    )
}

/// Names are unique on a node.
fn bitmaps() -> impl Strategy<Value = Vec<Made>> {
    prop::collection::vec(made(), 0..6).prop_map(|mut all| {
        let mut seen = BTreeSet::new();
        all.retain(|made| seen.insert(made.name()));
        all
    })
}

/// What the archive says of one backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    Committed,
    OfAnotherBitmap,
    OfAnotherSize,
    WithoutTheDisk,
    Exported,
    ExportedOfAnotherBitmap,
    ExportedOfAnotherSize,
    ExportedWithoutTheDisk,
    Damaged,
    Absent,
}

fn archive() -> impl Strategy<Value = Vec<Says>> {
    let says = prop_oneof![
        4 => Just(Says::Committed),
        1 => Just(Says::OfAnotherBitmap),
        1 => Just(Says::OfAnotherSize),
        1 => Just(Says::WithoutTheDisk),
        2 => Just(Says::Exported),
        1 => Just(Says::ExportedOfAnotherBitmap),
        1 => Just(Says::ExportedOfAnotherSize),
        1 => Just(Says::ExportedWithoutTheDisk),
        1 => Just(Says::Damaged),
        2 => Just(Says::Absent),
    ];
    prop::collection::vec(says, 5)
}

fn root(size: u64) -> TableRoot {
    let shape = serde_json::json!({ "size": size, "block_size": BLOCK });
    serde_json::from_value(serde_json::json!({ "shape": shape, "page": null })).unwrap()
}

/// The archive's word on a backup, whose manifest speaks of the bitmap `of_bitmap` where it is sound.
fn recorded(says: Says, backup: BackupId, of_bitmap: &str) -> Recorded {
    let (name, size, bitmap) = match says {
        Says::Absent => return Recorded::Absent,
        Says::Damaged => {
            return Recorded::Damaged {
                reason: "torn".into(),
            };
        }
        Says::Committed | Says::Exported => ("disk0", SIZE, of_bitmap),
        Says::OfAnotherBitmap | Says::ExportedOfAnotherBitmap => ("disk0", SIZE, "another"),
        Says::OfAnotherSize | Says::ExportedOfAnotherSize => ("disk0", SIZE / 2, of_bitmap),
        Says::WithoutTheDisk | Says::ExportedWithoutTheDisk => ("disk7", SIZE, of_bitmap),
    };
    let is_backup = matches!(
        says,
        Says::Committed | Says::OfAnotherBitmap | Says::OfAnotherSize | Says::WithoutTheDisk
    );
    if !is_backup {
        let disk = ExportedDisk {
            name: name.into(),
            size,
            disk: lineage::record(&disk(&[])),
            base: None,
            bitmap: Some(bitmap.into()),
        };
        return Recorded::Exported(Arc::new(ExportRecord {
            vm: "web".into(),
            created: OffsetDateTime::UNIX_EPOCH,
            host_version: String::new(),
            disks: vec![disk],
        }));
    }
    let volume = VolumeRecord {
        name: name.into(),
        disk: lineage::record(&disk(&[])),
        mode: BitmapMode::New,
        base: None,
        fallback: None,
        bitmap: Some(bitmap.into()),
        root: root(size),
        receipt: Vec::new(),
        dirty_bytes: 0,
        zero_bytes: 0,
        placed_bytes: 0,
        claimed_bytes: 0,
        proof: Proof::Proven,
    };
    Recorded::Committed(Arc::new(Manifest {
        format: MANIFEST_FORMAT,
        archive: ARCHIVE.parse().unwrap(),
        namespace: "ours".parse().unwrap(),
        backup,
        objects: Vec::new(),
        stats: Stats::default(),
        rules: RULES,
        needs: vec![],
        record: BackupRecord {
            vm: "web".into(),
            created: OffsetDateTime::UNIX_EPOCH,
            provider: ProviderRecord {
                name: "chunked".into(),
                component: crate::archive::ComponentId::of(b""),
                world: World::BlindProvider,
                settings: String::new(),
                limits: crate::contract::GuestLimits {
                    memory: 1 << 20,
                    cpu_ms: 1000,
                },
            },
            host_version: String::new(),
            volumes: vec![volume],
            moment: crate::archive::Moment::One,
            left_out: Vec::new(),
            attachments: Vec::new(),
            kept: Vec::new(),
        },
    }))
}

fn disk(bitmaps: &[Made]) -> Disk {
    Disk {
        name: "disk0".into(),
        node: "node0".into(),
        size: SIZE,
        format: "raw".into(),
        filename: "disk0.raw".into(),
        bitmaps: bitmaps.iter().map(|made| made.state.clone()).collect(),
        can_persist: false,
        read_only: false,
        image: Image {
            format: "raw".into(),
            name: "disk0.raw".into(),
            size: SIZE,
            identity: Identity::Unseen,
            data_file: None,
        },
        below: Vec::new(),
        shared: false,
    }
}

/// Asks `says` about a backup, with manifests that speak of the bitmap of that backup among `bitmaps`.
fn ask<'a>(
    says: &'a [Says],
    bitmaps: &'a [Made],
) -> impl FnMut(BackupId) -> Result<Recorded, archive::Error> + 'a {
    move |wanted| {
        let number = (0..5).find(|&number| id(number) == wanted).unwrap();
        let ours = |made: &&Made| made.of == Of::Ours && made.backup == number;
        let bitmap = bitmaps
            .iter()
            .find(ours)
            .map(|made| made.name().to_string());
        Ok(recorded(
            says[usize::from(number)],
            wanted,
            &bitmap.unwrap_or_default(),
        ))
    }
}

/// Whether `made` may be built on, said anew and plainly.
fn is_sound(made: &Made, bitmaps: &[Made], says: &[Says]) -> bool {
    let first = bitmaps
        .iter()
        .find(|other| other.of == Of::Ours && other.backup == made.backup)
        .is_some_and(|other| other.name() == made.name());
    made.of == Of::Ours
        && first
        && made.state.recording
        && !made.state.busy
        && !made.state.inconsistent
        && made.state.granularity <= BLOCK
        && matches!(
            says[usize::from(made.backup)],
            Says::Committed | Says::Exported
        )
}

proptest! {
    #[test]
    fn only_a_sound_bitmap_of_ours_is_built_on_and_only_on_its_own_backup(bitmaps in bitmaps(), says in archive()) {
        let new = id(9);
        let new_id = new.to_string();
        let choice = choose(&owner(), &disk(&bitmaps), new, BLOCK, ask(&says, &bitmaps)).unwrap();
        let sound: Vec<_> = bitmaps.iter().filter(|made| is_sound(made, &bitmaps, &says)).collect();
        let own: BTreeSet<_> = bitmaps.iter().filter(|made| made.of == Of::Ours).map(Made::name).collect();
        let mut stale: BTreeSet<_> = choice.stale.iter().cloned().collect();
        prop_assert_eq!(stale.len(), choice.stale.len());
        match (&choice.bitmap, &choice.base) {
            (BitmapPlan::Reuse { old, new: started }, Some(base)) => {
                let chosen = sound.iter().find(|made| made.name() == *old);
                prop_assert!(chosen.is_some(), "{old} is not sound");
                prop_assert!(sound.iter().all(|made| made.state.dirty >= chosen.unwrap().state.dirty));
                prop_assert_eq!(base.id().to_string(), old.backup());
                prop_assert_eq!(started.base(), Some(old.backup()));
                prop_assert_eq!(started.backup(), new.to_string());
                prop_assert_eq!(&choice.reason, &None);
                prop_assert!(stale.insert(old.clone()), "what is built on is not stale");
            }
            (BitmapPlan::New { name }, None) => {
                prop_assert!(sound.is_empty());
                prop_assert_eq!((name.backup(), name.base()), (new_id.as_str(), None));
                prop_assert_eq!(choice.reason.is_some(), bitmaps.iter().any(|made| {
                    !matches!(made.of, Of::AnotherArchive | Of::AnotherNamespace)
                }));
            }
            other => prop_assert!(false, "{other:?}"),
        }
        // After the commit exactly the new one is left of ours; other people's stay.
        prop_assert_eq!(stale, own);
    }

    #[test]
    fn only_a_bitmap_and_the_one_that_it_continues_are_ever_merged(
        nodes in prop::collection::vec(bitmaps(), 1..3),
        says in archive(),
        dead in prop::option::of(0..5u8),
    ) {
        let dead = dead.map(|number| id(number).to_string());
        let found: Vec<Own> = (0..)
            .zip(&nodes)
            .flat_map(|(node, bitmaps)| bitmaps.iter().map(move |made| Own {
                node: format!("node{node}"),
                name: made.name(),
                state: made.state.clone(),
            }))
            .collect();
        let remedies = remedies(&owner(), &found, dead.as_deref(), |wanted| {
            let number = (0..5u8).find(|&number| id(number) == wanted).unwrap();
            Ok(recorded(says[usize::from(number)], wanted, ""))
        }).unwrap();
        let mut touched = BTreeSet::new();
        for remedy in &remedies {
            let (node, plan, kept) = match remedy {
                Remedy::Accept { node, plan } => (node, plan, true),
                Remedy::BackOut { node, plan } => (node, plan, false),
            };
            let (old, new) = match plan {
                BitmapPlan::Reuse { old, new } => (old, new),
                BitmapPlan::New { name } => {
                    let number = (0..5u8).find(|&number| id(number).to_string() == name.backup()).unwrap();
                    prop_assert_eq!(says[usize::from(number)], Says::Absent);
                    prop_assert!(!kept && owner().owns(name));
                    prop_assert_eq!(dead.as_deref(), Some(name.backup()));
                    prop_assert!(touched.insert((node, name)), "twice");
                    continue;
                }
                BitmapPlan::None => return Err(TestCaseError::fail("a remedy for nothing")),
            };
            prop_assert_eq!(Some(old.backup()), new.base());
            prop_assert_eq!(old.volume(), new.volume());
            prop_assert!(owner().owns(old) && owner().owns(new));
            let state = |name: &BitmapName| &found.iter().find(|own| own.node == *node && own.name == *name).unwrap().state;
            prop_assert!(!state(old).recording && state(new).recording);
            let number = (0..5u8).find(|&number| id(number).to_string() == new.backup()).unwrap();
            let says = says[usize::from(number)];
            prop_assert_eq!(kept, !matches!(says, Says::Damaged | Says::Absent));
            prop_assert!(touched.insert((node, new)), "twice");
        }
    }
}

#[test]
fn a_pair_is_settled_as_its_backup_was() {
    let made = |backup, base, recording| Own {
        node: "node0".into(),
        name: name(&Of::Ours, backup, base),
        state: bitmap(&name(&Of::Ours, backup, base), recording),
    };
    let (old, new) = (made(1, None, false), made(2, Some(1), true));
    let plan = BitmapPlan::Reuse {
        old: old.name.clone(),
        new: new.name.clone(),
    };
    let node = || "node0".to_string();
    let found = [old, new];
    for (says, expected) in [
        (
            Says::Committed,
            Remedy::Accept {
                node: node(),
                plan: plan.clone(),
            },
        ),
        (
            Says::Exported,
            Remedy::Accept {
                node: node(),
                plan: plan.clone(),
            },
        ),
        (
            Says::Damaged,
            Remedy::BackOut {
                node: node(),
                plan: plan.clone(),
            },
        ),
        (
            Says::Absent,
            Remedy::BackOut {
                node: node(),
                plan: plan.clone(),
            },
        ),
    ] {
        let settled = remedies(&owner(), &found, None, |backup| {
            Ok(recorded(says, backup, ""))
        })
        .unwrap();
        assert_eq!(settled, [expected], "{says:?}");
    }
}

#[test]
fn a_full_backup_that_died_leaves_no_bitmap_that_nothing_can_be_built_on() {
    let name = name(&Of::Ours, 1, None);
    let found = [Own {
        node: "node0".into(),
        state: bitmap(&name, true),
        name: name.clone(),
    }];
    let settled = |dead: BackupId, says| {
        let dead = dead.to_string();
        remedies(&owner(), &found, Some(&dead), |id| {
            Ok(recorded(says, id, ""))
        })
        .unwrap()
    };
    let removed = Remedy::BackOut {
        node: "node0".into(),
        plan: BitmapPlan::New { name: name.clone() },
    };
    assert_eq!(settled(id(1), Says::Absent), [removed]);
    assert_eq!(settled(id(1), Says::Committed), []);
    assert_eq!(settled(id(1), Says::Damaged), []);
    // A base that left the archive is no dead run's.
    assert_eq!(settled(id(2), Says::Absent), []);
}

#[test]
fn an_archive_that_cannot_be_asked_stops_everything() {
    let unreadable = |_| Err(archive::Error::NotAnArchive);
    let of = |backup, base, recording| Made {
        of: Of::Ours,
        backup,
        base,
        state: bitmap(&name(&Of::Ours, backup, base), recording),
    };
    let bitmaps = [of(1, None, false), of(2, Some(1), true)];
    let found = bitmaps.clone().map(|made| Own {
        node: "node0".into(),
        name: made.name(),
        state: made.state,
    });
    assert!(choose(&owner(), &disk(&bitmaps), id(9), BLOCK, unreadable).is_err());
    assert!(remedies(&owner(), &found, None, unreadable).is_err());
}

#[test]
fn a_full_backup_that_was_asked_for_makes_its_base_useless() {
    let only = Made {
        of: Of::Ours,
        backup: 1,
        base: None,
        state: bitmap(&name(&Of::Ours, 1, None), true),
    };
    let (bitmaps, says) = ([only], [Says::Committed; 5]);
    let disk = disk(&bitmaps);
    let choice = choose(&owner(), &disk, id(9), BLOCK, ask(&says, &bitmaps)).unwrap();
    let full = choice.in_full(&owner(), &disk, id(9)).unwrap();
    assert_eq!(
        full.bitmap,
        BitmapPlan::New {
            name: name(&Of::Ours, 9, None)
        }
    );
    assert_eq!(full.stale, [name(&Of::Ours, 1, None)]);
    assert!(full.base.is_none() && full.reason.is_some());
}

#[test]
fn nothing_is_built_on_a_backup_that_an_older_version_made() {
    let only = Made {
        of: Of::Ours,
        backup: 1,
        base: None,
        state: bitmap(&name(&Of::Ours, 1, None), true),
    };
    let (bitmaps, says) = ([only], [Says::Committed; 5]);
    let disk = disk(&bitmaps);
    let mut now = ask(&says, &bitmaps);
    let before = |id| {
        Ok(match now(id)? {
            Recorded::Committed(manifest) => {
                let mut manifest = Manifest::clone(&manifest);
                manifest.rules = 0;
                Recorded::Committed(Arc::new(manifest))
            }
            other => other,
        })
    };
    let choice = choose(&owner(), &disk, id(9), BLOCK, before).unwrap();
    assert!(choice.base.is_none());
    assert_eq!(choice.stale, [name(&Of::Ours, 1, None)]);
    assert!(
        choice
            .reason
            .is_some_and(|reason| reason.contains("version"))
    );
}
