//! Policy: what no rule grants is denied before QEMU is asked anything; a limit that is passed costs the job and
//! nothing else; and each job leaves a record of it.

mod extra;
mod scene;
mod wasi;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Backup, Load, MIB, Order, Proxy, QemuState, Site, Writer, component};
use scene::{Scene, sha256};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// One test for each limit: its name, the provider, its rule from `read` on, and what the product says.
macro_rules! limits {
    ($($sentence:ident: $component:literal, $rule:literal, $says:literal;)*) => {
        $(
            #[test]
            fn $sentence() -> Result<()> {
                costs_only_the_job($component, $rule, $says)
            }
        )*
    };
}

// Each of the two disks has 2 MiB to be backed up: 3 MiB are enough for either and not for both.
limits! {
    bytes_stored_are_counted_over_all_volumes:
        "chunked", "limits = { output-bytes = 3145728 }", "quota-exceeded(output-bytes)";
    bytes_read_are_counted_over_all_volumes:
        "chunked", "limits = { read-bytes = 3145728 }", "quota-exceeded(read-bytes)";
    objects_are_counted_over_all_volumes:
        "image", "read = true\nlimits = { objects = 1 }", "quota-exceeded(objects)";
    a_receipt_has_an_end:
        "claims-without-bytes", "read = true\nlimits = { receipt-bytes = 1 }",
        "receipt has 2 bytes, more than its limit of 1 (receipt-bytes)";
    memory_has_an_end:
        "grows-memory", "limits = { memory = 33554432 }", "it needs more memory than its limit allows";
    processor_time_has_an_end:
        "spins", "limits = { cpu-seconds = 1 }", "it used more CPU time than its limit allows";
    a_run_has_an_end:
        "stalls-half-way", "limits = { wall-seconds = 1 }", "longer than its limit of 1 s (wall-seconds)";
    a_snapshot_has_an_end:
        "stalls-half-way", "limits = { snapshot-seconds = 1 }",
        "more seconds than the 1 of `snapshot-seconds`";
    fleecing_images_have_an_end:
        "stalls-half-way", "limits = { fleecing-bytes = 262144 }",
        "more than the 262144 of `fleecing-bytes`";
    a_provider_that_trickles_is_stopped:
        "stalls-half-way", "limits = { progress-per-minute = 67108864 }",
        "less than its limit of 67108864 in a minute (progress-per-minute)";
    reading_needs_a_grant: "image", "discard = true", "the policy grants no reader";
}

/// A backup by a provider that passes a limit, while the guest writes: it fails and says why, QEMU has nothing left
/// over, no backup appears, and the next honest one builds on the last and is right.
fn costs_only_the_job(limited: &str, rule: &str, says: &str) -> Result<()> {
    let scene = Scene::new(limited, rule)?;
    let proxy = Proxy::start(scene.daemon.monitors())?;
    let honest = scene.order("honest")?.through(&proxy);
    let base = scene.site.backup(&honest)?;
    proxy.references()?;

    scene.change(1)?;
    let before = QemuState::read(scene.daemon.monitors())?;
    let writer = Writer::start(
        scene.daemon.writer_access("da")?,
        Load {
            seed: 7,
            rate: 100,
            regions: Some(std::iter::once(0..2 * MIB).collect()),
        },
    )?;
    let order = Order {
        provider: "limited".into(),
        ..honest.clone()
    };
    let outcome = scene.site.backup_command(&order).run()?;
    // The guest goes on.
    writer.wait_for(10)?;
    writer.stop()?;
    let told = outcome.stderr.lines().last().unwrap_or_default();
    ensure!(
        outcome.code() == Some(1),
        "{:?}: {}",
        outcome.code(),
        outcome.stderr
    );
    ensure!(told.contains(says), "{says:?}: {told}");
    proxy.references()?;
    QemuState::read(scene.daemon.monitors())?.assert_restored(&before, |_| false);
    scene.site.check_no_fleecing_images()?;
    assert_eq!(scene.site.list(&honest.archive)?, [base.id.as_str()]);

    let record = scene.last_record()?;
    ensure!(record["outcome"] == "failed", "{record}");
    let error = record["error"].as_str().unwrap_or_default();
    ensure!(error.contains(says), "{record}");
    let cpu = record["used"]["sandbox_cpu_ms"].as_u64();
    ensure!(
        limited != "spins" || cpu >= Some(1000),
        "a provider that spins for its second: {record}"
    );

    scene.change(2)?;
    let next = scene.site.backup(&honest)?;
    next.assert_base("da", Some(&base));
    next.assert_base("db", Some(&base));
    scene.site.check(&honest, &next, &proxy.references()?)
}

