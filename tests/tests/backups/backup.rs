//! Full and incremental backups of live disks by the honest providers.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    At, Backup, Disk, Ext4Disk, Fault, Load, MIB, Order, Proxy, QemuState, Random, Site, Stage,
    StorageDaemon, What, Writer, bytes_below, compare, nbd_map,
};
use serde_json::json;

/// The unit of dirty tracking, in bytes.
const BLOCK: u64 = 64 << 10;

#[test]
fn chunked_restores_each_point_in_time_of_live_disks() -> Result<()> {
    restores_each_point_in_time_of_live_disks("chunked")
}

#[test]
fn image_restores_each_point_in_time_of_live_disks() -> Result<()> {
    restores_each_point_in_time_of_live_disks("image")
}

#[test]
fn qcow2_restores_each_point_in_time_of_live_disks() -> Result<()> {
    restores_each_point_in_time_of_live_disks("qcow2")
}

#[test]
fn numbered_restores_each_point_in_time_of_live_disks() -> Result<()> {
    restores_each_point_in_time_of_live_disks("numbered")
}

#[test]
fn watchful_restores_each_point_in_time_of_live_disks() -> Result<()> {
    restores_each_point_in_time_of_live_disks("watchful")
}

fn restores_each_point_in_time_of_live_disks(provider: &str) -> Result<()> {
    let site = Site::new()?;
    let size = 48 * MIB;
    let odd_size = size + 3 * 512;
    let ext4 = Ext4Disk::create(&site.path("ext4.raw"), size)?;
    let content = site.path("content.raw");
    Random::new(1).fill_file(&content, 24)?;
    let disks = [
        Disk::raw("da", size).holding(&ext4.path),
        Disk::qcow2("db", odd_size).holding(&content),
    ];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let proxy = Proxy::start(daemon.monitors())?;
    let order = site.order(&daemon, provider)?.through(&proxy);
    let before = QemuState::read(daemon.monitors())?;
    // Both ends of the odd disk, data and holes.
    let regions = [0..4 * MIB, 23 * MIB..25 * MIB, size - MIB..odd_size];
    let may_be_dirty = [
        bytes(&blocks(&ext4.data_extents), size),
        bytes(&blocks(&regions), odd_size),
    ];
    let writers = [
        writer(&daemon, "da", 1, ext4.data_extents)?,
        writer(&daemon, "db", 2, regions.into())?,
    ];

    let mut backups: Vec<(Backup, Vec<_>)> = Vec::new();
    for _ in 0..4 {
        writers.iter().try_for_each(|writer| writer.wait_for(20))?;
        let backup = site.backup(&order)?;
        let references = proxy.references()?;
        let base = backups.last().map(|(base, _)| base);
        for (disk, most) in ["da", "db"].into_iter().zip(may_be_dirty) {
            backup.assert_base(disk, base);
            if base.is_some() {
                let dirty = backup.dirty_bytes(disk);
                ensure!(0 < dirty && dirty <= most, "{disk}: {dirty} bytes dirty");
            }
        }
        site.check(&order, &backup, &references)?;
        backups.push((backup, references));
        // Of each disk one, and it records.
        let now = QemuState::read(daemon.monitors())?;
        now.assert_restored(&before, |_| true);
        let bitmaps: Vec<_> = now.bitmaps().collect();
        let nodes: Vec<_> = bitmaps.iter().map(|bitmap| &bitmap.node[..]).collect();
        ensure!(nodes == ["da", "db"], "{bitmaps:?}");
        ensure!(
            bitmaps
                .iter()
                .all(|bitmap| bitmap.recording && !bitmap.inconsistent)
        );
        ensure!(
            !bitmaps[0].persistent && bitmaps[1].persistent,
            "{bitmaps:?}"
        );
    }
    for writer in writers {
        writer.stop()?;
    }
    assert_eq!(backups[0].0.dirty_bytes("da"), size);
    assert_eq!(backups[0].0.dirty_bytes("db"), odd_size);
    let ids: Vec<_> = backups
        .iter()
        .map(|(backup, _)| backup.id.clone())
        .collect();
    assert_eq!(site.list(&order.archive)?, ids);
    // The later ones took nothing away from the earlier ones.
    for (backup, references) in &backups {
        site.check(&order, backup, references)?;
        compare::ext4_is_clean(&references[0].path)?;
    }
    Ok(())
}

