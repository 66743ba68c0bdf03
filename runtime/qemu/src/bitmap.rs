//! Dirty bitmaps of ours: their names, and the switch from the old to the new.
//!
//! A bitmap is never cleared. Each backup adds a new one at its point in time and stops the old one in
//! the same transaction; afterwards either the old one goes ([`accept`]) or the new one is poured back
//! into it ([`back_out`]). So at every moment some set of bitmaps holds every change since the base.

use super::image::Layer;
use super::machine::{self, Bitmap};
use super::monitor::{Monitor, MonitorError};
use super::present;
use super::snapshot::Plan;
use serde_json::{Value, json};
use std::fmt;

/// Begins the name of every bitmap of ours.
const PREFIX: &str = "fleecebox";

/// Between the parts of a name; no part may hold it.
const SEPARATOR: char = ':';

/// Longest name that qcow2 stores (docs/interop/qcow2: `name_size` is at most 1023).
const NAME_MAX: usize = 1023;

/// Stands for the base of a backup that has none. It is no id of a backup.
const NO_BASE: &str = "-";

/// Whose a bitmap is: what was written since `backup` was made, which itself builds on `base`.
///
/// The base is in the name because it says which bitmap stopped when this one started: after a crash these two, and
/// no others, may be merged.
///
/// A bitmap travels with its qcow2 file, from disk to disk and from VM to VM, so its name says all
/// that has to be compared before it is believed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitmapName {
    archive: String,
    namespace: String,
    volume: String,
    backup: String,
    base: Option<String>,
}

/// Why parts do not make the name of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BitmapNameError {
    /// A part is empty, holds a colon, or something other than printable ASCII.
    #[error(
        "{part:?} cannot be part of a bitmap's name: one or more printable ASCII characters without a colon are expected"
    )]
    Part {
        /// The part.
        part: String,
    },
    /// The whole name is longer than qcow2 stores.
    #[error("the bitmap's name would have {actual} bytes, at most {NAME_MAX} can be stored")]
    TooLong {
        /// Its length.
        actual: usize,
    },
}

impl BitmapName {
    /// The name for these parts: ids of the archive, of the namespace in it, of the volume (VM and
    /// disk), of the backup at whose point in time the bitmap started, and of that backup's base.
    ///
    /// # Errors
    /// Any [`BitmapNameError`].
    pub fn new(
        archive: &str,
        namespace: &str,
        volume: &str,
        backup: &str,
        base: Option<&str>,
    ) -> Result<Self, BitmapNameError> {
        for part in [archive, namespace, volume, backup, base.unwrap_or(NO_BASE)] {
            let allowed = |b: u8| (b' '..=b'~').contains(&b) && b != SEPARATOR as u8;
            if part.is_empty() || !part.bytes().all(allowed) {
                return Err(BitmapNameError::Part { part: part.into() });
            }
        }
        let name = Self {
            archive: archive.into(),
            namespace: namespace.into(),
            volume: volume.into(),
            backup: backup.into(),
            base: base.map(Into::into),
        };
        match name.to_string().len() {
            0..=NAME_MAX => Ok(name),
            actual => Err(BitmapNameError::TooLong { actual }),
        }
    }

    /// Reads a name back; nothing where it is not one of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<_> = text.split(SEPARATOR).collect();
        match parts[..] {
            [PREFIX, archive, namespace, volume, backup, base] => {
                let base = (base != NO_BASE).then_some(base);
                Self::new(archive, namespace, volume, backup, base).ok()
            }
            _ => None,
        }
    }

    /// The archive that holds the base.
    pub fn archive(&self) -> &str {
        &self.archive
    }

    /// The namespace in it.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The VM and disk.
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// The backup since which it follows writes.
    pub fn backup(&self) -> &str {
        &self.backup
    }

    /// The backup that [`Self::backup`] builds on: the bitmap since that one stopped when this one started.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            archive,
            namespace,
            volume,
            backup,
            base,
        } = self;
        let base = base.as_deref().unwrap_or(NO_BASE);
        write!(f, "{PREFIX}:{archive}:{namespace}:{volume}:{backup}:{base}")
    }
}

/// What happens to a disk's bitmaps at the point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapPlan {
    /// Nothing is tracked.
    None,
    /// Tracking starts; the whole disk is read.
    New {
        /// Bitmap to add.
        name: BitmapName,
    },
    /// Only what `old` calls dirty is read.
    Reuse {
        /// Bitmap to stop and to export.
        old: BitmapName,
        /// Bitmap to add.
        new: BitmapName,
    },
}