#[test]
fn bandwidth_holds_over_all_volumes_and_the_backup_is_right() -> Result<()> {
    // 4 MiB at 2 MiB/s; the last read begins when all before it have had their time.
    let scene = Scene::new("chunked", "limits = { bandwidth = 2097152 }")?;
    let proxy = Proxy::start(scene.daemon.monitors())?;
    let order = scene.order("limited")?.through(&proxy);
    let outcome = scene.site.backup_command(&order).run()?.assert_success();
    let running = outcome.document()?["step_seconds"]["running"].clone();
    ensure!(
        running.as_f64().is_some_and(|seconds| seconds >= 1.0),
        "{running}"
    );
    let backup = Backup::told_by(&outcome)?;
    scene.site.check(&order, &backup, &proxy.references()?)
}

#[test]
fn lines_of_log_are_counted_over_all_volumes_and_dropped() -> Result<()> {
    // Each volume logs one line, and one line costs 64 bytes.
    let scene = Scene::new("image", "read = true\nlimits = { log-bytes = 64 }")?;
    let backup = scene.site.backup(&scene.order("limited")?)?;
    let says = "1 lines of the provider's log were dropped";
    ensure!(backup.said.matches(says).count() == 1, "{}", backup.said);
    let record = scene.last_record()?;
    ensure!(record["used"]["log_bytes"] == 64, "{record}");
    ensure!(record["used"]["log_lines_dropped"] == 1, "{record}");
    Ok(())
}

#[test]
fn a_component_has_an_end() -> Result<()> {
    let scene = Scene::new("chunked", "limits = { component-bytes = 1000 }")?;
    scene.finds_mistaken(
        &scene.order("limited")?,
        "more than its limit of 1000 (component-bytes)",
    )
}

#[test]
fn what_no_rule_grants_is_denied() -> Result<()> {
    let scene = Scene::new("chunked", "discard = true")?;
    let order = scene.order("limited")?;
    let with = |change: &dyn Fn(&mut Order)| {
        let mut order = order.clone();
        change(&mut order);
        order
    };
    let mail = with(&|order| order.vm = "mail".into());
    scene.denies(&mail, "no tenant owns the VM 'mail'")?;
    let other = with(&|order| order.vm = "other".into());
    scene.denies(&other, "tenant beta (line")?;
    let unknown = with(&|order| order.provider = "chunkd".into());
    scene.denies(
        &unknown,
        "has no provider 'chunkd' (it has honest, limited)",
    )?;
    let file = component("chunked")?;
    let path = file.to_str().context("a path in UTF-8")?;
    let own = with(&|order| order.provider = path.into());
    scene.denies(&own, "has no provider '/")?;
    let elsewhere = with(&|order| order.archive = scene.site.archive());
    scene.denies(&elsewhere, "may not go to the archive '/")?;
    let theirs = with(&|order| order.archive = "spare".into());
    scene.denies(&theirs, "may not go to the archive 'spare' (line")
}

#[test]
fn only_the_disks_of_the_rule_are_backed_up() -> Result<()> {
    let scene = Scene::new("chunked", "discard = true")?;
    scene.configure_with(|text| {
        text.replace(
            "provider = 'limited'\nvms = ['web', 'twin']\nvolumes = 'all'",
            "provider = 'limited'\nvms = ['web', 'twin']\nvolumes = ['db']",
        )
    })?;
    let order = scene.order("limited")?;
    let says = "may not back up the disk 'da' of the VM 'web' (line";
    scene.denies(&order.clone().only(&["da"]), says)?;
    scene.denies(&order.clone().only(&["db", "da"]), says)?;
    // A storage daemon has no devices: the other node is a disk of its as well, and missing.
    let outcome = scene.site.backup_command(&order.only(&[])).run()?;
    ensure!(
        outcome.code() == Some(scene::INCOMPLETE),
        "{}",
        outcome.stderr
    );
    ensure!(
        outcome.stderr.contains("da is left out"),
        "{}",
        outcome.stderr
    );
    let backup = Backup::told_by(&outcome)?;
    let names: Vec<_> = backup
        .volumes
        .iter()
        .map(|volume| &volume["name"])
        .collect();
    assert_eq!(names, ["db"]);
    Ok(())
}

