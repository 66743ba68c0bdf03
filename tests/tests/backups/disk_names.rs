//! Which disks a backup takes: what a name means, and what is left out and said.

use std::fs;
use std::path::Path;
use std::process;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, Emulator, MIB, Order, Outcome, Random, Site, StorageDaemon, compare, component,
};
use serde_json::{Value, json};

const INCOMPLETE: i32 = 3;

/// A raw disk of 1 MiB of random bytes, in a file of that name.
fn disk(folder: &Path, name: &str) -> Result<String> {
    let seed = name.bytes().map(u64::from).sum();
    Random::new(seed).fill_file(&folder.join(name), 1)?;
    Ok(folder.join(name).display().to_string())
}

fn node(folder: &Path, name: &str) -> Result<String> {
    let file = json!({"driver": "file", "filename": disk(folder, name)?});
    Ok(json!({"driver": "raw", "node-name": name, "file": file}).to_string())
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

/// A device whose drive is called `scsi0`, and after it the device `scsi0`.
fn two_called_scsi0(folder: &Path) -> Result<Vec<String>> {
    let other = format!(
        "if=none,id=scsi0,format=raw,file={}",
        disk(folder, "other")?
    );
    let wanted = node(folder, "wanted")?;
    Ok(words(&[
        "-drive",
        &other,
        "-device",
        "virtio-blk-pci,id=other,drive=scsi0",
        "-blockdev",
        &wanted,
        "-device",
        "virtio-blk-pci,id=scsi0,drive=wanted",
    ]))
}

fn on(site: &Site, vm: &Emulator) -> Result<Order> {
    site.order_for(&vm.monitors().product, "chunked")
}

/// A policy whose only rule grants these volumes, and `more` lines of the VM's.
fn grant(site: &Site, volumes: &str, more: &str) -> Result<()> {
    let component = component("chunked")?;
    let digest = process::Command::new("sha256sum")
        .arg(&component)
        .output()?;
    let digest = String::from_utf8(digest.stdout)?;
    let digest = digest.split_whitespace().next().context("no digest")?;
    site.configure(&format!(
        "[vm.web]\n{more}\n[archive.main]\npath = '{}'\n\
         [tenant.acme]\nvms = ['web']\narchives = ['main']\n\
         [tenant.acme.provider.chunked]\ncomponent = '{}'\nsha256 = '{digest}'\n\
         [[tenant.acme.grant]]\nprovider = 'chunked'\nvms = 'all'\nvolumes = {volumes}\n",
        site.archive().display(),
        component.display()
    ))
}

fn granted(order: &Order) -> Order {
    Order {
        provider: "chunked".into(),
        archive: "main".into(),
        ..order.clone()
    }
}

fn names(backup: &Backup) -> Vec<&str> {
    let volumes = backup.volumes.iter();
    volumes
        .filter_map(|volume| volume["name"].as_str())
        .collect()
}

fn incomplete(outcome: &Outcome, name: &str, reason: &str) -> Result<Value> {
    let said = &outcome.stderr;
    ensure!(
        outcome.code() == Some(INCOMPLETE),
        "{:?}: {said}",
        outcome.code()
    );
    ensure!(said.contains(&format!("{name} is left out")), "{said}");
    let told = outcome.document()?;
    let left = told["left_out"].as_array().context("no list")?;
    let left = left.iter().find(|disk| disk["name"] == name);
    let left = left.with_context(|| format!("{told}"))?;
    ensure!(left["excluded"] == false, "{left}");
    let why = left["reason"].as_str().unwrap_or_default();
    ensure!(why.contains(reason), "{left}");
    Ok(told)
}

#[test]
fn a_name_that_means_two_disks_means_none() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(two_called_scsi0)?;
    let order = on(&site, &vm)?;
    let says = "the name scsi0 means two disks: the drive scsi0 of the device other";
    for command in [
        site.backup_command(&order.clone().only(&["scsi0"])),
        site.backup_command(&order).arg("--exclude").arg("scsi0"),
    ] {
        let refused = command.arg("--quiet").run()?.assert_refused(2, says);
        let other = "and the device scsi0 (block node wanted)";
        ensure!(refused.stderr.contains(other), "{}", refused.stderr);
    }
    site.check_no_fleecing_images()?;

    // By names that only one has, the right ones; and all of them, each by its device's.
    let backup = site.backup(&order.clone().only(&["wanted"]))?;
    assert_eq!(names(&backup), ["scsi0"]);
    let restored = site.restore(&order.archive, &backup.id)?;
    compare::same_bytes(&restored.join("scsi0.raw"), &vm.path("wanted"))?;
    let all = site.backup(&order)?;
    assert_eq!(names(&all), ["other", "scsi0"]);

    // A rule that grants the one must not give the other away.
    grant(&site, "['scsi0']", "")?;
    let command = site.backup_command(&granted(&order)).arg("--quiet");
    command.run()?.assert_refused(2, says);

    // Nor must a further volume take the name of a disk that it is not.
    site.configure("[vm.web.extra]\nscsi0 = 'other'\n")?;
    let outcome = site.backup_command(&order).arg("--quiet").run()?;
    outcome.assert_refused(2, "the name scsi0 means two disks");
    Ok(())
}

