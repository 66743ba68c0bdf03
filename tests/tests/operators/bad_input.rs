//! What the user can mend: one line that names the thing, exit status 2 (10 where the archive is it), and nothing was
//! touched.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, Fleecebox, MIB, Order, QemuState, Site, StorageDaemon, component};
use serde_json::{Value, json};

/// The exit status for what the user can mend.
const MISTAKE: i32 = 2;
/// The exit status for a result from which something is missing.
const INCOMPLETE: i32 = 3;
/// The exit status for an archive that is none, or cannot be used.
const UNUSABLE: i32 = 10;
/// The exit status where another is at work.
const BUSY: i32 = 11;

/// One small disk, and an order for it in which everything is right.
struct Scene {
    site: Site,
    daemon: StorageDaemon,
    order: Order,
}

impl Scene {
    fn new() -> Result<Self> {
        let site = Site::new()?;
        let daemon = StorageDaemon::start(&[Disk::raw("da", MIB)])?;
        let order = site.order(&daemon, "chunked")?;
        Ok(Self {
            site,
            daemon,
            order,
        })
    }

    /// Sees a backup refused with `name` in its one line, and all as it was.
    fn refuses(&self, order: &Order, name: &str) -> Result<()> {
        self.refuses_command(self.site.backup_command(order), name)
    }

    fn refuses_command(&self, command: Fleecebox, name: &str) -> Result<()> {
        self.refuses_with(MISTAKE, command, name)
    }

    fn refuses_with(&self, status: i32, command: Fleecebox, name: &str) -> Result<()> {
        let before = QemuState::read(self.daemon.monitors())?;
        // What it says of its disks before it fails is no error.
        let outcome = command.arg("--quiet").run()?.assert_refused(status, name);
        let document = outcome.document()?;
        let error = document["error"].as_str().context("no error in JSON")?;
        ensure!(error.contains(name), "{document}");
        ensure!(document["exit_status"] == status, "{document}");
        QemuState::read(self.daemon.monitors())?.assert_restored(&before, |_| false);
        self.site.check_no_fleecing_images()
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Result<String> {
        let path = self.site.path(name);
        fs::write(&path, bytes)?;
        Ok(path.to_str().context("a path in UTF-8")?.into())
    }
}

#[test]
fn a_vm_that_is_not_configured() -> Result<()> {
    let scene = Scene::new()?;
    scene.site.configure("[vm.mail]\nqmp = '/run/mail.qmp'\n")?;
    let command = scene.site.command(&["backup", "wbe", "--json"]);
    scene.refuses_command(command, "no VM named 'wbe' (there is mail)")
}

#[test]
fn a_name_that_cannot_be_a_vms() -> Result<()> {
    let scene = Scene::new()?;
    for name in ["../web", "", ".web", "a b", &"x".repeat(65)] {
        let order = Order {
            vm: name.into(),
            ..scene.order.clone()
        };
        scene.refuses(&order, &format!("'{name}' cannot name a VM"))?;
    }
    Ok(())
}

#[test]
fn a_disk_that_is_not_there() -> Result<()> {
    let scene = Scene::new()?;
    scene.refuses(&scene.order.clone().only(&["da", "dx"]), "dx")
}

#[test]
fn a_provider_that_is_no_component() -> Result<()> {
    let scene = Scene::new()?;
    let whole = fs::read(component("chunked")?)?;
    let files: [(&str, &[u8]); 4] = [
        ("garbage.wasm", b"this is no component at all"),
        ("empty.wasm", b""),
        // `\0asm` and version 1: a core module.
        ("core.wasm", b"\0asm\x01\0\0\0"),
        ("truncated.wasm", &whole[..whole.len() / 2]),
    ];
    for (name, bytes) in files {
        let order = Order {
            provider: scene.file(name, bytes)?,
            ..scene.order.clone()
        };
        scene.refuses(&order, name.trim_end_matches(".wasm"))?;
        let inspect = scene.site.command(&["provider", "inspect", "--json"]);
        let inspect = inspect.arg(&order.provider).run()?;
        inspect.assert_refused(2, name);
    }
    Ok(())
}

#[test]
fn a_provider_that_is_not_there() -> Result<()> {
    let scene = Scene::new()?;
    let order = Order {
        provider: "./missing.wasm".into(),
        ..scene.order.clone()
    };
    scene.refuses(&order, "./missing.wasm")?;
    let unknown = Order {
        provider: "chnuked".into(),
        ..scene.order.clone()
    };
    scene.refuses(&unknown, "no provider named 'chnuked'")
}

#[test]
fn a_component_of_another_world() -> Result<()> {
    let scene = Scene::new()?;
    let order = scene.site.order(&scene.daemon, "wrong-world")?;
    scene.refuses(&order, "it is no provider: it exports neither")
}

#[test]
fn a_component_that_imports_what_is_not_granted() -> Result<()> {
    let scene = Scene::new()?;
    let order = scene.site.order(&scene.daemon, "imports-a-socket")?;
    let name = "it imports `wasi:sockets/";
    scene.refuses(&order, name)?;
    let inspect = scene.site.command(&["provider", "inspect", "--json"]);
    let outcome = inspect.arg(&order.provider).run()?;
    ensure!(outcome.code() == Some(2), "{}", outcome.stderr);
    ensure!(outcome.stderr.contains(name), "{}", outcome.stderr);
    Ok(())
}

#[test]
fn a_monitor_that_is_not_there() -> Result<()> {
    let scene = Scene::new()?;
    let order = Order {
        qmp: "/nonexistent/web.qmp".into(),
        ..scene.order.clone()
    };
    scene.refuses(&order, "/nonexistent/web.qmp")?;
    let file = Order {
        qmp: scene.file("no-socket", b"")?.into(),
        ..scene.order.clone()
    };
    scene.refuses(&file, "no-socket")
}

#[test]
fn a_socket_that_is_no_monitor() -> Result<()> {
    let scene = Scene::new()?;
    let qmp = scene.site.path("hello.sock");
    let listener = UnixListener::bind(&qmp)?;
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(mut client) = client else { return };
            // A client that goes away is what we expect.
            let _ = client.write_all(b"hello\r\n");
            let _ = client.read(&mut [0]);
        }
    });
    let order = Order {
        qmp,
        ..scene.order.clone()
    };
    scene.refuses(&order, "hello.sock")
}