#[test]
fn another_component_than_the_pinned_one_is_not_run() -> Result<()> {
    let scene = Scene::new("chunked", "discard = true")?;
    let file = scene.site.path("swapped.wasm");
    fs::copy(component("chunked")?, &file)?;
    let pinned = sha256(&file)?;
    fs::copy(component("spins")?, &file)?;
    let actual = sha256(&file)?;
    let chunked = component("chunked")?.display().to_string();
    let swapped = file.display().to_string();
    scene.configure_with(|text| text.replace(&chunked, &swapped))?;
    let order = scene.order("limited")?;
    scene.denies(
        &order,
        &format!("{actual}, and only {pinned} may be run (line"),
    )?;
    // A pin holds without tenants too.
    scene.site.configure(&format!(
        "[archive.main]\npath = '{}'\n[provider.limited]\ncomponent = '{swapped}'\nsha256 = '{pinned}'\n",
        scene.site.archive().display()
    ))?;
    scene.refuses(scene::DENIED, &order, &actual)
}

#[test]
fn an_attachment_that_is_not_granted_is_not_even_read() -> Result<()> {
    let scene = Scene::new("chunked", "discard = true")?;
    let vm = "[vm.web]\nattachments = { xml = '/nonexistent/web.xml' }\n";
    scene.configure_with(|text| format!("{vm}{text}"))?;
    let order = scene.order("limited")?;
    scene.site.backup(&order)?;
    ensure!(scene.last_record()?["granted"]["attachments"] == Value::Array(vec![]));
    scene.configure_with(|text| text.replace("discard = true", "attachments = ['xml']"))?;
    scene.finds_mistaken(&order, "/nonexistent/web.xml")
}

#[test]
fn jobs_at_once_hold_over_processes_and_a_killed_job_frees_its_place() -> Result<()> {
    let scene = Scene::new("stalls-half-way", "discard = true")?;
    scene.configure_with(|text| {
        text.replacen("[tenant.acme]", "[tenant.acme]\njobs-at-once = 1", 1)
    })?;
    let stalled = scene
        .site
        .backup_command(&scene.order("limited")?.only(&["da"]));
    let running = stalled.start()?;
    running.wait_for_line(SOON, |line| line.contains("half of it is stored"))?;
    // Another VM, so that it is not the VM's own lock which keeps it out.
    let twin = Order {
        vm: "twin".into(),
        ..scene.order("honest")?.only(&["db"])
    };
    let second = scene.site.backup_command(&twin).arg("--quiet").run()?;
    let says = "tenant acme has 1 jobs running, as many as it may (jobs-at-once)";
    second.assert_refused(11, says);
    running.kill()?;
    let backup = scene.site.backup(&twin)?;
    scene.site.verify(&twin.archive, &backup.id)?;
    // It could not say so itself.
    let audit = scene.site.command(&["audit", "acme", "--json"]).run()?;
    let records = audit.assert_success().document()?;
    let told: Vec<_> = records
        .as_array()
        .context("no list")?
        .iter()
        .map(|it| (it["provider"].as_str(), it["outcome"].as_str()))
        .collect();
    let refused = (Some("honest"), Some("failed"));
    let died = (Some("limited"), Some("died"));
    let done = (Some("honest"), Some("done"));
    assert_eq!(told, [refused, died, done, done], "{records:#}");
    Ok(())
}

