//! Attacks that take more than one job, or more than a provider.

use crate::scene::Scene;
use crate::stall::{Relay, frozen_archive};
use crate::{Row, blind, check_told, proof, row};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Order, component};
use std::time::{Duration, Instant};

pub(super) type Test = fn(&mut Scene) -> Result<Option<Row>>;

/// By name.
pub(super) fn all() -> Vec<(&'static str, Test)> {
    let mut all: Vec<(&'static str, Test)> = vec![
        ("blind-no-byte-is-seen", blind::no_byte_is_seen),
        (
            "blind-bytes-cannot-be-compared",
            blind::bytes_cannot_be_compared,
        ),
        (
            "blind-instances-share-nothing",
            blind::instances_share_nothing,
        ),
        (
            "tries-arguments-and-backs-up",
            attempts_leave_the_books_right,
        ),
        ("reaches-for-others", another_tenants_objects_are_not_there),
        ("replays-a-receipt", another_takes_the_place_of_the_base),
        ("trickles-while-the-guest-writes", the_fleecing_image_fills),
        ("stalled-server", a_server_stalls),
        ("stalled-archive", frozen_archive),
    ];
    all.extend(proof::all());
    all
}

/// All that was refused has changed nothing: the same provider then makes a backup that is right.
fn attempts_leave_the_books_right(scene: &mut Scene) -> Result<Option<Row>> {
    let settings = "[provider.settings]\nhow = 'backs-up'\n";
    scene.configure("hostile", &component("tries-arguments")?, settings)?;
    scene.change()?;
    scene.back_up(&scene.order("hostile"))?;
    Ok(None)
}

/// Another tenant has an object in the same archive. Whether it is there cannot be told by its name, however it is put.
fn another_tenants_objects_are_not_there(scene: &mut Scene) -> Result<Option<Row>> {
    let object = scene.neighbours_object()?;
    let settings = format!("[provider.settings]\nhow = '{object}'\n");
    scene.configure("hostile", &component("reaches-for-others")?, &settings)?;
    let began = Instant::now();
    let attack = scene.attack(&scene.site.backup_command(&scene.order("hostile")))?;
    let row = row("reaches-for-others", &attack, began.elapsed());
    check_told(
        &attack,
        1,
        "tried: 16; refused as if nothing were there: 16",
    )?;
    scene.back_up_honestly()?;
    Ok(Some(row))
}

/// A component that was put in the place of the one that made the base gets its receipt, and nothing by it. What the
/// base claims is still asked of the component that claimed it, which the archive keeps.
fn another_takes_the_place_of_the_base(scene: &mut Scene) -> Result<Option<Row>> {
    scene.configure("honest", &component("image")?, "")?;
    scene.change()?;
    scene.back_up_honestly()?;
    scene.configure("honest", &component("replays-a-receipt")?, "")?;
    let began = Instant::now();
    let attack = scene.attack(&scene.site.backup_command(&scene.honest))?;
    let row = row("replays-a-receipt", &attack, began.elapsed());
    check_told(&attack, 1, "the provider cannot open what it wrote")?;
    scene.configure("hostile", &component("spins")?, "")?;
    scene.back_up_honestly()?;
    Ok(Some(row))
}

/// A provider takes its time while the guest writes, and the old data of what it overwrites has to be kept: the job is
/// given up before the fleecing images have taken more than they may, and the guest has not noticed.
fn the_fleecing_image_fills(scene: &mut Scene) -> Result<Option<Row>> {
    let policy = "[provider.limits]\nfleecing-bytes = 262144\n";
    scene.configure("hostile", &component("trickles")?, policy)?;
    let began = Instant::now();
    let attack = scene.attack(&scene.site.backup_command(&scene.order("hostile")))?;
    let row = row("trickles-while-the-guest-writes", &attack, began.elapsed());
    check_told(&attack, 1, "more than the 262144 of `fleecing-bytes`")?;
    scene.back_up_honestly()?;
    Ok(Some(row))
}

/// QEMU's NBD server stops answering in the middle of a read: the run ends when its time is up. By that server the job
/// asks whether the disks' storage answers before it takes anything from QEMU, so it waits for it as for storage that
/// hangs: for five minutes at most.
fn a_server_stalls(scene: &mut Scene) -> Result<Option<Row>> {
    let relay = Relay::start(
        &scene.daemon.nbd_socket(),
        &scene.site.path("relay.sock"),
        1 << 20,
    )?;
    let policy = "[provider.limits]\nwall-seconds = 2\n";
    scene.configure("hostile", &component("chunked")?, policy)?;
    let order = Order {
        nbd: Some(relay.socket.clone()),
        full: true,
        ..scene.order("hostile")
    };
    let began = Instant::now();
    let attack = scene.attack(&scene.site.backup_command(&order))?;
    let took = began.elapsed();
    ensure!(relay.has_stalled(), "the server did not stall");
    check_told(
        &attack,
        1,
        "it ran for longer than its limit of 2 s (wall-seconds)",
    )?;
    ensure!(took < Duration::from_secs(360), "it took {took:?}");
    drop(relay);
    scene
        .back_up_honestly()
        .context("after the server stalled")?;
    Ok(Some(row("stalled-server", &attack, took)))
}