#[test]
fn a_backup_of_nothing_new_is_a_backup() -> Result<()> {
    for provider in ["chunked", "image", "numbered"] {
        let site = Site::new()?;
        let content = site.path("content.raw");
        Random::new(3).fill_file(&content, 8)?;
        let daemon = StorageDaemon::start(&[Disk::raw("da", 9 * MIB).holding(&content)])?;
        let order = site.order(&daemon, provider)?;
        let before = QemuState::read(daemon.monitors())?;
        let full = site.backup(&order)?;
        let stored = bytes_below(&order.archive)?;
        let empty = site.backup(&order)?;
        empty.assert_base("da", Some(&full));
        assert_eq!(empty.dirty_bytes("da"), 0);
        let grown = bytes_below(&order.archive)? - stored;
        ensure!(grown < BLOCK, "nothing new took {grown} bytes");
        site.verify(&order.archive, &empty.id)?;
        let restored = site.restore(&order.archive, &empty.id)?;
        compare::same_bytes(&restored.join("da.raw"), &daemon.disks()[0].path)?;
        // The NBD server that it started is gone, too.
        QemuState::read(daemon.monitors())?.assert_restored(&before, |_| true);
    }
    Ok(())
}

#[test]
fn what_the_archive_holds_is_not_stored_again() -> Result<()> {
    let site = Site::new()?;
    let length = 16 * MIB;
    let content = site.path("content.raw");
    Random::new(4).fill_file(&content, length / MIB)?;
    let twins = [
        Disk::raw("da", length).holding(&content),
        Disk::qcow2("db", length).holding(&content),
    ];
    let little = length / 16;

    let daemon = StorageDaemon::start(&twins)?;
    let order = site.order(&daemon, "chunked")?;
    site.backup(&order.clone().only(&["da"]))?;
    let one = bytes_below(&order.archive)?;
    ensure!(one > length, "random bytes were packed into {one}");
    // Another volume, another backup of the same, another VM.
    site.backup(&order)?;
    let again = Order {
        full: true,
        ..order.clone()
    };
    let again = site.backup(&again)?;
    assert_eq!(again.dirty_bytes("da"), length);
    let other = StorageDaemon::start(&twins)?;
    let of_other = Order {
        vm: "mail".into(),
        ..site.order(&other, "chunked")?
    };
    let of_other = site.backup(&of_other)?;
    of_other.assert_base("da", None);
    let all = bytes_below(&order.archive)?;
    ensure!(all < one + little, "{all} bytes in place of {one}");
    for backup in [again, of_other] {
        let restored = site.restore(&order.archive, &backup.id)?;
        compare::same_bytes(&restored.join("da.raw"), &content)?;
        compare::same_bytes(&restored.join("db.raw"), &content)?;
    }
    Ok(())
}

