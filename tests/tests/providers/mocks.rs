//! The mocks of the SDKs, against which providers are tested natively: each refuses what the host refuses, and the
//! example providers pass their own tests against them. What holds the Rust one is in `asks-everything` itself.

use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, Site, StorageDaemon};

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The component makes the calls and looks at each answer.
#[test]
fn the_host_answers_as_written_in_the_calls_that_mocks_are_held_to() -> Result<()> {
    let site = Site::new()?;
    let size = 524_800;
    let content = site.path("content.raw");
    let file = std::fs::File::create(&content)?;
    file.write_all_at(&[1; 327_680], 0)?;
    file.write_all_at(&[1; 66_048], 458_752)?;
    let disks = [Disk::raw("da", size).holding(&content)];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    let order = site.order(&daemon, "asks-everything")?;
    let full = site.backup(&order)?;
    let mut access = daemon.writer_access("da")?;
    access.write(65_536, &[2])?;
    access.write(200_000, &[2])?;
    access.flush()?;
    let incremental = site.backup(&order)?;
    incremental.assert_base("da", Some(&full));
    ensure!(incremental.dirty_bytes("da") == 2 * 65_536);
    Ok(())
}

fn passes(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = [output.stdout, output.stderr].concat();
    ensure!(
        output.status.success(),
        "{command:?}:\n{}",
        String::from_utf8_lossy(&said)
    );
    Ok(())
}

fn python_tests(folder: &Path) -> Result<()> {
    let mut python = Command::new("python3");
    python.args(["-m", "unittest"]).current_dir(folder);
    python.env(
        "PYTHONPATH",
        checkout().join("guest-sdk/python").canonicalize()?,
    );
    passes(python.env("PYTHONDONTWRITEBYTECODE", "1"))
}

#[test]
fn the_mock_for_python_answers_as_the_host_does() -> Result<()> {
    python_tests(&checkout().join("guest-sdk/python/tests"))
}

#[test]
fn numbered_passes_its_own_tests() -> Result<()> {
    python_tests(&checkout().join("providers/numbered"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    passes(Command::new("cp").arg("-r").arg(from.join(".")).arg(to))
}

/// In copies, beside which the packages that the SDK needs can lie: those that `make languages` has fetched.
#[test]
fn the_mock_for_javascript_answers_as_the_host_does_and_watchful_passes_its_own_tests() -> Result<()>
{
    let site = Site::new()?;
    let sdk = checkout().join("guest-sdk");
    let javascript = site.path("javascript");
    for part in ["src", "test"] {
        copy(&sdk.join("javascript").join(part), &javascript.join(part))?;
    }
    for (file, copied) in [
        ("javascript/build.js", "javascript/build.js"),
        ("javascript/package.json", "javascript/package.json"),
        ("calls.txt", "calls.txt"),
    ] {
        std::fs::copy(sdk.join(file), site.path(copied))?;
    }
    symlink(packages()?, javascript.join("node_modules"))?;
    let watchful = site.path("watchful");
    copy(&checkout().join("providers/watchful"), &watchful)?;
    let modules = watchful.join("node_modules/@fleecebox");
    std::fs::create_dir_all(&modules)?;
    symlink(&javascript, modules.join("guest"))?;
    for folder in [&javascript, &watchful] {
        passes(Command::new("node").arg("--test").current_dir(folder))?;
    }
    Ok(())
}

/// What `make languages` keeps by the digest of the lock file.
fn packages() -> Result<PathBuf> {
    let cache = std::env::var_os("FLEECEBOX_CACHE").unwrap_or_else(|| ".cache".into());
    let kept = checkout().canonicalize()?.join(cache).join("languages");
    let lock = checkout().join("guest-sdk/javascript/package-lock.json");
    let output = Command::new("sha256sum").arg(lock).output()?;
    let digest = String::from_utf8(output.stdout)?;
    let digest = digest.get(..16).context("no digest")?;
    let packages = kept.join(format!("javascript-{digest}/node_modules"));
    ensure!(
        packages.is_dir(),
        "{packages:?} is missing; type make languages"
    );
    Ok(packages)
}

fn c_tests(folder: &Path) -> Result<()> {
    let site = Site::new()?;
    let mut make = Command::new("make");
    let out = format!("OUT={}", site.path("out").display());
    make.args(["-s", "test", &out]).current_dir(folder);
    // The variables of the make that may have called this are not for that one.
    passes(make.env_remove("MAKEFLAGS"))
}

#[test]
fn the_mock_for_c_answers_as_the_host_does() -> Result<()> {
    c_tests(&checkout().join("guest-sdk/c/test"))
}

#[test]
fn qcow2_passes_its_own_tests() -> Result<()> {
    c_tests(&checkout().join("providers/qcow2"))
}