#[test]
fn an_archive_that_is_not_there_or_is_none() -> Result<()> {
    let scene = Scene::new()?;
    let refuses = |archive: PathBuf, name: &str| {
        let order = Order {
            archive: archive.clone(),
            ..scene.order.clone()
        };
        scene.refuses_with(UNUSABLE, scene.site.backup_command(&order), name)?;
        let list = scene.site.command(&["list", "--json"]).arg("--archive");
        scene.refuses_with(UNUSABLE, list.arg(&archive), name)
    };
    let missing = scene.site.path("missing-archive");
    refuses(missing.clone(), "missing-archive")?;
    ensure!(!missing.exists(), "it was made");
    refuses(scene.file("a-file", b"")?.into(), "a-file")?;
    let full = scene.site.path("full-of-else");
    fs::create_dir(&full)?;
    fs::write(full.join("letter.txt"), "dear reader")?;
    refuses(full.clone(), "full-of-else")?;
    assert_eq!(fs::read_dir(&full)?.count(), 1);
    Ok(())
}

#[test]
fn an_archive_that_cannot_be_written() -> Result<()> {
    let scene = Scene::new()?;
    let read_only = |is: bool| {
        let mode = if is { 0o555 } else { 0o755 };
        fs::set_permissions(scene.site.archive(), PermissionsExt::from_mode(mode))
    };
    read_only(true)?;
    let command = scene.site.backup_command(&scene.order);
    scene.refuses_with(UNUSABLE, command.bound_by_permissions(), "archive")?;
    // The same once it is an archive.
    read_only(false)?;
    scene.site.backup(&scene.order)?;
    let other = scene.site.order(&scene.daemon, "image")?;
    let namespaces = scene.site.archive().join("namespaces");
    fs::set_permissions(&namespaces, PermissionsExt::from_mode(0o555))?;
    let command = scene.site.backup_command(&other);
    scene.refuses_with(UNUSABLE, command.bound_by_permissions(), "archive")
}