#[test]
fn what_is_read_is_what_qemu_calls_dirty() -> Result<()> {
    let site = Site::new()?;
    let sizes = [("da", 24 * MIB), ("db", 16 * MIB + 5 * 512)];
    let disks = [Disk::raw("da", sizes[0].1), Disk::qcow2("db", sizes[1].1)];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let proxy = Proxy::start(daemon.monitors())?;
    let order = site.order(&daemon, "tells-its-regions")?.through(&proxy);
    let full = site.backup(&order)?;
    proxy.references()?;
    for (index, (disk, size)) in sizes.into_iter().enumerate() {
        let mut random = Random::new(index as u64);
        let mut access = daemon.writer_access(disk)?;
        for _ in 0..30 {
            let offset = random.below(size / 512 - 64) * 512;
            let length = 512 * (1 + random.below(64));
            access.write(offset, &vec![0xb5; length as usize])?;
        }
        // The short last block.
        access.write(size - 512, &[0x5b; 512])?;
        access.flush()?;
    }

    // Both exports are up, and nothing has been read or trimmed.
    proxy.forget_commands();
    proxy.inject(Fault {
        at: At::Named("block-export-add", 2),
        stage: Stage::BeforeAnswer,
        what: What::Hold,
    });
    let running = site.backup_command(&order).start()?;
    let held = proxy.wait_held(Duration::from_secs(60))?;
    let exports = daemon
        .control()?
        .execute("query-block-exports", json!({}))?;
    let mut expected = Vec::new();
    let mut exports: Vec<_> = exports
        .as_array()
        .context("no list of exports")?
        .iter()
        .filter_map(|export| export["id"].as_str())
        .filter(|id| !id.starts_with("writer-"))
        .collect();
    exports.sort_unstable();
    ensure!(exports.len() == sizes.len(), "{exports:?}");
    for export in exports {
        let contexts = nbd_map::dirty_contexts(&daemon.nbd_socket(), export)?;
        let [context] = &contexts[..] else {
            anyhow::bail!("not one bitmap on {export}: {contexts:?}");
        };
        let ranges = nbd_map::dirty_ranges(&daemon.nbd_socket(), export, context)?;
        ensure!(!ranges.is_empty(), "nothing is dirty on {export}");
        expected.push(blocks(&ranges));
    }
    held.go_on();
    let backup = Backup::told_by(&running.finish()?.assert_success())?;
    for ((disk, size), mut expected) in sizes.into_iter().zip(expected) {
        // By it an increment sees whether somebody cleared the bitmap; what was not written there is not read.
        let mark = mark(&site, &order, &full, disk)?;
        ensure!(expected.contains(&mark), "{disk}: block {mark} is clean");
        if !blocks(&told_regions(&backup, disk)?).contains(&mark) {
            expected.remove(&mark);
        }
        assert_eq!(blocks(&told_regions(&backup, disk)?), expected, "{disk}");
        assert_eq!(backup.dirty_bytes(disk), bytes(&expected, size), "{disk}");
    }
    site.check(&order, &backup, &proxy.references()?)
}

/// The block that the bitmap since `backup` called dirty from its birth.
fn mark(site: &Site, order: &Order, backup: &Backup, disk: &str) -> Result<u64> {
    let show = site
        .command(&["show", &backup.id, "--json"])
        .arg("--archive");
    let manifest = show
        .arg(&order.archive)
        .run()?
        .assert_success()
        .document()?;
    let volumes = manifest["record"]["volumes"].as_array();
    let mut volumes = volumes.context("no volumes")?.iter();
    let volume = volumes.find(|volume| volume["name"] == disk);
    let mark = volume.and_then(|volume| volume["disk"]["mark"].as_u64());
    Ok(mark.context("no mark")? / (64 << 10))
}

fn writer(
    daemon: &StorageDaemon,
    disk: &str,
    seed: u64,
    regions: Vec<Range<u64>>,
) -> Result<Writer> {
    let load = Load {
        seed,
        rate: 100,
        regions: Some(regions),
    };
    Writer::start(daemon.writer_access(disk)?, load)
}

/// All blocks that the ranges touch.
fn blocks(ranges: &[Range<u64>]) -> BTreeSet<u64> {
    let touched = |range: &Range<u64>| range.start / BLOCK..range.end.div_ceil(BLOCK);
    ranges.iter().flat_map(touched).collect()
}

/// What the blocks of a disk of `size` bytes hold, its last one cut at its end.
fn bytes(blocks: &BTreeSet<u64>, size: u64) -> u64 {
    blocks
        .iter()
        .map(|block| BLOCK.min(size - block * BLOCK))
        .sum()
}

/// The regions that the provider was given, by its log.
fn told_regions(backup: &Backup, disk: &str) -> Result<Vec<Range<u64>>> {
    let start = format!("provider ({disk}, info): region ");
    let told = backup
        .said
        .lines()
        .filter_map(|line| line.strip_prefix(&start));
    told.map(|region| {
        let (offset, length) = region.split_once(' ').context("no region")?;
        let (offset, length): (u64, u64) = (offset.parse()?, length.parse()?);
        Ok(offset..offset + length)
    })
    .collect()
}

/// It is the longest answer that QEMU gives, and it cannot change while it runs.
#[test]
fn what_qemu_can_do_is_asked_once() -> Result<()> {
    let daemon = StorageDaemon::start(&[Disk::raw("da", MIB)])?;
    let proxy = Proxy::start(daemon.monitors())?;
    let site = Site::new()?;
    let order = site.order(&daemon, "chunked")?.through(&proxy);
    site.backup(&order)?;
    let commands = proxy.commands().into_iter();
    let asked = commands.filter(|command| command == "query-qmp-schema");
    assert_eq!(asked.count(), 1);
    Ok(())
}
