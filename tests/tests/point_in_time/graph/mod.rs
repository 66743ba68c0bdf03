//! What changes between two backups without the bitmap of the disk's own node knowing it: overlays that come and go,
//! templates that are swapped, images that others write to. Either the increment is right all the same, or the disk is
//! read in full and that is said. `qemu-img compare` of the image against what is restored is the judge.

mod scene;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{At, Fault, MIB, Proxy, Stage, What, nbd_map};
use scene::{BLOCK, DISK, LIMIT, SIZE, Scene, qemu_img, text};
use serde_json::json;

#[test]
fn what_was_written_before_an_overlay_that_carries_the_bitmap_is_in_the_increment() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.write(100)?;
    let first = scene.right()?;
    scene.write(20)?;
    scene.snapshot("one")?;
    scene.write(21)?;
    scene.snapshot("two")?;
    scene.write(22)?;
    let second = scene.incremental(&first, 3)?;
    // The names below are of the first backup and stay true of it; the second's are above.
    scene.write(23)?;
    let third = scene.incremental(&second, 1)?;
    scene.snapshot("three")?;
    scene.write(24)?;
    scene.restart("three.qcow2")?;
    scene.write(25)?;
    scene.incremental(&third, 2)?;
    Ok(())
}

#[test]
fn an_increment_over_two_images_that_dies_loses_nothing_of_either() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.write(20)?;
    scene.snapshot("one")?;
    scene.write(21)?;
    let proxy = Proxy::start(scene.vm.monitors())?;
    proxy.inject(Fault {
        at: At::Named("block-export-del", 1),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    });
    let order = scene.order.clone().through(&proxy);
    let running = scene.site.backup_command(&order).start()?;
    let held = proxy.wait_held(LIMIT)?;
    scene.write(22)?;
    running.kill()?;
    drop((held, proxy));
    scene.write(23)?;
    scene.incremental(&first, 4)?;
    Ok(())
}

#[test]
fn an_overlay_made_while_a_backup_was_dying_costs_no_more_than_a_full_read() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.write(20)?;
    let proxy = Proxy::start(scene.vm.monitors())?;
    proxy.inject(Fault {
        at: At::Named("block-export-del", 1),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    });
    let order = scene.order.clone().through(&proxy);
    let running = scene.site.backup_command(&order).start()?;
    let held = proxy.wait_held(LIMIT)?;
    running.kill()?;
    drop((held, proxy));
    // The image keeps a bitmap that stopped and one that records; the machine opens it read-only below the overlay.
    scene.vm.quit()?;
    let (start, one) = (scene.path("start.qcow2"), scene.path("one.qcow2"));
    scene.overlay(&one, &start)?;
    scene.start("one.qcow2", "")?;
    scene.write(21)?;
    scene
        .right()?
        .assert_read_in_full_because(DISK, "an overlay is above");
    // Back to the image itself: what was merged back there is right.
    scene.restart("start.qcow2")?;
    scene.write(22)?;
    scene.incremental(&first, 2)?;
    Ok(())
}

#[test]
fn an_overlay_without_the_bitmap_is_read_in_full() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.right()?;
    scene.write(20)?;
    scene.snapshot_carrying("one", &[])?;
    scene.write(21)?;
    scene.full_because("an overlay is above")
}

#[test]
fn an_overlay_above_a_bitmap_that_stopped_is_read_in_full() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.right()?;
    let (node, bitmaps) = scene.active()?;
    scene.qmp(
        "block-dirty-bitmap-disable",
        json!({"node": node, "name": bitmaps[0]}),
    )?;
    scene.write(20)?;
    scene.snapshot("one")?;
    scene.write(21)?;
    scene.full_because("it stopped following writes")
}

#[test]
fn an_overlay_that_is_committed_back_leaves_the_increment_right() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.write(20)?;
    scene.snapshot("one")?;
    scene.write(21)?;
    scene.job(
        "block-commit",
        json!({"device": "one", "base-node": "active"}),
    )?;
    scene.write(22)?;
    scene.incremental(&first, 3)?;
    Ok(())
}

#[test]
fn a_backup_of_an_overlay_is_no_base_once_that_is_committed() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.write(20)?;
    scene.snapshot("one")?;
    scene.write(21)?;
    scene.incremental(&first, 2)?;
    scene.write(22)?;
    scene.job(
        "block-commit",
        json!({"device": "one", "base-node": "active"}),
    )?;
    scene.write(23)?;
    // What the image below still carries is of the first backup, and holds all since.
    scene.incremental(&first, 4)?;
    Ok(())
}

#[test]
fn images_between_that_are_committed_or_pulled_are_read_in_full_once() -> Result<()> {
    for job in ["block-commit", "block-stream"] {
        let mut scene = Scene::new()?;
        scene.write(19)?;
        scene.snapshot("one")?;
        scene.write(20)?;
        scene.snapshot("two")?;
        scene.right()?;
        scene.write(21)?;
        let template = scene.path("template.qcow2");
        let arguments = match job {
            "block-commit" => json!({"device": "two", "top-node": "one"}),
            _ => json!({"device": "two", "base": text(&template)}),
        };
        scene.job(job, arguments)?;
        scene.write(22)?;
        scene.full_because("since the base").context(job)?;
    }
    Ok(())
}

