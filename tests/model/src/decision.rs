//! The decisions, made by the product itself: [`base::choose`] and [`base::remedies`] are asked, not rewritten.
//!
//! Only the translation between the model's small names and the product's is here, and the planted bugs that replace
//! a decision. Equal questions come from very many states, so the answers are remembered.

use crate::Bug;
use crate::archive::Archive;
use crate::qemu::{self, BLOCKS, BitmapName, BitmapPlan, Qemu};
use fleecebox::archive::{
    BackupId, BackupRecord, ComponentId, MANIFEST_FORMAT, Manifest, Proof, ProviderRecord, RULES,
    Stats, VolumeRecord,
};
use fleecebox::contract::BLOCK_SIZE;
use fleecebox::contract::{BitmapMode, World};
use fleecebox::job::base::{self, Owner, Recorded};
use fleecebox::job::lineage;
use fleecebox::qemu::bitmap::Own;
use fleecebox::qemu::{self as product, Disk};
use serde_json::json;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

const DISK: &str = "disk";
const NODE: &str = "node";
const VM: &str = "vm";

/// [`base::Choice`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Choice {
    /// For the point in time.
    pub bitmap: BitmapPlan,
    /// Present exactly where the plan is to reuse a bitmap.
    pub base: Option<u8>,
    /// Bitmaps that the new backup makes useless.
    pub stale: Vec<BitmapName>,
}

/// [`base::Remedy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Remedy {
    /// Its backup committed.
    Accept(BitmapPlan),
    /// Its backup did not commit.
    BackOut(BitmapPlan),
}

/// A committed backup, as far as a decision looks at it.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Committed {
    id: u8,
    base: Option<u8>,
    images: Vec<u8>,
}

/// What a decision is made of: whose it is, what QEMU says of its images and bitmaps, and what the archive holds.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Question {
    archive: u8,
    bitmaps: Vec<qemu::Bitmap>,
    images: Vec<u8>,
    /// Of each image below.
    below: Vec<Vec<qemu::Bitmap>>,
    busy: Option<BitmapName>,
    committed: Vec<Committed>,
}

impl Question {
    fn new(archive: u8, qemu: &Qemu, held: &Archive, bug: Option<Bug>) -> Self {
        let images = |backup: &crate::archive::Backup| match bug {
            Some(Bug::ImagesNotCompared) => qemu.chain(),
            _ => backup.images.clone(),
        };
        Self {
            archive,
            bitmaps: qemu.bitmaps.clone(),
            images: qemu.chain(),
            below: qemu
                .below
                .iter()
                .map(|below| below.bitmaps.clone())
                .collect(),
            busy: qemu.export.flatten(),
            committed: held
                .committed()
                .map(|backup| Committed {
                    id: backup.id,
                    base: backup.base,
                    images: images(backup),
                })
                .collect(),
        }
    }

    fn recorded(&self, id: BackupId) -> Recorded {
        let mut committed = self.committed.iter();
        match committed.find(|known| backup_id(known.id) == id) {
            Some(known) => Recorded::Committed(Arc::new(manifest(self.archive, known))),
            None => Recorded::Absent,
        }
    }

    fn bitmaps(&self) -> Vec<product::machine::Bitmap> {
        let busy = |bitmap: &qemu::Bitmap| self.busy == Some(bitmap.name);
        let shown = |bitmap: &qemu::Bitmap| product::machine::Bitmap {
            busy: busy(bitmap),
            ..shown(bitmap)
        };
        self.bitmaps.iter().map(shown).collect()
    }

    fn disk(&self) -> Disk {
        let mut disk = made_of(&self.images);
        disk.bitmaps = self.bitmaps();
        for (layer, bitmaps) in disk.below.iter_mut().zip(&self.below) {
            layer.bitmaps = bitmaps.iter().map(shown).collect();
        }
        disk
    }
}

fn shown(bitmap: &qemu::Bitmap) -> product::machine::Bitmap {
    product::machine::Bitmap {
        name: name(bitmap.name).to_string(),
        granularity: BLOCK_SIZE,
        dirty: u64::from(bitmap.dirty.count_ones()) * u64::from(BLOCK_SIZE),
        recording: bitmap.recording,
        busy: false,
        persistent: bitmap.stored,
        inconsistent: bitmap.inconsistent,
    }
}

