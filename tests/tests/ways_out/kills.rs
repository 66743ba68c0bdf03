//! Kills (-9) in the middle of an incremental backup, everywhere: at each step of the journal, before and after each
//! QMP command, and with the sandbox killed first. Each time the next run has to put everything right.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::crash::{Attempt, Server, Site, result};
use anyhow::{Context, Result, ensure};
use fleecebox_tests::{At, Fault, Fleecebox, QemuState, Running, Stage, What, eventually};
use serde_json::json;

/// As they stand in the journal, in their order.
const STEPS: [&str; 8] = [
    "preparing",
    "snapshot",
    "running",
    "releasing",
    "proving",
    "committing",
    "committed",
    "switching-bitmaps",
];
const SOON: Duration = Duration::from_secs(60);

fn kill_at_step(site: &Site, step: &str) -> Result<Attempt> {
    let running = site.backup().env("FLEECEBOX_STOP_AT", step).start()?;
    wait_stopped(&running)?;
    let outcome = running.kill()?;
    assert_eq!(outcome.signal(), Some(9));
    let dead = site.attempt()?;
    assert_eq!(dead.step(), Some(step));
    Ok(dead)
}

/// Waits until the job has stopped itself, as a step of the journal tells it.
fn wait_stopped(running: &Running) -> Result<()> {
    let pid = running.process().pid;
    eventually("the job to stop itself", SOON, || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        ensure!(state != Some('Z'), "the job ended");
        Ok((state == Some('T')).then_some(()))
    })
}

#[test]
fn a_job_killed_at_any_step_of_its_journal_is_cleaned_up_by_the_next() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    for step in STEPS {
        let dead = kill_at_step(&site, step)?;
        site.recover_from(&dead)
            .with_context(|| format!("killed at {step}"))?;
    }
    Ok(())
}

#[test]
fn a_job_that_started_the_nbd_server_is_cleaned_up_by_the_next() -> Result<()> {
    let mut site = Site::new(Server::Own)?;
    for step in STEPS {
        let dead = kill_at_step(&site, step)?;
        site.recover_from(&dead)
            .with_context(|| format!("killed at {step}"))?;
    }
    kill_around_commands(&mut site, Stage::BeforeQemu, is_about_the_server)?;
    kill_around_commands(&mut site, Stage::BeforeAnswer, is_about_the_server)
}

fn is_about_the_server(command: &str) -> bool {
    command.starts_with("nbd-server") || command.starts_with("block-export")
}

#[test]
fn a_job_killed_before_qemu_gets_any_command_is_cleaned_up_by_the_next() -> Result<()> {
    kill_around_commands(&mut Site::new(Server::Shared)?, Stage::BeforeQemu, |_| true)
}

#[test]
fn a_job_killed_before_it_gets_any_answer_is_cleaned_up_by_the_next() -> Result<()> {
    kill_around_commands(&mut Site::new(Server::Shared)?, Stage::BeforeAnswer, |_| {
        true
    })
}

/// Kills a job at each of the commands that `chosen` accepts, one backup each, all in one chain of incrementals.
fn kill_around_commands(
    site: &mut Site,
    stage: Stage,
    chosen: impl Fn(&str) -> bool,
) -> Result<()> {
    site.renew_proxy()?;
    site.write_some()?;
    let outcome = site.backup().run()?.assert_success();
    let commands = site.proxy.commands();
    let references = site.proxy.references()?;
    site.base = site.prove(&outcome, &references)?;
    for (number, command) in (1..).zip(&commands) {
        if chosen(command) {
            kill_at_command(site, number, stage)
                .with_context(|| format!("killed at {command} ({number}, {stage:?})"))?;
        }
    }
    Ok(())
}

/// How often it looks at what is there decides how many commands a job gives, so the last ones may not come.
fn kill_at_command(site: &mut Site, number: usize, stage: Stage) -> Result<()> {
    site.renew_proxy()?;
    site.proxy.inject(Fault {
        at: At::Number(number),
        stage,
        what: What::Hold,
    });
    let running = site.backup().start()?;
    let pid = running.process().pid;
    let held = eventually("the command, or the end", SOON, || {
        if let Ok(held) = site.proxy.wait_held(Duration::from_millis(1)) {
            return Ok(Some(Some(held)));
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Ok(stat.contains(") Z ").then_some(None))
    })?;
    match held {
        Some(held) => {
            let outcome = running.kill()?;
            assert_eq!(outcome.signal(), Some(9));
            held.cut();
        }
        None => drop(running.finish()?.assert_success()),
    }
    let dead = site.attempt()?;
    if held_nothing(&dead) && !dead.references.is_empty() {
        // It went through: its backup is what the next one builds on.
        site.base = site.listed()?.pop_last().context("no backup")?;
    }
    site.recover_from(&dead)?;
    Ok(())
}

fn held_nothing(attempt: &Attempt) -> bool {
    attempt.journal.is_none()
}

#[test]
fn a_sandbox_and_then_its_job_killed_in_the_middle_of_a_run_are_cleaned_up_by_the_next()
-> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    site.renew_proxy()?;
    site.proxy.inject(Fault {
        at: At::Named("block-export-del", 1),
        stage: Stage::BeforeQemu,
        what: What::Hold,
    });
    let running = site.stalled_backup()?;
    let sandboxes = running.family()?;
    assert_eq!(sandboxes.len(), 2, "{sandboxes:?}");
    sandboxes.first().context("no sandbox")?.kill()?;
    let held = site.proxy.wait_held(SOON)?;
    running.kill()?;
    held.cut();
    let dead = site.attempt()?;
    assert_eq!(dead.step(), Some("releasing"));
    site.recover_from(&dead)?;

    // The job alone, with both sandboxes at work: they end with it.
    let running = site.stalled_backup()?;
    let sandboxes = running.family()?;
    let group = control_group(sandboxes.first().context("no sandbox")?.pid)?;
    running.kill()?;
    let dead = site.attempt()?;
    assert_eq!(dead.step(), Some("running"));
    site.recover_from(&dead)?;
    match group {
        Some(group) => ensure!(!group.exists(), "{} stays", group.display()),
        None => fleecebox_tests::not_shown(
            "that the control group goes: this system lets a job have none",
        ),
    }
    Ok(())
}

