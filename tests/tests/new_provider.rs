//! From `provider new` to a provider that passes its own tests and the conformance kit, with the commands of the README.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Site, component};

/// The folder that keeps what is slow to make, and the one that such projects are built in: the second time is quick.
fn folders() -> Result<(PathBuf, PathBuf)> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let cache = std::env::var_os("FLEECEBOX_CACHE").unwrap_or_else(|| ".cache".into());
    let built = component("chunked")?;
    let target = built.ancestors().nth(2).context("a target folder")?;
    Ok((
        checkout.join(cache),
        target.canonicalize()?.join("new-provider"),
    ))
}

fn cargo(project: &Path, arguments: &[&str]) -> Result<()> {
    let (cache, target) = folders()?;
    let output = Command::new("cargo")
        .args(arguments)
        .current_dir(project)
        .env("FLEECEBOX_CACHE", &cache)
        .env("CARGO_TARGET_DIR", &target)
        .env_remove("RUSTFLAGS")
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo {arguments:?}: {said}");
    Ok(())
}

fn builds_and_passes(name: &str, more: &[&str]) -> Result<()> {
    let site = Site::new()?;
    let projects = site.path("projects");
    std::fs::create_dir(&projects)?;
    let new = ["provider", "new", name, "--lang", "rust"];
    let arguments: Vec<&str> = new.iter().chain(more).copied().collect();
    let command = site.command(&arguments).in_folder(&projects);
    command.run()?.assert_success();
    let project = projects.join(name);
    // The versions that the workspace was tested with; a user's cargo takes the newest.
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
    std::fs::copy(lock, project.join("Cargo.lock"))?;

    cargo(&project, &["test", "--release"])?;
    let (cache, target) = folders()?;
    let script = Command::new(project.join("fleecebox-guest/wasm-std.sh"))
        .env("FLEECEBOX_CACHE", cache)
        .output()?;
    let config = String::from_utf8(script.stdout)?;
    let triple = "wasm32-unknown-unknown";
    cargo(
        &project,
        &[
            "build",
            "--release",
            "--target",
            triple,
            "--config",
            config.trim(),
        ],
    )?;

    let file = format!("{}.wasm", name.replace('-', "_"));
    let built = target.join(triple).join("release").join(file);
    let command = site.command(&["provider", "test", "--seed", "5"]);
    command.arg(&built).run()?.assert_success();

    // From the file to a name, and away again.
    let install = site.command(&["provider", "install", "--name", name]);
    install.arg(&built).run()?.assert_success();
    let listed = site
        .command(&["provider", "list", "--json"])
        .run()?
        .assert_success();
    let document = listed.document()?;
    ensure!(
        document[0]["name"] == name && document[0]["from"] == "installed",
        "{document}"
    );
    let digest = document[0]["sha256"]
        .as_str()
        .context("no digest")?
        .to_owned();
    let inspected = site
        .command(&["provider", "inspect", name, "--json"])
        .run()?;
    ensure!(inspected.assert_success().document()?["sha256"] == digest);
    let test = site.command(&["provider", "test", name, "--only", "full"]);
    test.run()?.assert_success();
    let wrong = format!("{}@sha256:{}", built.display(), "0".repeat(64));
    let install = site
        .command(&["provider", "install", "--name", "other"])
        .arg(wrong);
    install.run()?.assert_refused(2, &digest);
    site.command(&["provider", "remove", name])
        .run()?
        .assert_success();
    site.command(&["provider", "remove", name])
        .run()?
        .assert_refused(2, &format!("no provider named '{name}' is installed"));

    // A second project of that name is not written over the first.
    let command = site.command(&arguments).in_folder(&projects);
    command.run()?.assert_refused(2, "is there already");
    Ok(())
}

#[test]
fn a_new_provider_in_rust_passes_at_once() -> Result<()> {
    builds_and_passes("sees-bytes", &[])?;
    builds_and_passes("blind-one", &["--blind"])
}
