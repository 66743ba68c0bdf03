//! An archive whose disk changed a byte: `verify` finds it, and `restore` never gives other bytes than the VM held.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, MIB, Outcome, Random, Site, StorageDaemon, compare, files_below};

/// Of the disk: a short last block.
const SIZE: u64 = 3 * MIB + 512;

#[test]
fn a_changed_byte_of_what_was_put_is_found() -> Result<()> {
    a_changed_byte_is_found("chunked", &["packs", "pages", "manifest.json"])
}

#[test]
fn a_changed_byte_of_what_was_spliced_is_found() -> Result<()> {
    a_changed_byte_is_found("splices-everything", &["objects", "pages", "manifest.json"])
}

#[test]
fn a_changed_byte_of_what_a_provider_wrote_is_found() -> Result<()> {
    // Its component is what reads it back.
    let parts = ["objects", "pages", "manifest.json", "components"];
    a_changed_byte_is_found("image", &parts)
}

fn a_changed_byte_is_found(provider: &str, parts: &[&str]) -> Result<()> {
    let site = Site::new()?;
    let content = site.path("content.raw");
    Random::new(5).fill_file(&content, 4)?;
    fs::File::options()
        .write(true)
        .open(&content)?
        .set_len(SIZE)?;
    let daemon = StorageDaemon::start(&[Disk::raw("da", SIZE).holding(&content)])?;
    let mut order = site.order(&daemon, provider)?;
    if provider == "splices-everything" {
        site.configure(&format!(
            "[provider.splices]\ncomponent = {:?}\nsettings = {{ encoding = 'identity' }}\n",
            order.provider
        ))?;
        order.provider = "splices".into();
    }
    let backup = site.backup(&order)?;
    let archive = site.archive();
    site.verify(&archive, &backup.id)?;
    let mut found = BTreeSet::new();
    for file in files_below(&archive)? {
        let path = archive.join(&file);
        let bytes = fs::read(&path)?;
        // The last quarter of a pack is its own table, which no backup needs: the namespace's index is made of it.
        for at in [0, bytes.len() / 3, bytes.len() / 2] {
            let Some(byte) = bytes.get(at) else { continue };
            let mut damaged = bytes.clone();
            damaged[at] = byte ^ 0x40;
            fs::write(&path, damaged)?;
            let verified = site
                .command(&["verify", &backup.id, "--json"])
                .arg("--archive")
                .arg(&archive)
                .run()?;
            let what = format!("byte {at} of {}", file.display());
            let intact = check(&verified).with_context(|| what.clone())?;
            verified.document().with_context(|| what.clone())?;
            let part = parts.iter().find(|part| is_part(&file, part));
            if let Some(part) = part {
                ensure!(!intact, "{what}: not found");
                found.insert(*part);
            }
            let image = site.path("restored/da.raw");
            let restored = site
                .command(&["restore", &backup.id])
                .arg("--archive")
                .arg(&archive)
                .arg("--to")
                .arg(&image)
                .run()?;
            if check(&restored).with_context(|| what.clone())? {
                compare::same_bytes(&image, &content).with_context(|| what.clone())?;
                fs::remove_file(&image)?;
            } else {
                ensure!(!image.exists(), "{what}: a half-restored image is left");
            }
        }
        fs::write(&path, bytes)?;
    }
    assert_eq!(found, parts.iter().copied().collect(), "of these files");
    site.verify(&archive, &backup.id)
}

fn is_part(file: &Path, part: &str) -> bool {
    file.components()
        .any(|component| component.as_os_str() == part)
}

/// Whether it went well; if not, that it said why in words, and that it is the archive.
fn check(outcome: &Outcome) -> Result<bool> {
    if outcome.code() == Some(0) {
        return Ok(true);
    }
    ensure!(
        outcome.code() == Some(10) && !outcome.stderr.contains("panicked"),
        "{:?}: {}",
        outcome.code(),
        outcome.stderr
    );
    Ok(false)
}