#[test]
fn a_provider_without_a_rule_is_not_run_to_give_back_what_it_claimed() -> Result<()> {
    let scene = Scene::new("image", "read = true")?;
    let claimed = scene.site.backup(&scene.order("limited")?)?;
    let placed = scene.site.backup(&Order {
        full: true,
        ..scene.order("honest")?
    })?;
    let archive = &scene.order("honest")?.archive;
    scene.site.verify(archive, &claimed.id)?;
    let text = fs::read_to_string(scene.site.path("fleecebox.toml"))?;
    scene.configure_with(|text| {
        let rules: Vec<_> = text.split("[[tenant.acme.grant]]").collect();
        rules
            .iter()
            .filter(|rule| !rule.contains("'limited'\nvms"))
            .copied()
            .collect::<Vec<_>>()
            .join("[[tenant.acme.grant]]")
    })?;
    // What the host placed needs no provider.
    scene.site.verify(archive, &placed.id)?;
    let verify = scene
        .site
        .command(&["verify", &claimed.id, "--archive", "main"]);
    let outcome = verify.run()?;
    ensure!(outcome.code() == Some(12), "{}", outcome.stderr);
    let says = "denied: no tenant with the namespace 'acme' grants the provider 'limited' anything";
    ensure!(
        outcome.stdout.contains(says),
        "{}{}",
        outcome.stdout,
        outcome.stderr
    );
    scene.site.configure(&text)?;
    scene.site.verify(archive, &claimed.id)
}

#[test]
fn what_was_proven_is_given_back_with_the_memory_of_its_proof_whatever_the_rule_says_by_now()
-> Result<()> {
    let scene = Scene::new("image", "read = true\nlimits = { memory = 67108864 }")?;
    let claimed = scene.site.backup(&scene.order("limited")?)?;
    // Less than any component takes.
    scene.configure_with(|text| text.replace("memory = 67108864", "memory = 65536"))?;
    scene
        .site
        .verify(&scene.order("honest")?.archive, &claimed.id)
}

#[test]
fn every_job_leaves_a_record_of_what_it_was_granted_and_used() -> Result<()> {
    let scene = Scene::new("stalls-half-way", "discard = true")?;
    let backup = scene.site.backup(&scene.order("honest")?)?;
    let record = scene.last_record()?;
    for (key, expected) in [
        ("job", "backup"),
        ("tenant", "acme"),
        ("vm", "web"),
        ("provider", "honest"),
        ("outcome", "done"),
        ("backup", &backup.id),
        ("component_sha256", &sha256(&component("chunked")?)?),
    ] {
        ensure!(record[key] == expected, "{key}: {record}");
    }
    ensure!(
        record["granted"]["read"] == false && record["granted"]["volumes"] == "all",
        "{record}"
    );
    let used = |key: &str| record["used"][key].as_u64().unwrap_or_default();
    // Two disks of 2 MiB of data, and a machine that runs WebAssembly.
    ensure!(
        used("read_bytes") == 4 * MIB && used("output_bytes") == 4 * MIB,
        "{record}"
    );
    ensure!(used("sandbox_peak_bytes") > MIB, "{record}");
    ensure!(
        used("snapshot_ms") > 0 && record["seconds"].as_f64() > Some(0.0),
        "{record}"
    );

    scene
        .site
        .verify(&scene.order("honest")?.archive, &backup.id)?;
    let record = scene.last_record()?;
    ensure!(
        record["job"] == "verify" && record["backup"] == *backup.id,
        "{record}"
    );

    let running = scene
        .site
        .backup_command(&scene.order("limited")?)
        .start()?;
    running.wait_for_line(SOON, |line| line.contains("half of it is stored"))?;
    let job = rustix::process::Pid::from_raw(running.process().pid).context("no such process")?;
    rustix::process::kill_process(job, rustix::process::Signal::TERM)?;
    ensure!(running.finish()?.code() == Some(130));
    let record = scene.last_record()?;
    ensure!(
        record["outcome"] == "cancelled" && record["provider"] == "limited",
        "{record}"
    );

    let mail = Order {
        vm: "mail".into(),
        ..scene.order("honest")?
    };
    scene.denies(&mail, "'mail'")?;
    let audit = |tenant: &[&str]| -> Result<Vec<Value>> {
        let command = [&["audit", "--json"], tenant].concat();
        let document = scene
            .site
            .command(&command)
            .run()?
            .assert_success()
            .document()?;
        Ok(document.as_array().context("no list")?.clone())
    };
    let outcomes = |records: &[Value]| {
        let outcome = |record: &Value| record["outcome"].as_str().unwrap_or_default().to_owned();
        records.iter().map(outcome).collect::<Vec<_>>()
    };
    assert_eq!(outcomes(&audit(&["acme"])?), ["done", "done", "cancelled"]);
    assert_eq!(
        outcomes(&audit(&[])?),
        ["done", "done", "cancelled", "refused"]
    );
    Ok(())
}