impl BitmapPlan {
    /// The bitmap that the backup reads by.
    pub fn old(&self) -> Option<&BitmapName> {
        match self {
            Self::None | Self::New { .. } => None,
            Self::Reuse { old, .. } => Some(old),
        }
    }

    /// The bitmap that starts with this backup.
    pub fn new_bitmap(&self) -> Option<&BitmapName> {
        match self {
            Self::None => None,
            Self::New { name } => Some(name),
            Self::Reuse { new, .. } => Some(new),
        }
    }
}

/// How tracking stands after [`back_out`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// As if the backup had not been tried.
    Restored,
    /// The old bitmap cannot be made whole and was removed: the next backup reads the disk in full.
    Lost,
}

/// A bitmap of ours and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// The block node.
    pub node: String,
    /// Its name, read.
    pub name: BitmapName,
    /// Its state.
    pub state: Bitmap,
}

/// Every bitmap of ours on every node that can be written, for recovery, which decides by asking the archive what
/// committed. One on a node below an overlay cannot be changed; its name stays true of that image, so it may be believed
/// again once the overlay is merged into the image or thrown away.
///
/// # Errors
/// Those of [`Monitor::query`].
pub async fn find(monitor: &Monitor) -> Result<Vec<Own>, MonitorError> {
    let nodes = present::nodes(monitor).await?;
    let writable = nodes.iter().filter(|node| !node.read_only);
    let own = writable.flat_map(|node| {
        machine::bitmaps(node).into_iter().filter_map(|state| {
            Some(Own {
                node: node.name.clone(),
                name: BitmapName::parse(&state.name)?,
                state,
            })
        })
    });
    Ok(own.collect())
}

/// After the commit: the old bitmap goes, the new one is the base. Does nothing where it is gone already.
///
/// # Errors
/// Those of [`Monitor::execute_raw`]; a bitmap that is still exported is refused.
pub async fn accept(monitor: &Monitor, node: &str, plan: &BitmapPlan) -> Result<(), MonitorError> {
    match plan.old() {
        Some(old) => remove(monitor, node, old).await,
        None => Ok(()),
    }
}

/// After a failure, once the exports are gone: tracking becomes what it was before the point in time.
/// May be called at any time later, also where the point in time was never reached.
///
/// # Errors
/// Those of [`Monitor::execute_raw`]; a bitmap that is still exported is refused.
pub async fn back_out(
    monitor: &Monitor,
    node: &str,
    plan: &BitmapPlan,
) -> Result<Tracking, MonitorError> {
    match plan {
        BitmapPlan::None => Ok(Tracking::Restored),
        BitmapPlan::New { name } => {
            remove(monitor, node, name).await?;
            Ok(Tracking::Restored)
        }
        BitmapPlan::Reuse { old, new } => pour_back(monitor, node, old, new).await,
    }
}

/// Removes one bitmap, where it is there.
///
/// # Errors
/// As [`back_out`].
pub async fn remove(monitor: &Monitor, node: &str, name: &BitmapName) -> Result<(), MonitorError> {
    match state(monitor, node, name).await? {
        Some(_) => {
            let bitmap = json!({ "node": node, "name": name.to_string() });
            monitor
                .execute_raw("block-dirty-bitmap-remove", bitmap)
                .await
                .map(drop)
        }
        None => Ok(()),
    }
}

async fn pour_back(
    monitor: &Monitor,
    node: &str,
    old: &BitmapName,
    new: &BitmapName,
) -> Result<Tracking, MonitorError> {
    let before = state(monitor, node, old).await?;
    let since = state(monitor, node, new).await?;
    match (before, since) {
        // The point in time was never reached, or this was done before.
        (Some(before), None) if before.recording && !before.inconsistent => Ok(Tracking::Restored),
        (Some(before), Some(since))
            if since.recording && !since.inconsistent && !before.inconsistent =>
        {
            // Enabled first: a write between the other two would be in neither otherwise.
            let actions = json!([
                action("enable", node, old),
                merge(node, old, &[(node, new)]),
                action("remove", node, new),
            ]);
            monitor
                .execute_raw("transaction", json!({ "actions": actions }))
                .await?;
            Ok(Tracking::Restored)
        }
        // Writes since the point in time are known to nobody, or those before it are not.
        _ => {
            remove(monitor, node, new).await?;
            remove(monitor, node, old).await?;
            Ok(Tracking::Lost)
        }
    }
}

