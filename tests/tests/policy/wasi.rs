//! WASI: a component that imports some of it is refused without a grant, and works with one.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, MIB, Site, StorageDaemon};

use crate::scene::{Scene, sha256};

#[allow(dead_code)] // of the sandbox's own tests, which use all of it
#[path = "../../../runtime/tests/sandbox/component.rs"]
mod component;

const ALL: &str = "clocks,random,output";

/// Prints a line, looks at the clock, takes a random number, and puts all that is dirty.
fn provider(site: &Site) -> Result<PathBuf> {
    let file = site.path("uses-wasi.wasm");
    let bytes = component::provider_with_wasi(
        "(local $at i32) (local $count i32) (local $offset i64) (local $end i64)
        (i32.store (i32.const 1024) (i32.const 0x0a216968)) ;; hi!
        (call $print (call $stdout) (i32.const 1024) (i32.const 4) (i32.const 1200))
        (call $wall (i32.const 1040))
        (drop (call $random))
        (loop $more
          (call $next (local.get $dirty) (i32.const 100) (i32.const 48))
          (if (i32.load8_u (i32.const 48)) (then unreachable))
          (local.set $at (i32.load (i32.const 52)))
          (local.set $count (i32.load (i32.const 56)))
          (if (i32.eqz (local.get $count)) (then (return (call $ok (i32.const 0) (i32.const 0)))))
          (loop $each
            (if (i32.eqz (i32.load8_u offset=16 (local.get $at))) (then
              (local.set $offset (i64.load (local.get $at)))
              (local.set $end (i64.add (local.get $offset) (i64.load offset=8 (local.get $at))))
              (loop $block
                (call $put (local.get $writer) (local.get $snapshot) (local.get $offset)
                  (i64.const 65536) (i32.const 1) (i32.const 64))
                (if (i32.load8_u (i32.const 64)) (then unreachable))
                (local.set $offset (i64.add (local.get $offset) (i64.const 65536)))
                (br_if $block (i64.lt_u (local.get $offset) (local.get $end))))))
            (local.set $at (i32.add (local.get $at) (i32.const 24)))
            (local.set $count (i32.sub (local.get $count) (i32.const 1)))
            (br_if $each (local.get $count)))
          (br $more))
        unreachable",
    );
    fs::write(&file, bytes)?;
    Ok(file)
}

#[test]
fn without_tenants_it_is_the_command_or_the_configuration_that_grants() -> Result<()> {
    let site = Site::new()?;
    let daemon = StorageDaemon::start_with_writer_exports(&[Disk::raw("da", 4 * MIB)])?;
    let file = provider(&site)?;
    let path = file.to_str().context("a path in UTF-8")?;
    let mut access = daemon.writer_access("da")?;
    access.write(0, &[7; 200_000])?;
    access.flush()?;
    let order = fleecebox_tests::Order {
        provider: path.into(),
        ..site.order(&daemon, "chunked")?
    };
    for (allowed, lacks) in [
        ("", "wasi:"),
        ("random,output", "wasi:clocks/wall-clock@0.2.0"),
        ("clocks,output", "wasi:random/random@0.2.0"),
    ] {
        let command = site.backup_command(&order).arg("--quiet");
        let command = match allowed {
            "" => command,
            parts => command.arg("--allow-wasi").arg(parts),
        };
        let outcome = command.run()?;
        let told = &outcome.stderr;
        ensure!(told.contains("--allow-wasi"), "{told}");
        outcome.assert_refused(2, &format!("it imports `{lacks}"));
    }
    let outcome = site
        .backup_command(&order)
        .arg("--allow-wasi")
        .arg(ALL)
        .run()?;
    let outcome = outcome.assert_success();
    ensure!(outcome.stderr.contains("hi!"), "{}", outcome.stderr);
    let id = fleecebox_tests::Backup::told_by(&outcome)?.id;
    site.verify(&order.archive, &id)?;

    site.configure(&format!(
        "[provider.timed]\ncomponent = '{path}'\n[provider.timed.grant]\nwasi = ['clocks', 'random', 'output']\n"
    ))?;
    let configured = fleecebox_tests::Order {
        provider: "timed".into(),
        ..order
    };
    site.backup(&configured)?;
    let inspected = site
        .command(&["provider", "inspect", "timed", "--json"])
        .run()?;
    let needs = inspected.assert_success().document()?["wasi"].clone();
    assert_eq!(needs, serde_json::json!(["clocks", "random", "output"]));
    Ok(())
}

#[test]
fn with_tenants_only_a_rule_grants_and_no_clock_to_one_that_may_not_read() -> Result<()> {
    let scene = Scene::new("chunked", "discard = true")?;
    let file = provider(&scene.site)?;
    let chunked = fleecebox_tests::component("chunked")?;
    let swap = |text: &str| {
        // The first of acme's is the honest one.
        let at = text.find("[tenant.acme.provider.limited]").unwrap_or(0);
        let (before, after) = text.split_at(at);
        let after = after
            .replacen(
                &chunked.display().to_string(),
                &file.display().to_string(),
                1,
            )
            .replacen(
                &sha256(&chunked).unwrap_or_default(),
                &sha256(&file).unwrap_or_default(),
                1,
            );
        format!("{before}{after}")
    };
    scene.configure_with(swap)?;
    let order = scene.order("limited")?;
    let refused = |says: &str| -> Result<()> {
        let outcome = scene.site.backup_command(&order).arg("--quiet").run()?;
        outcome.assert_refused(2, says);
        Ok(())
    };
    refused("it imports `wasi:")?;
    let flag = scene
        .site
        .backup_command(&order)
        .arg("--allow-wasi")
        .arg(ALL);
    flag.arg("--quiet")
        .run()?
        .assert_refused(2, "--allow-wasi means nothing");
    let wasi = "wasi = ['clocks', 'random', 'output']";
    scene.configure_with(|text| text.replace("discard = true", wasi))?;
    refused("it imports `wasi:clocks/wall-clock@0.2.0`")?;
    let config = scene.site.path("fleecebox.toml");
    let check = scene
        .site
        .command(&["policy", "check"])
        .arg(&config)
        .run()?;
    let told = format!("{}{}", check.stdout, check.stderr);
    ensure!(told.contains("clocks without `read`"), "{told}");
    scene.configure_with(|text| text.replace(wasi, &format!("read = true\n{wasi}")))?;
    let backup = scene.site.backup(&order)?;
    ensure!(backup.said.contains("hi!"), "{}", backup.said);
    let granted = scene.last_record()?["granted"]["wasi"].clone();
    assert_eq!(granted, serde_json::json!(["clocks", "random", "output"]));
    let explain = ["policy", "explain", "acme", "web", "limited"];
    let said = scene.site.command(&explain).run()?.assert_success().stdout;
    ensure!(
        said.contains("the parts of WASI: clocks, random, output"),
        "{said}"
    );
    Ok(())
}