/// The disk, without bitmaps.
fn made_of(images: &[u8]) -> Disk {
    let size = BLOCKS as u64 * u64::from(BLOCK_SIZE);
    let image = |&number: &u8| product::Image {
        format: "qcow2".into(),
        name: format!("{number}.qcow2"),
        size,
        identity: product::Identity::Unseen,
        data_file: None,
    };
    let layer = |number: &u8| product::Layer {
        node: number.to_string(),
        image: image(number),
        bitmaps: Vec::new(),
    };
    let (active, below) = images.split_first().expect("a disk has an image");
    Disk {
        name: DISK.into(),
        node: NODE.into(),
        size,
        format: "qcow2".into(),
        filename: format!("{active}.qcow2"),
        bitmaps: Vec::new(),
        can_persist: true,
        read_only: false,
        image: image(active),
        below: below.iter().map(layer).collect(),
        shared: false,
    }
}

/// What a run that died leaves: [`Question`], and its backup.
type Aftermath = (Question, Option<u8>);

thread_local! {
    static CHOICES: RefCell<HashMap<(Question, u8, bool), Choice>> = RefCell::default();
    static REMEDIES: RefCell<HashMap<Aftermath, Vec<Remedy>>> = RefCell::default();
}

/// What backup `id` of `archive` builds on; `full` is `--full`.
pub(crate) fn choose(
    archive: u8,
    qemu: &Qemu,
    held: &Archive,
    id: u8,
    full: bool,
    bug: Option<Bug>,
) -> Choice {
    let question = Question::new(archive, qemu, held, bug);
    if let Some(choice) = misled(&question, held, id, bug).filter(|_| !full) {
        return choice;
    }
    let asked = (question, id, full);
    CHOICES.with_borrow_mut(|choices| match choices.get(&asked) {
        Some(choice) => choice.clone(),
        None => {
            let choice = choose_anew(&asked.0, id, full);
            choices.insert(asked, choice.clone());
            choice
        }
    })
}

fn choose_anew(question: &Question, id: u8, full: bool) -> Choice {
    let disk = question.disk();
    let owner = owner(question.archive);
    let choice = base::choose(&owner, &disk, backup_id(id), BLOCK_SIZE, |id| {
        Ok(question.recorded(id))
    })
    .expect("an archive that answers and names that are short leave nothing to fail");
    let choice = match full {
        true => choice
            .in_full(&owner, &disk, backup_id(id))
            .expect("the names are short"),
        false => choice,
    };
    Choice {
        bitmap: plan(&choice.bitmap),
        base: choice.base.map(|base| small_id(&base.id().to_string())),
        stale: choice.stale.iter().map(small_name).collect(),
    }
}

/// The choice of a planted bug, where there is a bitmap for it to be wrong about.
fn misled(question: &Question, held: &Archive, id: u8, bug: Option<Bug>) -> Option<Choice> {
    let any_archive = match bug? {
        Bug::LatestBackupAsBase => false,
        Bug::AnotherArchivesBitmap => true,
        _ => return None,
    };
    let archive = question.archive;
    let old = question
        .bitmaps
        .iter()
        .find(|bitmap| bitmap.recording && (any_archive || bitmap.name.archive == archive))?;
    let latest = held.committed().map(|backup| backup.id).max()?;
    let new = BitmapName {
        archive,
        backup: id,
        base: Some(old.name.backup),
    };
    Some(Choice {
        bitmap: BitmapPlan::Reuse { old: old.name, new },
        base: Some(latest),
        stale: Vec::new(),
    })
}

/// What recovery does about the bitmaps of `archive`, where the run that died was to make the backup `dead`.
pub(crate) fn remedies(
    archive: u8,
    qemu: &Qemu,
    held: &Archive,
    dead: Option<u8>,
    bug: Option<Bug>,
) -> Vec<Remedy> {
    let question = Question::new(archive, qemu, held, bug);
    if bug == Some(Bug::AnyStoppedBitmapMerged) {
        return any_stopped(&question);
    }
    let asked = (question, dead);
    let mut remedies = REMEDIES.with_borrow_mut(|known| match known.get(&asked) {
        Some(remedies) => remedies.clone(),
        None => {
            let remedies = remedies_anew(&asked.0, dead);
            known.insert(asked, remedies.clone());
            remedies
        }
    });
    if bug == Some(Bug::UncommittedNewLeft) {
        remedies.retain(|remedy| !matches!(remedy, Remedy::BackOut(BitmapPlan::New { .. })));
    }
    remedies
}

