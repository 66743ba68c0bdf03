//! From `provider new` to a provider that passes its own tests and the conformance kit, with the commands of README.md and
//! of `runtime/docs/writing-providers.md`.

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

/// With this in the place of its own code, if anything.
fn builds_and_passes(name: &str, more: &[&str], code: Option<&str>) -> Result<()> {
    let site = Site::new()?;
    let projects = site.path("projects");
    std::fs::create_dir(&projects)?;
    let new = ["provider", "new", name, "--lang", "rust"];
    let arguments: Vec<&str> = new.iter().chain(more).copied().collect();
    let command = site.command(&arguments).in_folder(&projects);
    command.run()?.assert_success();
    let project = projects.join(name);
    // Built where the last one was; what the page names is there all the same.
    std::os::unix::fs::symlink(folders()?.1, project.join("target"))?;
    // The versions that the workspace was tested with; a user's cargo takes the newest.
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
    std::fs::copy(lock, project.join("Cargo.lock"))?;

    if let Some(code) = code {
        std::fs::write(project.join("src/lib.rs"), code)?;
    }
    cargo(&project, &["test", "--release"])?;
    let (cache, _) = folders()?;
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

    let built = passes_the_kit(&site, &project)?;

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

/// By the last of the commands that the project's page begins with; returns the component that it names.
fn passes_the_kit(site: &Site, project: &Path) -> Result<PathBuf> {
    let page = std::fs::read_to_string(project.join("README.md"))?;
    let commands = page.split("```").nth(1).context("no commands")?;
    let last = commands.trim().lines().last().context("no command")?;
    let built = last
        .strip_prefix("fleecebox provider test ")
        .with_context(|| format!("the last command is '{last}'"))?;
    let test = site.command(&["provider", "test", "--seed", "5", built]);
    test.in_folder(project).run()?.assert_success();
    Ok(project.join(built))
}

/// A sighted and a blind one, each built by the commands of its page: by `make languages`, once for all tests. What is
/// checked here is that this was this very project.
fn its_page_leads_to_a_provider_that_passes(language: &str) -> Result<()> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let site = Site::new()?;
    let made = site.path("made");
    for (kind, more) in [("sighted", &[][..]), ("blind", &["--blind"])] {
        let name = format!("{language}-{kind}");
        let new = ["provider", "new", &name, "--lang", language];
        let arguments: Vec<&str> = new.iter().chain(more).copied().collect();
        let command = site.command(&arguments).in_folder(site.path(""));
        command.run()?.assert_success();
        let project = site.path(&name);
        let mut build = Command::new(checkout.join("providers/build.sh"));
        // Where `make languages` has put it, by whatever name this process knows the folder.
        build.env("FLEECEBOX_CACHE", folders()?.0);
        let output = build.arg(&made).arg(&name).arg(&project).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}");

        let file = made.join(format!("{name}.wasm"));
        ensure!(
            std::fs::read(&file)? == std::fs::read(component(&name)?)?,
            "`make languages` has built another {name} than `provider new` writes now"
        );
        let page = std::fs::read_to_string(project.join("README.md"))?;
        let built = page
            .lines()
            .find_map(|line| line.strip_prefix("fleecebox provider test "))
            .context("the page does not end with the kit")?;
        let built = project.join(built);
        std::fs::create_dir_all(built.parent().context("a folder")?)?;
        std::fs::copy(file, built)?;
        passes_the_kit(&site, &project)?;
    }
    Ok(())
}

#[test]
fn a_new_provider_in_c_passes_at_once() -> Result<()> {
    its_page_leads_to_a_provider_that_passes("c")
}

#[test]
fn a_new_provider_in_python_passes_at_once() -> Result<()> {
    its_page_leads_to_a_provider_that_passes("python")
}

#[test]
fn a_new_provider_in_javascript_passes_at_once() -> Result<()> {
    its_page_leads_to_a_provider_that_passes("javascript")
}

#[test]
fn a_new_provider_in_rust_passes_at_once() -> Result<()> {
    builds_and_passes("sees-bytes", &[], None)?;
    builds_and_passes("blind-one", &["--blind"], None)
}

#[test]
fn the_provider_that_the_documents_show_passes() -> Result<()> {
    let page = "../runtime/docs/writing-providers.md";
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    let page = std::fs::read_to_string(page)?;
    let code = page.split("```rust\n").nth(1).context("no provider")?;
    let code = code.split("```").next();
    builds_and_passes("mirror", &["--blind"], code)
}