#[test]
fn a_fleecing_folder_that_is_too_small() -> Result<()> {
    let scene = Scene::new()?;
    // Larger than any file system.
    let huge = json!({"driver": "null-co", "node-name": "huge", "size": 1u64 << 60});
    scene.daemon.control()?.execute("blockdev-add", huge)?;
    let order = scene.order.clone().only(&["huge"]);
    scene.refuses(&order, "is too small")?;
    let folder = scene.site.path("fleecing");
    let folder = folder.to_str().context("a path in UTF-8")?.to_string();
    scene.refuses(&order, &folder)
}

#[test]
fn a_fleecing_folder_that_is_a_file() -> Result<()> {
    let scene = Scene::new()?;
    let file = scene.file("fleecing-file", b"")?;
    let command = scene
        .site
        .command(&["backup", "web", "--json", "--disk", "da"]);
    let command = command.arg("--qmp").arg(&scene.order.qmp);
    let command = command.arg("--provider").arg(&scene.order.provider);
    let command = command.arg("--archive").arg(&scene.order.archive);
    scene.refuses_command(command.arg("--fleecing").arg(file), "fleecing-file")
}

#[test]
fn an_unknown_key_in_the_configuration() -> Result<()> {
    let scene = Scene::new()?;
    let toml = "[vm.web]\nqmp = '/run/web.qmp'\nfleeceing = '/srv'\n";
    scene.site.configure(toml)?;
    let command = || scene.site.command(&["backup", "web", "--json"]);
    scene.refuses_command(command(), "line 3")?;
    scene.refuses_command(command(), "`fleeceing`")?;
    scene.refuses_command(command(), "fleecebox.toml")
}

#[test]
fn a_backup_that_the_archive_does_not_hold() -> Result<()> {
    let scene = Scene::new()?;
    scene.site.backup(&scene.order)?;
    let to = scene.site.path("to");
    let unknown = "20200101T000000Z-0123456789abcdef";
    for command in ["restore", "verify", "show"] {
        for id in [unknown, "yesterday"] {
            let run = scene.site.command(&[command, id, "--json"]);
            let mut run = run.arg("--archive").arg(scene.site.archive());
            if command == "restore" {
                run = run.arg("--to").arg(&to);
            }
            scene.refuses_command(run, id)?;
        }
    }
    ensure!(!to.exists(), "something was restored");
    Ok(())
}

#[test]
fn a_place_that_cannot_take_what_is_restored() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.daemon.add_disk(&Disk::raw("db", MIB))?;
    let backup = scene
        .site
        .backup(&scene.site.order(&scene.daemon, "chunked")?)?;
    let restore = |to: &str, volume: Option<&str>| {
        let command = scene.site.command(&["restore", &backup.id, "--json"]);
        let command = command.arg("--archive").arg(scene.site.archive());
        let command = command.arg("--to").arg(to);
        match volume {
            Some(volume) => command.arg("--volume").arg(volume),
            None => command,
        }
    };
    let existing = scene.file("existing.raw", b"precious")?;
    scene.refuses_command(restore(&existing, Some("da")), "existing.raw exists")?;
    assert_eq!(fs::read(&existing)?, b"precious");
    scene.refuses_command(restore(&existing, Some("dx")), "'dx' (there is da, db)")?;
    let both = scene.site.path("both.raw");
    let both = both.to_str().context("a path in UTF-8")?;
    scene.refuses_command(restore(both, None), "holds 2 volumes")?;
    scene.refuses_command(
        restore("/nonexistent/da.raw", Some("da")),
        "/nonexistent/da.raw",
    )
}

#[test]
fn every_command_shows_an_example() -> Result<()> {
    let commands: [&[&str]; 10] = [
        &["backup"],
        &["restore"],
        &["verify"],
        &["list"],
        &["show"],
        &["provider", "inspect"],
        &["policy", "check"],
        &["policy", "explain"],
        &["audit"],
        &["demo"],
    ];
    let overview = Fleecebox::new(["--help"]).run()?.assert_success().stdout;
    for command in commands {
        ensure!(overview.contains(command[0]), "{overview}");
        let help = Fleecebox::new(command.iter().copied()).arg("--help");
        let help = help.run()?.assert_success().stdout;
        let example = format!("  fleecebox {}", command.join(" "));
        ensure!(help.contains("Example"), "no example:\n{help}");
        ensure!(help.contains(&example), "no {example:?}:\n{help}");
    }
    Ok(())
}