#[test]
fn a_node_below_a_disk_is_a_part_of_it_and_no_other_disk() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(|folder| {
        let file = json!({"driver": "file", "filename": disk(folder, "a")?, "node-name": "va"});
        let top = json!({"driver": "raw", "node-name": "top", "file": "va"});
        Ok(words(&[
            "-blockdev",
            &file.to_string(),
            "-blockdev",
            &top.to_string(),
            "-device",
            "virtio-blk-pci,id=va,drive=top",
        ]))
    })?;
    let backup = site.backup(&on(&site, &vm)?.only(&["va"]))?;
    assert_eq!(names(&backup), ["va"]);
    Ok(())
}

#[test]
fn a_disk_that_no_rule_grants_is_missing_and_said_to_be_until_it_is_excluded() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(|folder| {
        let (a, b) = (node(folder, "na")?, node(folder, "nb")?);
        Ok(words(&[
            "-blockdev",
            &a,
            "-device",
            "virtio-blk-pci,id=va,drive=na",
            "-blockdev",
            &b,
            "-device",
            "virtio-blk-pci,id=vb,drive=nb",
        ]))
    })?;
    let order = granted(&on(&site, &vm)?);
    grant(&site, "['va']", "")?;
    let outcome = site.backup_command(&order).run()?;
    let told = incomplete(&outcome, "vb", "does not grant it")?;
    assert_eq!(names(&Backup::told_by(&outcome)?), ["va"]);
    let list = site.command(&["list"]).run()?.assert_success();
    ensure!(
        list.stdout.contains("vb MISSING: the rule in line"),
        "{}",
        list.stdout
    );
    let list = site.command(&["list", "--json"]).run()?.assert_success();
    let listed = &list.document()?[0];
    ensure!(
        listed["complete"] == false && listed["left_out"][0]["name"] == "vb",
        "{listed}"
    );
    let id = told["backup"].as_str().context("no id")?;
    let show = site
        .command(&["show", id, "--json"])
        .run()?
        .assert_success();
    ensure!(show.stdout.contains("left_out"), "{}", show.stdout);
    let dry = site.backup_command(&order).arg("--dry-run").run()?;
    ensure!(
        dry.document()?["left_out"][0]["name"] == "vb",
        "{}",
        dry.stdout
    );

    // By any of its names, in the configuration or on the command line; or by naming what is wanted.
    grant(&site, "['va']", "exclude = ['nb']")?;
    let backup = site.backup(&order)?;
    ensure!(!backup.said.contains("is left out"), "{}", backup.said);
    grant(&site, "['va']", "")?;
    let command = site.backup_command(&order).arg("--exclude").arg("vb");
    command.run()?.assert_success();
    site.backup(&order.clone().only(&["va"]))?;
    grant(&site, "'all'", "exclude = ['vb']")?;
    assert_eq!(names(&site.backup(&order)?), ["va"]);
    let list = site.command(&["list"]).run()?.assert_success();
    ensure!(list.stdout.contains("vb excluded"), "{}", list.stdout);
    Ok(())
}