async fn state(
    monitor: &Monitor,
    node: &str,
    name: &BitmapName,
) -> Result<Option<Bitmap>, MonitorError> {
    let nodes = present::nodes(monitor).await?;
    let name = name.to_string();
    Ok(nodes
        .iter()
        .filter(|present| present.name == node)
        .flat_map(machine::bitmaps)
        .find(|bitmap| bitmap.name == name))
}

/// The bitmaps' part of a point in time: every add, then every disable, then what the images below an old bitmap's know
/// of the time before they got an overlay. They are read-only, so nothing falls between.
pub(super) fn switch(plans: &[Plan], granularity: u32) -> Vec<Value> {
    let adds = plans.iter().filter_map(|plan| {
        let mut data = json!({
            "node": plan.disk.node,
            "name": plan.bitmap.new_bitmap()?.to_string(),
            "granularity": granularity,
        });
        if plan.disk.can_persist {
            data["persistent"] = json!(true);
        }
        Some(json!({ "type": "block-dirty-bitmap-add", "data": data }))
    });
    let disables = plans
        .iter()
        .filter_map(|plan| Some(action("disable", &plan.disk.node, plan.bitmap.old()?)));
    let merges = plans.iter().flat_map(|plan| {
        let added = |old: &BitmapName| {
            let name = old.to_string();
            let carriers = plan.disk.carriers(&name);
            let merge =
                |(layer, _): (&Layer, _)| merge(&plan.disk.node, old, &[(&layer.node, old)]);
            carriers.map(merge).collect::<Vec<_>>()
        };
        plan.bitmap.old().map(added).unwrap_or_default()
    });
    adds.chain(disables).chain(merges).collect()
}

/// Whether it is one of [`switch`]'s that begin something, and not one of those that end something.
pub(super) fn is_add(action: &Value) -> bool {
    action["type"] == "block-dirty-bitmap-add"
}

/// An action on one bitmap for a transaction: `enable`, `disable` or `remove`.
pub(super) fn action(verb: &str, node: &str, name: &BitmapName) -> Value {
    json!({
        "type": format!("block-dirty-bitmap-{verb}"),
        "data": { "node": node, "name": name.to_string() },
    })
}

/// An array of one: QEMU 10.0.2 crashes on a merge of no bitmaps, so this one cannot be built. The source is named with
/// its node.
fn merge(node: &str, target: &BitmapName, sources: &[(&str, &BitmapName); 1]) -> Value {
    let sources = sources.map(|(node, name)| json!({ "node": node, "name": name.to_string() }));
    json!({
        "type": "block-dirty-bitmap-merge",
        "data": { "node": node, "target": target.to_string(), "bitmaps": sources },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_name_reads_back_exactly(parts in prop::array::uniform4("[ -9;-~]{1,250}"), base in prop::option::of("[ -9;-~]{2,50}")) {
            let [archive, namespace, volume, backup] = &parts;
            match BitmapName::new(archive, namespace, volume, backup, base.as_deref()) {
                Ok(name) => {
                    let text = name.to_string();
                    prop_assert!(text.len() <= NAME_MAX);
                    prop_assert_eq!(BitmapName::parse(&text), Some(name));
                }
                Err(e) => {
                    let actual = parts.iter().map(|part| part.len() + 1).sum::<usize>() + PREFIX.len()
                        + 1 + base.as_deref().unwrap_or(NO_BASE).len();
                    prop_assert!(actual > NAME_MAX);
                    prop_assert_eq!(e, BitmapNameError::TooLong { actual });
                }
            }
        }

        #[test]
        fn a_part_that_could_blur_the_name_is_refused(part in "\\PC{0,5}(:|é|\n|\x7f|\0)\\PC{0,5}") {
            prop_assert!(BitmapName::new("a", &part, "c", "d", None).is_err());
        }

        #[test]
        fn what_parses_is_written_the_same(text in "(fleecebox)?(:[a-c: -]{0,3}){4,6}") {
            if let Some(name) = BitmapName::parse(&text) {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }

    #[test]
    fn an_empty_part_is_refused() {
        assert!(BitmapName::new("a", "b", "", "d", None).is_err());
        assert_eq!(BitmapName::parse("fleecebox:a:b::d:-"), None);
    }
}