#[test]
fn a_damaged_archive_is_no_mistake_of_the_users() -> Result<()> {
    let scene = Scene::new()?;
    let backup = scene.site.backup(&scene.order)?;
    let manifest = fleecebox_tests::files_below(&scene.site.archive())?
        .into_iter()
        .find(|file| file.ends_with("manifest.json"))
        .context("no manifest")?;
    let manifest = scene.site.archive().join(manifest);
    let text = fs::read_to_string(&manifest)?.replace("\"web\"", "\"wob\"");
    fs::write(&manifest, text)?;
    let show = scene.site.command(&["show", &backup.id, "--json"]);
    let outcome = show.arg("--archive").arg(scene.site.archive()).run()?;
    let outcome = outcome.assert_refused(UNUSABLE, &backup.id);
    assert_eq!(outcome.document()?["exit_status"], Value::from(UNUSABLE));
    Ok(())
}

#[test]
fn a_monitor_that_another_client_holds_is_busy() -> Result<()> {
    let scene = Scene::new()?;
    let qmp = &scene.daemon.monitors().product;
    let held = UnixStream::connect(qmp)?;
    // QEMU has greeted it, and serves nobody else as long as it stays.
    (&held).read_exact(&mut [0])?;
    let mut waiting = Vec::new();
    // In the queue, and where the queue is full.
    for _ in 0..2 {
        let backup = scene.site.backup_command(&scene.order);
        let dry_run = scene.site.backup_command(&scene.order).arg("--dry-run");
        let recover = scene.site.command(&["recover", "web", "--json"]);
        let recover = recover.arg("--qmp").arg(qmp).arg("--archive");
        let recover = recover.arg(scene.site.archive());
        for command in [backup, dry_run, recover] {
            let outcome = command.arg("--quiet").run()?;
            let outcome = outcome.assert_refused(BUSY, "qmp.sock");
            assert_eq!(outcome.document()?["exit_status"], BUSY);
        }
        while let Some(client) = queue_up(qmp)? {
            waiting.push(client);
        }
    }
    Ok(())
}

/// A client in the queue of `socket`, if there is room for one.
fn queue_up(socket: &Path) -> Result<Option<OwnedFd>> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let client = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&client, &SocketAddrUnix::new(socket)?) {
        Ok(()) => Ok(Some(client)),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[test]
fn the_exit_statuses_are_one_table_in_the_help() -> Result<()> {
    let help = Fleecebox::new(["--help"]).run()?.assert_success().stdout;
    for status in [0, 1, 2, 3, 10, 11, 12, 130] {
        let row = help.lines().any(|line| {
            line.split_whitespace().next() == Some(&status.to_string()) && line.len() > 6
        });
        ensure!(row, "no {status}:\n{help}");
    }
    Ok(())
}

/// What an earlier version left when it was killed in its first backup into a namespace.
fn half_made(scene: &Scene, name: &str) -> Result<PathBuf> {
    let namespace = scene.site.archive().join("namespaces").join(name);
    for part in ["packs", "components", "backups"] {
        fs::create_dir_all(namespace.join(part))?;
    }
    Ok(namespace)
}

#[test]
fn a_half_made_namespace_is_named_and_hides_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let backup = scene.site.backup(&scene.order)?;
    // Before and behind the good one, by their names.
    half_made(&scene, "aaa")?;
    half_made(&scene, "image")?;
    let run = |words: &[&str]| {
        let command = scene.site.command(words).arg("--archive");
        command.arg(scene.site.archive()).run()
    };
    let list = run(&["list", "--json"])?;
    assert_eq!(list.code(), Some(INCOMPLETE), "{list:?}");
    assert_eq!(list.document()?[0]["backup"], *backup.id);
    for name in ["aaa", "image"] {
        let said = format!("the namespace {name} is half-made");
        ensure!(list.stderr.contains(&said), "{list:?}");
    }
    let to = scene.site.path("to");
    fs::create_dir(&to)?;
    let to = to.to_str().context("a path in UTF-8")?;
    for words in [
        &["show", &backup.id][..],
        &["verify", &backup.id],
        &["restore", &backup.id, "--to", to],
    ] {
        let outcome = run(words)?.assert_success();
        ensure!(
            outcome.stderr.contains("namespace aaa is half-made"),
            "{outcome:?}"
        );
    }
    let qmp = scene.daemon.monitors().product.display().to_string();
    let recover = run(&["recover", "web", "--qmp", &qmp, "--json"])?;
    assert_eq!(recover.code(), Some(INCOMPLETE), "{recover:?}");
    ensure!(
        recover.stderr.contains("namespace aaa is half-made"),
        "{recover:?}"
    );
    // The next backup into one finishes it.
    fs::remove_dir_all(scene.site.archive().join("namespaces/aaa"))?;
    let next = scene
        .site
        .backup(&scene.site.order(&scene.daemon, "image")?)?;
    assert_eq!(
        scene.site.list(&scene.site.archive())?,
        [backup.id, next.id]
    );
    Ok(())
}