#[test]
fn a_disk_that_qemu_does_not_have_is_named() -> Result<()> {
    let site = Site::new()?;
    let daemon = StorageDaemon::start(&[Disk::raw("remote", MIB)])?;
    let socket = daemon.folder().join("vhost.sock");
    let export = json!({"type": "vhost-user-blk", "id": "remote", "node-name": "remote",
        "writable": true, "addr": {"type": "unix", "path": socket}});
    daemon.control()?.execute("block-export-add", export)?;
    let vm = Emulator::running(|folder| {
        let chardev = format!("socket,id=remote,path={}", socket.display());
        let own = node(folder, "own")?;
        Ok(words(&[
            "-object",
            "memory-backend-memfd,id=memory,size=64M,share=on",
            "-machine",
            "memory-backend=memory",
            "-chardev",
            &chardev,
            "-device",
            "vhost-user-blk-pci,id=vub,chardev=remote",
            "-blockdev",
            &own,
            "-device",
            "virtio-blk-pci,id=own,drive=own",
        ]))
    })?;
    let order = on(&site, &vm)?;
    let outcome = site.backup_command(&order).run()?;
    incomplete(&outcome, "vub", "it is a vhost-user-blk-pci device")?;
    assert_eq!(names(&Backup::told_by(&outcome)?), ["own"]);
    let dry = site.backup_command(&order).arg("--dry-run").run()?;
    ensure!(dry.code() == Some(INCOMPLETE), "{}", dry.stderr);
    ensure!(
        dry.document()?["left_out"][0]["name"] == "vub",
        "{}",
        dry.stdout
    );
    let named = site
        .backup_command(&order.clone().only(&["vub"]))
        .arg("--quiet");
    named.run()?.assert_refused(
        2,
        "disk vub cannot be backed up: it is a vhost-user-blk-pci",
    );

    let excluded = site.backup_command(&order).arg("--exclude").arg("vub");
    excluded.run()?.assert_success();
    site.backup(&order.only(&["own"]))?;
    Ok(())
}

#[test]
fn a_disk_under_two_devices_is_taken_once() -> Result<()> {
    let site = Site::new()?;
    let vm = Emulator::running(|folder| {
        let (shared, other) = (node(folder, "shared")?, node(folder, "no")?);
        let path = |id: &str| format!("scsi-hd,bus=vs.0,drive=shared,share-rw=on,wwn=1,id={id}");
        Ok(words(&[
            "-device",
            "virtio-scsi-pci,id=vs",
            "-blockdev",
            &shared,
            "-device",
            &path("p1"),
            "-device",
            &path("p2"),
            "-blockdev",
            &other,
            "-device",
            "virtio-blk-pci,id=vo,drive=no",
        ]))
    })?;
    let order = on(&site, &vm)?;
    let said = "p2 is the same disk as p1, and taken once, as p1";
    for disks in [&[][..], &["p1", "p2", "vo"]] {
        let backup = site.backup(&order.clone().only(disks))?;
        ensure!(backup.said.contains(said), "{}", backup.said);
        assert_eq!(names(&backup), ["p1", "vo"]);
        let restored = site.restore(&order.archive, &backup.id)?;
        compare::same_bytes(&restored.join("p1.raw"), &vm.path("shared"))?;
        fs::remove_dir_all(restored)?;
    }
    let second = site.backup(&order.only(&["p2"]))?;
    assert_eq!(names(&second), ["p2"]);
    Ok(())
}

#[test]
fn a_provider_that_is_configured_and_another_installed_by_its_name_are_not_taken_for_each_other()
-> Result<()> {
    let site = Site::new()?;
    let daemon = StorageDaemon::start(&[Disk::raw("da", MIB)])?;
    let [first, second] = [component("chunked")?, component("image")?];
    let install = site
        .command(&["provider", "install", "--name", "mine"])
        .arg(&first);
    install.run()?.assert_success();
    let mut order = site.order(&daemon, "chunked")?;
    order.provider = "mine".into();
    site.backup(&order)?;
    site.configure(&format!(
        "[provider.mine]\ncomponent = '{}'\n",
        second.display()
    ))?;
    let refused = site.backup_command(&order).arg("--quiet").run()?;
    refused.assert_refused(2, "the name 'mine' means two providers");
    Ok(())
}