/// The control group that a job made for this sandbox, if there is one.
fn control_group(pid: i32) -> Result<Option<PathBuf>> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    // hierarchy-ID:controller-list:cgroup-path (cgroups(7))
    let mut paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let Some(path) = paths.find(|path| path.contains("/fleecebox-")) else {
        return Ok(None);
    };
    // Whatever is mounted where: a field after the third is the root of the mount, the next one its place
    // (proc_pid_mountinfo(5)).
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let folders = mounts.lines().filter(|line| line.contains(" - cgroup"));
    let mut folders = folders.filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        let below = Path::new(path).strip_prefix(root).ok()?;
        Some(Path::new(at).join(below))
    });
    let folder = folders.find(|folder| folder.is_dir());
    folder.map(Some).context("no folder of the control group")
}

fn recover(site: &Site) -> Fleecebox {
    site.fleecebox(&["recover", "box", "--archive", "here", "--qmp"])
        .arg(site.proxy.socket())
}

#[test]
fn recover_does_what_the_next_backup_would_do_first() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    for (step, journal_stays) in [
        ("snapshot", true),
        ("running", true),
        ("running", false),
        ("committed", true),
    ] {
        let told = || format!("killed at {step}, its journal stays: {journal_stays}");
        let dead = kill_at_step(&site, step)?;
        let journal = dead.journal.as_ref().context("no journal")?;
        if !journal_stays {
            std::fs::remove_file(site.path("state/vms/box/journal.json"))?;
        }
        let outcome = recover(&site).run()?.assert_success();
        assert_eq!(
            result(&outcome)?,
            json!([{"vm": "box", "found": true, "unsettled": []}])
        );
        let job = journal["job"].as_str().context("no job")?;
        ensure!(outcome.stderr.contains(job), "{}", outcome.stderr);
        if !journal_stays {
            // Only the journal knew of it.
            let id = journal["backup"].as_str().context("no backup")?;
            let unfinished = site.path("archive/namespaces/chunked/backups").join(id);
            std::fs::remove_dir_all(unfinished)?;
        }
        site.assert_clean().with_context(told)?;
        if step == "committed" {
            site.base = journal["backup"].as_str().context("no backup")?.into();
        }
        let again = recover(&site).run()?.assert_success();
        assert_eq!(
            result(&again)?,
            json!([{"vm": "box", "found": false, "unsettled": []}])
        );
        let next = site.backup().run()?.assert_success();
        ensure!(!next.stderr.contains("died"), "{}", next.stderr);
        let base = std::mem::take(&mut site.base);
        for volume in result(&next)?["volumes"].as_array().context("no volumes")? {
            assert_eq!(volume["base"], base.as_str(), "{}", told());
        }
        let references = site.proxy.references()?;
        site.base = site.prove(&next, &references).with_context(told)?;
        site.write_some()?;
    }
    Ok(())
}

#[test]
fn recover_leaves_a_live_job_alone() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let running = site.stalled_backup()?;
    let before = QemuState::read(site.daemon.monitors())?;
    let outcome = recover(&site).run()?;
    outcome.assert_refused(11, "another job is running on this VM");
    QemuState::read(site.daemon.monitors())?.assert_restored(&before, |_| false);
    running.kill()?;
    site.attempt()?;
    recover(&site).run()?.assert_success();
    site.assert_clean()?;
    site.write_some()
}

#[test]
fn recover_removes_the_files_of_a_vm_that_is_gone() -> Result<()> {
    let mut site = Site::new(Server::Shared)?;
    let running = site.stalled_backup()?;
    running.kill()?;
    site.writers.clear();
    site.daemon.kill()?;
    let socket = &site.daemon.monitors().product;
    let recover = site.fleecebox(&["recover", "box", "--archive", "here", "--qmp"]);
    let outcome = recover.arg(socket).run()?.assert_success();
    let said = outcome.stderr.contains("the VM does not run");
    ensure!(said, "{}", outcome.stderr);
    assert_eq!(std::fs::read_dir(site.path("fleecing"))?.count(), 0);
    assert_eq!(site.listed()?.len(), 1);
    Ok(())
}

#[test]
fn recover_without_a_name_goes_through_the_configuration() -> Result<()> {
    let site = Site::new(Server::Shared)?;
    let outcome = site.fleecebox(&["recover"]).run()?;
    assert_eq!(outcome.code(), Some(2), "{outcome:?}");
    let rows = result(&outcome)?;
    let error = rows[0]["error"].as_str().context("no error")?;
    ensure!(error.contains("VM 'box' has no monitor"), "{rows}");
    Ok(())
}
