//! Providers in other languages than Rust: what each of them promises besides being a backup, which
//! `backups/backup.rs` holds all of them to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, MIB, Proxy, Random, Site, StorageDaemon, compare, component, files_below,
};

#[test]
fn the_objects_of_qcow2_are_disk_images_that_qemu_opens_on_top_of_each_other() -> Result<()> {
    let site = Site::new()?;
    let content = site.path("content.raw");
    Random::new(9).fill_file(&content, 12)?;
    // More than one L2 table, holes, and an end that is no whole cluster.
    let sizes = [("da", 20 * MIB + 7 * 512), ("db", 1100 * MIB)];
    let disks = [
        Disk::raw("da", sizes[0].1).holding(&content),
        Disk::qcow2("db", sizes[1].1).holding(&content),
    ];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let proxy = Proxy::start(daemon.monitors())?;
    let order = site.order(&daemon, "qcow2")?.through(&proxy);

    let mut earlier: Vec<Option<PathBuf>> = vec![None; sizes.len()];
    for round in 0..3_u64 {
        let backup = site.backup(&order)?;
        let references = proxy.references()?;
        for (index, reference) in references.iter().enumerate() {
            let stored = object(
                &order.archive,
                &backup.id,
                // A blind provider's objects go by the number of their volume as well.
                &format!("{index}-{}.qcow2", reference.device),
            )?;
            let image = site.path(&format!("{}-{round}.qcow2", reference.device));
            std::fs::copy(&stored, &image)?;
            compare::qcow2_is_clean(&image)?;
            if let Some(base) = &earlier[index] {
                let length = std::fs::metadata(&image)?.len();
                ensure!(length < 6 * MIB, "an incremental of {length} bytes");
                compare::put_on_top_of(&image, base)?;
            }
            compare::same_disk(&image, &reference.path)?;
            earlier[index] = Some(image);
        }
        for (disk, size) in sizes {
            let mut access = daemon.writer_access(disk)?;
            // New data, data that becomes zero, and the end.
            access.write(MIB + round * 3 * MIB, &[0x5a; 70_000])?;
            access.write_zeroes(5 * MIB, (round as u32 + 1) << 20)?;
            access.write(size - 512, &[0xa5; 512])?;
            access.flush()?;
        }
    }
    Ok(())
}

#[test]
fn watchful_warns_when_what_changed_looks_encrypted_and_not_before() -> Result<()> {
    let site = Site::new()?;
    let size = 64 * MIB;
    let content = site.path("content.raw");
    std::fs::write(&content, b"words and words ".repeat(size as usize / 16))?;
    let disks = [Disk::raw("da", size).holding(&content)];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let order = site.order(&daemon, "watchful")?;
    let warned = |backup: &Backup| backup.said.contains("looks encrypted");

    ensure!(!warned(&site.backup(&order)?), "a full backup has no past");
    let mut access = daemon.writer_access("da")?;
    for (seed, share, expected) in [(1, 2, false), (2, 40, true)] {
        let mut random = Random::new(seed);
        let mut bytes = vec![0; MIB as usize];
        for part in 0..40 {
            for chunk in bytes.chunks_mut(8) {
                let random = random.bits().to_le_bytes();
                chunk.copy_from_slice(if part < share { &random } else { b"zyx wvu " });
            }
            access.write(part * MIB, &bytes)?;
        }
        access.flush()?;
        let backup = site.backup(&order)?;
        assert_eq!(warned(&backup), expected, "{}", backup.said);
        let restored = site.restore(&order.archive, &backup.id)?;
        compare::same_bytes(&restored.join("da.raw"), &daemon.disks()[0].path)?;
    }
    Ok(())
}

/// The projects of `provider new` are tried in `new_provider.rs`.
#[test]
fn what_is_written_in_c_passes_the_conformance_kit() -> Result<()> {
    passes_the_conformance_kit("qcow2")
}

#[test]
fn what_is_written_in_python_passes_the_conformance_kit() -> Result<()> {
    passes_the_conformance_kit("numbered")
}

#[test]
fn what_is_written_in_javascript_passes_the_conformance_kit() -> Result<()> {
    passes_the_conformance_kit("watchful")
}

fn passes_the_conformance_kit(provider: &str) -> Result<()> {
    let site = Site::new()?;
    let command = site.command(&["provider", "test", "--seed", "7"]);
    let outcome = command.arg(component(provider)?).run()?;
    ensure!(outcome.code() == Some(0), "{provider}:\n{}", outcome.stdout);
    Ok(())
}

#[test]
fn each_sdk_holds_the_contract_as_it_is() -> Result<()> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let contract = std::fs::read_to_string(checkout.join("wit/provider.wit"))?;
    for copy in [
        "c/bindings/provider.wit",
        "javascript/provider.wit",
        "python/fleecebox_guest/provider.wit",
    ] {
        let held = std::fs::read_to_string(checkout.join("guest-sdk").join(copy))?;
        ensure!(
            held == contract,
            "guest-sdk/{copy} is not wit/provider.wit: copy it, and make the C bindings anew (see their README)"
        );
    }
    Ok(())
}

/// The file of that object in that backup.
fn object(archive: &Path, backup: &str, name: &str) -> Result<PathBuf> {
    let end = format!("{backup}/objects/{name}");
    let file = files_below(archive)?
        .into_iter()
        .find(|file| file.ends_with(&end));
    Ok(archive.join(file.with_context(|| format!("no object {name}"))?))
}