#[test]
fn refused_calls_are_counted_by_their_error() -> Result<()> {
    let scene = Scene::new("chunked", "limits = { output-bytes = 3145728 }")?;
    let outcome = scene.site.backup_command(&scene.order("limited")?).run()?;
    ensure!(outcome.code() == Some(1));
    let refused = &scene.last_record()?["used"]["refused"];
    let count = refused["quota-exceeded(output-bytes)"].as_u64();
    ensure!(count.is_some_and(|count| count >= 1), "{refused}");
    Ok(())
}

#[test]
fn a_policy_is_checked_and_explained_by_its_lines() -> Result<()> {
    let scene = Scene::new("chunked", "read = true\nlimits = { cpu-seconds = 0 }")?;
    let file = scene.site.path("fleecebox.toml");
    let text = fs::read_to_string(&file)?;
    let line_of = |part: &str| {
        text.lines()
            .position(|line| line.contains(part))
            .map_or(0, |at| at + 1)
    };
    let check = scene
        .site
        .command(&["policy", "check", "--json"])
        .arg(&file);
    let outcome = check.run()?;
    ensure!(outcome.code() == Some(2), "{}", outcome.stderr);
    let found = outcome.document()?["findings"].clone();
    let has = |line: usize, part: &str| {
        found.as_array().is_some_and(|found| {
            found.iter().any(|finding| {
                finding["line"] == line
                    && finding["message"]
                        .as_str()
                        .is_some_and(|said| said.contains(part))
            })
        })
    };
    ensure!(has(line_of("read = true"), "blind-provider"), "{found:#}");
    ensure!(
        has(line_of("cpu-seconds"), "`cpu-seconds` no provider"),
        "{found:#}"
    );
    let explain = |provider| {
        let command = ["policy", "explain", "acme", "web", provider];
        Ok::<_, anyhow::Error>(scene.site.command(&command).run()?.assert_success().stdout)
    };
    let said = explain("limited")?;
    let granted = |part: &str| {
        said.lines()
            .any(|line| line.starts_with("granted") && line.contains(part))
    };
    ensure!(
        granted(&format!("line {}", line_of("read = true"))),
        "{said}"
    );
    ensure!(
        said.lines()
            .any(|line| line.starts_with("refused  default") && line.contains("(discard)")),
        "{said}"
    );
    ensure!(explain("nobody")?.starts_with("refused"));
    let unknown = ["policy", "explain", "acne", "web", "limited"];
    scene
        .site
        .command(&unknown)
        .run()?
        .assert_refused(2, "no tenant named 'acne'");

    // A contradiction keeps every command from running, with its line.
    scene.configure_with(|text| text.replace("vms = ['other']", "vms = ['other', 'web']"))?;
    scene.refuses(
        scene::MISTAKE,
        &scene.order("honest")?,
        "the VM 'web' belongs to tenant acme already",
    )
}

#[test]
fn the_policy_that_the_documents_show_is_sound() -> Result<()> {
    let site = Site::new()?;
    let example = "../runtime/docs/examples/tenants.toml";
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join(example);
    site.configure(&fs::read_to_string(example)?)?;
    let file = site.path("fleecebox.toml");
    let outcome = site
        .command(&["policy", "check"])
        .arg(&file)
        .run()?
        .assert_success();
    ensure!(outcome.stderr.contains("0 findings"), "{}", outcome.stderr);
    let explain = site.command(&["policy", "explain", "acme", "web", "chunked"]);
    let said = explain.run()?.assert_success().stdout;
    ensure!(
        said.lines().count() > 10 && !said.contains("everything"),
        "{said}"
    );
    Ok(())
}