fn remedies_anew(question: &Question, dead: Option<u8>) -> Vec<Remedy> {
    let found: Vec<_> = question
        .bitmaps
        .iter()
        .zip(question.bitmaps())
        .map(|(bitmap, state)| Own {
            node: NODE.into(),
            name: name(bitmap.name),
            state,
        })
        .collect();
    let dead = dead.map(|backup| backup_id(backup).to_string());
    let remedies = base::remedies(&owner(question.archive), &found, dead.as_deref(), |id| {
        Ok(question.recorded(id))
    })
    .expect("an archive that answers leaves nothing to fail");
    let remedy = |remedy| match remedy {
        base::Remedy::Accept { plan: at, .. } => Remedy::Accept(plan(&at)),
        base::Remedy::BackOut { plan: at, .. } => Remedy::BackOut(plan(&at)),
    };
    remedies.into_iter().map(remedy).collect()
}

fn any_stopped(question: &Question) -> Vec<Remedy> {
    let own = |bitmap: &&qemu::Bitmap| bitmap.name.archive == question.archive;
    let Some(old) = question.bitmaps.iter().find(|bitmap| !bitmap.recording) else {
        return Vec::new();
    };
    let recording = question
        .bitmaps
        .iter()
        .filter(own)
        .filter(|bitmap| bitmap.recording);
    let remedy = |new: &qemu::Bitmap| {
        let plan = BitmapPlan::Reuse {
            old: old.name,
            new: new.name,
        };
        match question
            .committed
            .iter()
            .any(|known| known.id == new.name.backup)
        {
            true => Remedy::Accept(plan),
            false => Remedy::BackOut(plan),
        }
    };
    recording.map(remedy).collect()
}

fn owner(archive: u8) -> Owner {
    Owner {
        archive: text(archive).parse().expect("sixteen digits"),
        namespace: "tenant".parse().expect("a plain name"),
        vm: VM.into(),
    }
}

fn name(name: BitmapName) -> product::BitmapName {
    let base = name.base.map(|base| backup_id(base).to_string());
    let backup = backup_id(name.backup).to_string();
    owner(name.archive)
        .bitmap(DISK, backup_id_of(&backup), base.as_deref())
        .expect("the names are short")
}

fn small_name(name: &product::BitmapName) -> BitmapName {
    BitmapName {
        archive: small_id(name.archive()),
        backup: small_id(name.backup()),
        base: name.base().map(small_id),
    }
}

fn plan(plan: &product::BitmapPlan) -> BitmapPlan {
    match plan {
        product::BitmapPlan::New { name } => BitmapPlan::New {
            name: small_name(name),
        },
        product::BitmapPlan::Reuse { old, new } => BitmapPlan::Reuse {
            old: small_name(old),
            new: small_name(new),
        },
        product::BitmapPlan::None => unreachable!("neither function plans for an untracked disk"),
    }
}

/// What the base's manifest says, as far as a choice looks at it.
fn manifest(archive: u8, committed: &Committed) -> Manifest {
    let &Committed { id, base, .. } = committed;
    let bitmap = BitmapName {
        archive,
        backup: id,
        base,
    };
    let size = BLOCKS as u64 * u64::from(BLOCK_SIZE);
    let root = json!({ "shape": { "size": size, "block_size": BLOCK_SIZE }, "page": null });
    let Owner {
        archive,
        namespace,
        vm,
    } = owner(archive);
    Manifest {
        format: MANIFEST_FORMAT,
        archive,
        namespace,
        backup: backup_id(id),
        objects: Vec::new(),
        stats: Stats::default(),
        rules: RULES,
        needs: vec![],
        record: BackupRecord {
            vm,
            created: std::time::UNIX_EPOCH.into(),
            provider: ProviderRecord {
                name: "provider".into(),
                component: ComponentId::of(b""),
                world: World::BlindProvider,
                settings: String::new(),
                limits: fleecebox::contract::GuestLimits {
                    memory: 1 << 20,
                    cpu_ms: 1000,
                },
            },
            host_version: String::new(),
            volumes: vec![VolumeRecord {
                name: DISK.into(),
                disk: lineage::record(&made_of(&committed.images)),
                mode: BitmapMode::New,
                base: base.map(backup_id),
                fallback: None,
                bitmap: Some(name(bitmap).to_string()),
                root: serde_json::from_value(root).expect("the form of a table's root"),
                receipt: Vec::new(),
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

fn text(id: u8) -> String {
    format!("{id:016x}")
}

fn backup_id(id: u8) -> BackupId {
    backup_id_of(&format!("20261123T003000Z-{}", text(id)))
}

fn backup_id_of(text: &str) -> BackupId {
    text.parse().expect("a time and sixteen digits")
}

fn small_id(text: &str) -> u8 {
    let digits = text.rsplit('-').next().unwrap_or(text);
    u8::from_str_radix(digits, 16).expect("only small ids are made")
}