#[test]
fn a_pull_of_all_that_is_below_is_read_in_full_once() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.right()?;
    scene.write(20)?;
    scene.job("block-stream", json!({"device": "active"}))?;
    scene.write(21)?;
    scene.full_because("it was built on")
}

#[test]
fn a_mirror_that_takes_the_bitmap_along_is_read_in_full_once() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.right()?;
    scene.write(20)?;
    let (_, bitmaps) = scene.active()?;
    let copy = scene.path("copy.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2", text(&copy), "16M"])?;
    scene.qmp(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "copy",
        "file": {"driver": "file", "filename": copy}}),
    )?;
    scene.qmp(
        "block-dirty-bitmap-add",
        json!({"node": "copy", "name": bitmaps[0], "persistent": true}),
    )?;
    scene.job(
        "blockdev-mirror",
        json!({"device": "active", "target": "copy", "sync": "full"}),
    )?;
    scene.write(21)?;
    scene.full_because("which is not among its images now")
}

#[test]
fn going_back_to_the_image_below_an_overlay_is_right() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.write(20)?;
    scene.snapshot("one")?;
    scene.write(21)?;
    scene.incremental(&first, 2)?;
    scene.write(22)?;
    // What was written since is thrown away, and with it the second backup's bitmap.
    scene.restart("start.qcow2")?;
    scene.incremental(&first, 1)?;
    Ok(())
}

#[test]
fn an_ordinary_restart_above_a_template_that_did_not_change_stays_incremental() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.write(20)?;
    scene.restart("start.qcow2")?;
    scene.write(21)?;
    let second = scene.incremental(&first, 2)?;
    // Read by others, linked, and made read-only: all that a template lives through.
    let template = scene.path("template.qcow2");
    std::fs::hard_link(&template, scene.path("link.qcow2"))?;
    let mut permissions = std::fs::metadata(&template)?.permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&template, permissions)?;
    scene.restart("start.qcow2")?;
    scene.incremental(&second, 0)?;
    Ok(())
}

#[test]
fn another_template_is_read_in_full() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.right()?;
    let other = scene.template("other.qcow2", 2)?;
    scene.vm.quit()?;
    let start = scene.path("start.qcow2");
    qemu_img([
        "rebase",
        "-u",
        "-b",
        text(&other),
        "-F",
        "qcow2",
        text(&start),
    ])?;
    scene.start("start.qcow2", "")?;
    scene.write(20)?;
    scene.full_because("it was built on")
}

#[test]
fn a_template_that_was_written_to_or_replaced_is_read_in_full() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.right()?;
    let template = scene.path("template.qcow2");
    scene.vm.quit()?;
    scene.write_offline(&template, 3, MIB, BLOCK)?;
    scene.start("start.qcow2", "")?;
    scene.full_because("was written to")?;

    // In its place while the machine runs, which keeps the old one open up to its restart.
    let other = scene.template("other.qcow2", 4)?;
    std::fs::rename(other, &template)?;
    let backup = scene.backup()?;
    backup.assert_read_in_full_because(DISK, "or on another file there");
    scene.restart("start.qcow2")?;
    scene.full_because("or on another file there")
}

#[test]
fn an_image_that_another_took_the_place_of_is_read_in_full() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.right()?;
    scene.write(20)?;
    scene.vm.quit()?;
    let (start, older) = (scene.path("start.qcow2"), scene.path("older.qcow2"));
    std::fs::copy(&start, &older)?;
    scene.start("start.qcow2", "")?;
    scene.write(21)?;
    scene.right()?;
    scene.vm.quit()?;
    std::fs::rename(&older, &start)?;
    scene.start("start.qcow2", "")?;
    scene.full_because("another file is at")
}

#[test]
fn an_older_copy_written_over_the_image_is_an_increment_of_its_own_time() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.write(20)?;
    scene.vm.quit()?;
    let (start, older) = (scene.path("start.qcow2"), scene.path("older.qcow2"));
    std::fs::copy(&start, &older)?;
    scene.start("start.qcow2", "")?;
    scene.write(21)?;
    scene.right()?;
    scene.vm.quit()?;
    std::fs::copy(&older, &start)?;
    scene.start("start.qcow2", "")?;
    scene.write(22)?;
    scene.incremental(&first, 2)?;
    Ok(())
}