#[test]
fn a_namespace_that_lost_its_key_is_not_given_another() -> Result<()> {
    let scene = Scene::new()?;
    let backup = scene.site.backup(&scene.order)?;
    let key = scene.site.archive().join("namespaces/chunked/key");
    let was = fs::read(&key)?;
    fs::remove_file(&key)?;
    let command = scene.site.backup_command(&scene.order);
    scene.refuses_with(UNUSABLE, command, "key")?;
    ensure!(!key.exists(), "another key was made");
    fs::write(&key, was)?;
    scene.site.verify(&scene.site.archive(), &backup.id)
}

#[test]
fn an_id_that_several_namespaces_hold_is_refused_until_one_is_named() -> Result<()> {
    let scene = Scene::new()?;
    let backup = scene.site.backup(&scene.order)?;
    let namespaces = scene.site.archive().join("namespaces");
    for copy in ["a-copy", "z-copy"] {
        let mut copying = std::process::Command::new("cp");
        copying.arg("-a").arg(namespaces.join("chunked"));
        ensure!(copying.arg(namespaces.join(copy)).status()?.success());
        let to = scene.site.path(copy);
        fs::create_dir(&to)?;
        let to = to.to_str().context("a path in UTF-8")?;
        for words in [
            &["show", &backup.id, "--json"][..],
            &["verify", &backup.id, "--json"],
            &["restore", &backup.id, "--json", "--to", to],
        ] {
            let command = |more: &[&str]| {
                let command = scene.site.command(&[words, more].concat()).arg("--archive");
                command.arg(scene.site.archive())
            };
            scene.refuses_command(command(&[]), "name one with --namespace")?;
            command(&["--namespace", "chunked"]).run()?.assert_success();
            let unknown = command(&["--namespace", "chnuked"]);
            scene.refuses_command(unknown, "no namespace 'chnuked' (there is")?;
        }
        fs::remove_dir_all(namespaces.join(copy))?;
    }
    Ok(())
}

#[test]
fn names_that_steer_a_terminal_are_shown_harmless() -> Result<()> {
    let scene = Scene::new()?;
    // A C1 control, which JSON leaves as it is, and a mark that turns the line around.
    let odd = scene.site.path("\u{9b}31m\u{202e}odd.raw");
    fs::write(&odd, vec![1; 1 << 20])?;
    let disk =
        json!({"driver": "raw", "node-name": "odd", "file": {"driver": "file", "filename": odd}});
    scene.daemon.control()?.execute("blockdev-add", disk)?;
    let backup = scene.site.backup(&scene.order.clone().only(&["odd"]))?;
    let run = |words: &[&str]| {
        let command = scene.site.command(words).arg("--archive");
        command.arg(scene.site.archive()).run()
    };
    let steers = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
    for words in [
        &["show", &backup.id][..],
        &["list"],
        &["list", "--json"],
        &["verify", &backup.id],
    ] {
        let outcome = run(words)?.assert_success();
        let said = outcome.stdout + &outcome.stderr;
        ensure!(!said.contains(steers), "{words:?}: {said:?}");
    }
    // And the document still says what it is.
    let shown = run(&["show", &backup.id])?.document()?.to_string();
    ensure!(shown.contains("\u{9b}31m\u{202e}odd.raw"), "{shown}");
    Ok(())
}
