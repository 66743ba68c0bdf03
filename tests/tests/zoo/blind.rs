//! What a blind provider can learn: which blocks changed and which of them are zero, and no more.

use crate::Row;
use crate::scene::Scene;
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Order, Random, component, files_below};
use std::fs;

/// Lies all over the disks of the tests of blindness, and nowhere else.
const MARKER: &str = "the disk_s own secret, 64 bytes";

/// [`MARKER`] from its end, as the spies get it: what they look for is then not in their memory already.
pub(super) const BACKWARDS: &str = "setyb 46 ,terces nwo s_ksid eht";

/// Blocks that a spy may store before its quota is used up.
const QUOTA: u64 = 10;

/// A block, in bytes.
const BLOCK: u64 = 64 << 10;

/// A hostile blind provider, on disks that are full of a marker, finds no byte of them; and neither does anybody in
/// what it leaves in the log, in its receipt, and in names.
pub(super) fn no_byte_is_seen(scene: &mut Scene) -> Result<Option<Row>> {
    let secret = || MARKER.bytes().cycle();
    scene.fill("da", secret())?;
    scene.fill("db", secret())?;
    let settings = format!("[provider.settings]\nhow = '{BACKWARDS}'\n");
    scene.configure("hostile", &component("spies-blind")?, &settings)?;
    let order = scene.order("hostile");
    let made = scene.back_up(&order)?;
    let said = &made.said;
    ensure!(
        said.matches("the search works: true").count() == 2,
        "{said}"
    );
    let found = "bytes of the disk in memory: ";
    ensure!(
        said.matches(found).count() == 2 && !said.contains(&format!("{found}true")),
        "{said}"
    );
    ensure!(!said.contains(MARKER), "{said}");
    let folder = scene
        .honest
        .archive
        .join("namespaces/tenant/backups")
        .join(&made.id);
    for file in files_below(&folder)? {
        let name = file.display().to_string();
        ensure!(!name.contains(MARKER), "{name}");
        // Of what the host copied for it, a provider sees nothing; of everything else it could.
        if !name.starts_with("objects") {
            let bytes = fs::read(folder.join(&file))?;
            let holds = bytes
                .windows(MARKER.len())
                .any(|window| window == MARKER.as_bytes());
            ensure!(!holds, "{name} holds the disk's bytes");
        }
    }
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("manifest.json"))?)?;
    let told = hidden(&manifest, MARKER);
    ensure!(
        told.is_none(),
        "the manifest holds the disk's bytes: {told:?}"
    );
    scene.change()?;
    scene.back_up_honestly()?;
    Ok(None)
}

/// Where a value of the manifest is `secret` in hexadecimal digits or a list of bytes.
fn hidden(value: &serde_json::Value, secret: &str) -> Option<String> {
    let text = value.to_string();
    let digits: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    let list = serde_json::json!(secret.as_bytes()).to_string();
    let list = list.trim_matches(['[', ']']);
    (text.contains(&digits) || text.contains(list)).then_some(text)
}

/// A put answers the same, and takes as much of a quota, whether its bytes are known, equal to each other, or compress
/// to next to nothing, or are none of these.
pub(super) fn bytes_cannot_be_compared(scene: &mut Scene) -> Result<Option<Row>> {
    let quota = QUOTA * BLOCK;
    let policy = format!(
        "[provider.limits]\noutput-bytes = {quota}\n[provider.settings]\nhow = '{BACKWARDS}'\n"
    );
    // Known: an honest backup has just stored it.
    scene.fill("da", MARKER.bytes().cycle())?;
    scene.back_up_honestly()?;
    let order = Order {
        full: true,
        ..scene.order("hostile").only(&["da"])
    };
    scene.configure("hostile", &component("spies-blind")?, &policy)?;
    let mut told = Vec::new();
    let mut random = Random::new(0xb11d);
    for known in [true, false] {
        if !known {
            let mut bytes = vec![0; 4 << 20];
            random.fill(&mut bytes);
            scene.fill("da", bytes.into_iter())?;
        }
        let command = scene.site.backup_command(&order);
        let attack = scene.attack_meanwhile(&command, |_, _| Ok(()))?;
        let stderr = attack.outcome.stderr;
        ensure!(stderr.contains("the quota is used up"), "{stderr}");
        let lines = stderr
            .lines()
            .filter(|line| line.starts_with("provider (da, "));
        told.push(lines.map(String::from).collect::<Vec<_>>());
    }
    let [known, unknown] = &told[..] else {
        unreachable!("two jobs")
    };
    ensure!(known == unknown, "{known:#?}\n{unknown:#?}");
    let stored = format!("blocks stored before the end: {QUOTA}");
    ensure!(
        known.iter().any(|line| line.ends_with(&stored)),
        "{known:#?}"
    );
    scene.back_up_honestly().context("after the spies")?;
    Ok(None)
}

/// Two instances of a blind provider, one for each disk, share no name and no quota: each finds what it would find alone,
/// whatever the other has done by then.
pub(super) fn instances_share_nothing(scene: &mut Scene) -> Result<Option<Row>> {
    let mut random = Random::new(0xb22d);
    for disk in ["da", "db"] {
        let mut bytes = vec![0; 4 << 20];
        random.fill(&mut bytes);
        scene.fill(disk, bytes.into_iter())?;
    }
    // Half of it, and half a block, for each.
    let quota = (2 * QUOTA + 1) * BLOCK;
    let policy = format!("[provider.limits]\noutput-bytes = {quota}\n");
    scene.configure("hostile", &component("meets-its-neighbour")?, &policy)?;
    let order = Order {
        full: true,
        ..scene.order("hostile")
    };
    for disks in [["da", "db"], ["db", "da"]] {
        let command = scene.site.backup_command(&order.clone().only(&disks));
        let attack = scene.attack_meanwhile(&command, |_, _| Ok(()))?;
        let stderr = attack.outcome.stderr;
        ensure!(stderr.contains("quota-exceeded(output-bytes)"), "{stderr}");
        let said: Vec<_> = stderr
            .lines()
            .filter(|line| line.starts_with("provider ("))
            .collect();
        let alone = format!("somebody was there: false; blocks stored: {QUOTA}");
        // The first that has had its share ends the other one.
        ensure!(
            !said.is_empty() && said.iter().all(|line| line.ends_with(&alone)),
            "{stderr}"
        );
    }
    scene.back_up_honestly().context("after the neighbours")?;
    Ok(None)
}