#[test]
fn a_bitmap_that_was_cleared_or_put_in_the_place_of_another_is_not_believed() -> Result<()> {
    for replaced in [false, true] {
        let mut scene = Scene::new()?;
        scene.right()?;
        scene.write(20)?;
        let (node, bitmaps) = scene.active()?;
        let bitmap = json!({"node": node, "name": bitmaps[0]});
        if replaced {
            scene.qmp("block-dirty-bitmap-remove", bitmap.clone())?;
            scene.qmp("block-dirty-bitmap-add", bitmap)?;
        } else {
            scene.qmp("block-dirty-bitmap-clear", bitmap)?;
        }
        scene.write(21)?;
        let again = scene.right()?;
        again.assert_base(DISK, None);
        // Unless the sample of clean blocks has the one that was written.
        let reasons = [
            "was cleared, or another took its name",
            "differs from the base",
        ];
        ensure!(
            reasons.iter().any(|reason| again.said.contains(reason)),
            "{}",
            again.said
        );
        scene.write(22)?;
        scene.incremental(&again, 1)?;
    }
    Ok(())
}

#[test]
fn a_bitmap_that_others_added_to_is_believed() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    let (node, bitmaps) = scene.active()?;
    scene.qmp(
        "block-dirty-bitmap-add",
        json!({"node": node, "name": "theirs"}),
    )?;
    scene.write(20)?;
    scene.qmp(
        "block-dirty-bitmap-merge",
        json!({"node": node, "target": bitmaps[0], "bitmaps": ["theirs"]}),
    )?;
    scene.incremental(&first, 1)?;
    Ok(())
}

#[test]
fn a_disk_that_is_shared_is_read_in_full_each_time() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.right()?;
    scene.vm.quit()?;
    scene.start("start.qcow2", ",share-rw=on")?;
    scene.write(20)?;
    scene.full_because("share-rw")?;
    ensure!(
        scene.active()?.1.is_empty(),
        "a bitmap is kept that nobody may believe"
    );
    scene.full_because("share-rw")?;
    // By itself again, it starts anew.
    scene.restart("start.qcow2")?;
    let again = scene.right()?;
    again.assert_base(DISK, None);
    ensure!(again.id != first.id, "no backup");
    scene.write(21)?;
    scene.incremental(&again, 1)?;
    Ok(())
}

/// An image whose data is in the file `data`.
fn beside(raw: &str) -> Result<Scene> {
    let mut scene = Scene::without_images()?;
    let (image, data) = (scene.path("image.qcow2"), scene.path("data"));
    let options = format!("data_file={},data_file_raw={raw}", text(&data));
    qemu_img([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &options,
        text(&image),
        "16M",
    ])?;
    scene.start("image.qcow2", "")?;
    scene.write(20)?;
    Ok(scene)
}

#[test]
fn an_image_whose_data_is_in_a_raw_file_is_read_in_full_each_time() -> Result<()> {
    let mut scene = beside("on")?;
    let first = scene.foretold()?;
    ensure!(first["mode"] == "untracked", "{first}");
    scene.right()?;
    scene.write(21)?;
    scene.full_because("its data is in a raw file of its own")
}

#[test]
fn an_image_whose_data_file_was_replaced_is_read_in_full() -> Result<()> {
    let mut scene = beside("off")?;
    let first = scene.right()?;
    scene.write(21)?;
    scene.restart("image.qcow2")?;
    scene.incremental(&first, 1)?;
    scene.vm.quit()?;
    let (data, copy) = (scene.path("data"), scene.path("copy"));
    std::fs::copy(&data, &copy)?;
    std::fs::rename(&copy, &data)?;
    scene.start("image.qcow2", "")?;
    scene.full_because("another file is at")
}

/// What an export for a tool calls dirty, in bytes; the tool then says that it has it.
fn exported(scene: &Scene) -> Result<u64> {
    let running = scene
        .site
        .command(&[
            "export",
            "web",
            "--tracking",
            "tool",
            "--json",
            "--disk",
            DISK,
        ])
        .arg("--qmp")
        .arg(&scene.order.qmp)
        .arg("--fleecing")
        .arg(scene.site.path("fleecing"))
        .start()?;
    let told = running.wait_for_event(LIMIT, |event| event["volumes"].is_array())?;
    let volume = &told["volumes"][0];
    let socket = Path::new(told["socket"].as_str().context("no socket")?);
    let export = volume["nbd_export"].as_str().context("no export")?;
    let dirty = match volume["dirty_context"].as_str() {
        Some(context) => {
            let ranges = nbd_map::dirty_ranges(socket, export, context)?;
            ranges.iter().map(|range| range.end - range.start).sum()
        }
        None => SIZE,
    };
    let end = scene.site.command(&["export", "end", "web", "--success"]);
    end.run()?.assert_success();
    running.finish()?.assert_success();
    Ok(dirty)
}

#[test]
fn an_export_follows_the_same_rule() -> Result<()> {
    let mut scene = Scene::new()?;
    ensure!(exported(&scene)? == SIZE, "the first is of all");
    scene.write(20)?;
    scene.snapshot("one")?;
    scene.write(21)?;
    ensure!(
        exported(&scene)? == 2 * BLOCK,
        "what both images know is dirty"
    );
    scene.snapshot_carrying("two", &[])?;
    ensure!(
        exported(&scene)? == SIZE,
        "nobody knows what the overlay holds"
    );
    Ok(())
}
