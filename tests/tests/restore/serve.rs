//! `fleecebox serve`: tools that are not ours read a backup at any place, and get its bytes or an error.

use std::fs;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{
    Backup, Disk, Fleecebox, MIB, Order, Outcome, Proxy, Random, Running, Site, StorageDaemon,
    compare, eventually, files_below,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
const BLOCK: u64 = 64 << 10;
/// A short last block.
const SMALL: u64 = 16 * MIB + 512;
/// More than two segments of what one instance of a provider is asked for.
const LARGE: u64 = 150 * MIB;

/// A daemon with a raw and a qcow2 disk, and the commands for them.
struct Scene {
    site: Site,
    proxy: Proxy,
    daemon: StorageDaemon,
    random: Random,
}

/// A backup that is served.
struct Served {
    running: Running,
    told: Value,
}

impl Scene {
    fn new() -> Result<Self> {
        let disks = [Disk::raw("da", SMALL), Disk::qcow2("db", LARGE)];
        let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
        let mut scene = Self {
            site: Site::new()?,
            proxy: Proxy::start(daemon.monitors())?,
            daemon,
            random: Random::new(13),
        };
        scene.write("da", &[0..40, 100..101, 256..257])?;
        let large: Vec<_> = (0..15).map(|at| at * 160..at * 160 + 20).collect();
        scene.write("db", &large)?;
        Ok(scene)
    }

    /// Random bytes in these blocks of a disk.
    fn write(&mut self, node: &str, ranges: &[Range<u64>]) -> Result<()> {
        let size = if node == "da" { SMALL } else { LARGE };
        let mut access = self.daemon.writer_access(node)?;
        for block in ranges.iter().cloned().flatten() {
            let start = block * BLOCK;
            let mut bytes = vec![0; BLOCK.min(size - start) as usize];
            self.random.fill(&mut bytes);
            access.write(start, &bytes)?;
        }
        Ok(())
    }

    fn order(&self, provider: &str) -> Result<Order> {
        Ok(self
            .site
            .order(&self.daemon, provider)?
            .through(&self.proxy))
    }

    /// With QEMU's own copies of the disks, by their names.
    fn backup(&self, order: &Order) -> Result<(Backup, Vec<(String, PathBuf)>)> {
        let backup = self.site.backup(order)?;
        let references = self.proxy.references()?.into_iter();
        let references = references.map(|image| (image.device, image.path));
        Ok((backup, references.collect()))
    }

    fn command(&self, id: &str, arguments: &[&str]) -> Fleecebox {
        let command = self.site.command(&["serve", id, "--json"]);
        let command = command.arg("--archive").arg(self.site.archive());
        arguments
            .iter()
            .fold(command, |command, &argument| command.arg(argument))
    }

    fn serve(&self, id: &str, arguments: &[&str]) -> Result<Served> {
        let running = self.command(id, arguments).start()?;
        let told = running.wait_for_event(SOON, |event| event["volumes"].is_array())?;
        Ok(Served { running, told })
    }

    /// The folders that there are for sockets.
    fn folders(&self) -> Result<usize> {
        Ok(fs::read_dir(self.site.path("state/serve"))?.count())
    }
}

impl Served {
    fn uri(&self, volume: &str) -> Result<String> {
        let volumes = self.told["volumes"].as_array().context("no volumes")?;
        let found = volumes.iter().find(|it| it["name"] == volume);
        let uri = found.and_then(|it| it["uri"].as_str());
        Ok(uri.context("no such volume")?.into())
    }

    fn socket(&self) -> Result<PathBuf> {
        Ok(self.told["socket"].as_str().context("no socket")?.into())
    }

    fn end(self) -> Result<Outcome> {
        let pid = Pid::from_raw(self.running.process().pid).context("no process")?;
        kill_process(pid, Signal::TERM)?;
        self.running.finish()
    }
}

fn tool(program: &str, arguments: &[&str]) -> Result<Output> {
    let output = Command::new(program).args(arguments).output();
    output.with_context(|| format!("cannot run {program}"))
}

fn run(program: &str, arguments: &[&str]) -> Result<Vec<u8>> {
    let output = tool(program, arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {said}");
    Ok(output.stdout)
}

/// Commands of qemu-io on an image; all that it printed.
fn qemu_io(arguments: &[&str], image: &str, commands: &[String]) -> Result<String> {
    let mut all = arguments.to_vec();
    for command in commands {
        all.extend(["-c", command]);
    }
    all.push(image);
    let output = tool("qemu-io", &all)?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

/// What `nbdinfo` calls hole and zero, neighbours joined.
fn holes(uri: &str) -> Result<Vec<Range<u64>>> {
    let map = run("nbdinfo", &["--json", "--map", uri])?;
    let map: Vec<Value> = serde_json::from_slice(&map)?;
    let mut holes: Vec<Range<u64>> = Vec::new();
    for part in map.iter().filter(|part| part["type"] == 3) {
        let number = |field| part[field].as_u64().context("no number");
        let start = number("offset")?;
        let end = start + number("length")?;
        match holes.last_mut().filter(|last| last.end == start) {
            Some(last) => last.end = end,
            None => holes.push(start..end),
        }
    }
    Ok(holes)
}

#[test]
fn nbdinfo_lists_the_volumes_and_what_of_them_is_zero() -> Result<()> {
    let scene = Scene::new()?;
    let (backup, _) = scene.backup(&scene.order("chunked")?)?;
    let served = scene.serve(&backup.id, &[])?;
    let da = served.uri("da")?;
    let listed = run("nbdinfo", &["--list", "--json", "--no-content", &da])?;
    let listed: Value = serde_json::from_slice(&listed)?;
    let exports = listed["exports"].as_array().context("no exports")?;
    let names: Vec<_> = exports.iter().map(|it| it["export-name"].clone()).collect();
    assert_eq!(names, ["da", "db"]);
    let one = &exports[0];
    for (key, value) in [
        ("is_read_only", true),
        ("can_multi_conn", true),
        ("can_df", true),
        ("can_trim", false),
        ("can_flush", false),
    ] {
        assert_eq!(one[key], value, "{key}: {one}");
    }
    assert_eq!(one["export-size"], SMALL);
    assert_eq!(one["block_size_minimum"], 1);
    assert_eq!(one["block_size_preferred"], BLOCK);
    assert_eq!(one["block_size_maximum"], 4 * MIB);
    let expected = [40 * BLOCK..100 * BLOCK, 101 * BLOCK..256 * BLOCK];
    assert_eq!(holes(&da)?, expected);
    let gaps = (0..15).map(|at| (at * 160 + 20) * BLOCK..(at * 160 + 160) * BLOCK);
    assert_eq!(holes(&served.uri("db")?)?, gaps.collect::<Vec<_>>());
    served.end()?.assert_success();
    Ok(())
}

#[test]
fn tools_get_what_a_restore_gives_of_what_the_host_placed() -> Result<()> {
    tools_get_what_a_restore_gives("chunked")
}

#[test]
fn tools_get_what_a_restore_gives_of_what_a_provider_claimed() -> Result<()> {
    tools_get_what_a_restore_gives("image")
}

#[test]
fn tools_get_what_a_restore_gives_of_a_providers_own_format() -> Result<()> {
    tools_get_what_a_restore_gives("qcow2")
}

/// Of a full backup and of the incremental ones on top of it.
fn tools_get_what_a_restore_gives(provider: &str) -> Result<()> {
    let mut scene = Scene::new()?;
    let order = scene.order(provider)?;
    let mut backups = vec![scene.backup(&order)?];
    for round in 1..3 {
        let changed = round * 7..round * 7 + 3;
        scene.write("da", std::slice::from_ref(&changed))?;
        // Two segments, and what was zero.
        let changed = [round * 11..round * 11 + 9, 1100..1105 + round, 2000..2002];
        scene.write("db", &changed)?;
        backups.push(scene.backup(&order)?);
        let (before, after) = (&backups[round as usize - 1].0, &backups[round as usize].0);
        after.assert_base("db", Some(before));
    }
    for (number, (backup, references)) in backups.iter().enumerate() {
        let restored = scene.site.restore(&scene.site.archive(), &backup.id)?;
        let served = scene.serve(&backup.id, &[])?;
        for (name, reference) in references {
            let uri = served.uri(name)?;
            let copy = scene.site.path(&format!("{name}-{number}.raw"));
            run("nbdcopy", &[&uri, utf8(&copy)?])?;
            compare::same_bytes(&copy, reference)?;
            compare::same_bytes(&copy, &restored.join(format!("{name}.raw")))?;
            let image = scene.site.path(&format!("{name}-{number}.qcow2"));
            let convert = ["convert", "-O", "qcow2", &uri, utf8(&image)?];
            run("qemu-img", &convert)?;
            compare::same_disk(&image, reference)?;
            let compared = ["compare", "-f", "raw", "-F", "raw", &uri, utf8(reference)?];
            run("qemu-img", &compared)?;
            fs::remove_file(copy)?;
            fs::remove_file(image)?;
        }
        served.end()?.assert_success();
    }
    Ok(())
}

#[test]
fn a_vm_can_write_on_top_of_a_served_volume() -> Result<()> {
    let scene = Scene::new()?;
    let (backup, references) = scene.backup(&scene.order("image")?)?;
    let served = scene.serve(&backup.id, &["--volume", "db"])?;
    ensure!(served.uri("da").is_err(), "{}", served.told);
    let uri = served.uri("db")?;
    let overlay = scene.site.path("overlay.qcow2");
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        &uri,
        "-F",
        "raw",
        utf8(&overlay)?,
    ];
    run("qemu-img", &create)?;
    let (_, reference) = references.iter().find(|it| it.0 == "db").context("db")?;
    run("qemu-img", &["compare", utf8(&overlay)?, utf8(reference)?])?;
    let commands = [
        format!("write -P 0xab {} 4k", 3 * BLOCK + 512),
        format!("read -P 0xab {} 4k", 3 * BLOCK + 512),
        format!("read -P 0 {} 64k", 50 * BLOCK),
        "flush".into(),
    ];
    let said = qemu_io(&["-f", "qcow2"], utf8(&overlay)?, &commands)?;
    ensure!(!said.contains("failed") && !said.contains("rror"), "{said}");
    // The same on a copy of the reference, byte for byte.
    let written = scene.site.path("written.raw");
    fs::copy(reference, &written)?;
    qemu_io(&["-f", "raw"], utf8(&written)?, &commands[..1])?;
    run("qemu-img", &["compare", utf8(&overlay)?, utf8(&written)?])?;
    // Beneath it nothing was written, nor can be.
    let said = qemu_io(
        &["-r", "-f", "raw"],
        &uri,
        &[format!("read -P 0xab {BLOCK} 4k")],
    )?;
    ensure!(said.contains("Pattern verification failed"), "{said}");
    let said = qemu_io(&["-f", "raw"], &uri, &["write 0 4k".into()])?;
    ensure!(said.contains("Permission denied"), "{said}");
    served.end()?.assert_success();
    Ok(())
}

#[test]
fn several_clients_read_at_once() -> Result<()> {
    let scene = Scene::new()?;
    let (backup, references) = scene.backup(&scene.order("image")?)?;
    let served = scene.serve(&backup.id, &[])?;
    let clients: Vec<_> = (0..3)
        .flat_map(|number| references.iter().map(move |reference| (number, reference)))
        .map(|(number, (name, reference))| {
            let copy = scene.site.path(&format!("{name}-{number}.raw"));
            let mut client = Command::new("nbdcopy");
            client.arg("--connections=2");
            let client = client.arg(served.uri(name)?).arg(&copy).spawn()?;
            Ok((client, copy, reference))
        })
        .collect::<Result<_>>()?;
    for (mut client, copy, reference) in clients {
        ensure!(client.wait()?.success(), "nbdcopy failed");
        compare::same_bytes(&copy, reference)?;
    }
    served.end()?.assert_success();
    Ok(())
}

#[test]
fn a_flipped_byte_of_what_was_placed_is_an_error_there_and_nowhere_else() -> Result<()> {
    a_flipped_byte_is_an_error_there_and_nowhere_else("chunked", "packs")
}

#[test]
fn a_flipped_byte_of_what_a_provider_wrote_is_an_error_there_and_nowhere_else() -> Result<()> {
    a_flipped_byte_is_an_error_there_and_nowhere_else("image", "objects")
}

fn a_flipped_byte_is_an_error_there_and_nowhere_else(provider: &str, part: &str) -> Result<()> {
    let scene = Scene::new()?;
    let (backup, references) = scene.backup(&scene.order(provider)?.only(&["db"]))?;
    let (_, reference) = references.iter().find(|it| it.0 == "db").context("db")?;
    flip_a_byte(&scene.site.archive(), part)?;
    let served = scene.serve(&backup.id, &[])?;
    let uri = served.uri("db")?;
    // Block by block: what reads well must be right, and some does not.
    let copy = scene.site.path("salvaged.raw");
    let salvage = ["convert", "--salvage", "-O", "raw", &uri, utf8(&copy)?];
    let output = tool("qemu-img", &salvage)?;
    ensure!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("error while reading"), "{said}");
    let (copied, expected) = (fs::read(&copy)?, fs::read(reference)?);
    let blocks = copied
        .chunks(BLOCK as usize)
        .zip(expected.chunks(BLOCK as usize));
    let mut wrong = 0;
    for (number, (copied, expected)) in blocks.enumerate() {
        if copied != expected {
            wrong += 1;
            let zero = copied.chunks(512).zip(expected.chunks(512));
            let mut zero = zero.filter(|(copied, expected)| copied != expected);
            ensure!(
                zero.all(|(copied, _)| copied.iter().all(|byte| *byte == 0)),
                "block {number} has bytes that nobody wrote"
            );
        }
    }
    let written = 15 * 20;
    ensure!(
        wrong > 0 && wrong < written / 2,
        "{wrong} blocks cannot be read"
    );
    let failed = tool("nbdcopy", &[&uri, "null:"])?;
    ensure!(!failed.status.success(), "nbdcopy took a damaged image");
    let outcome = served.end()?;
    assert_eq!(outcome.code(), Some(10), "{}", outcome.stderr);
    let lines: Vec<_> = outcome
        .stderr
        .lines()
        .filter(|line| line.starts_with("warning: volume db: cannot be read: "))
        .collect();
    ensure!(!lines.is_empty(), "{}", outcome.stderr);
    let distinct: std::collections::BTreeSet<_> = lines.iter().collect();
    assert_eq!(distinct.len(), lines.len(), "told twice: {lines:#?}");
    Ok(())
}

/// In the middle of the largest such file.
fn flip_a_byte(archive: &Path, part: &str) -> Result<()> {
    let files = files_below(archive)?.into_iter();
    let files = files.filter(|file| file.iter().any(|name| name == part));
    let sized = files.map(|file| {
        let path = archive.join(file);
        Ok((fs::metadata(&path)?.len(), path))
    });
    let sized = sized.collect::<Result<Vec<_>>>()?;
    let (length, path) = sized.into_iter().max().context("no such file")?;
    let mut bytes = fs::read(&path)?;
    bytes[length as usize / 2] ^= 0x40;
    Ok(fs::write(path, bytes)?)
}

#[test]
fn garbage_and_silent_clients_disturb_nobody() -> Result<()> {
    let mut scene = Scene::new()?;
    let (backup, references) = scene.backup(&scene.order("image")?)?;
    let served = scene.serve(&backup.id, &[])?;
    let socket = served.socket()?;
    let mut silent = Vec::new();
    for _ in 0..6 {
        silent.push(UnixStream::connect(&socket)?);
    }
    for _ in 0..40 {
        let mut garbage = vec![0; 4096];
        scene.random.fill(&mut garbage);
        let mut stream = UnixStream::connect(&socket)?;
        // The server may have left already, or have no place for it.
        let _ = stream.write_all(&garbage);
    }
    // Asks for much, and takes nothing.
    let mut greedy = eventually("a place", SOON, || {
        let mut stream = UnixStream::connect(&socket)?;
        Ok(stream.read_exact(&mut [0; 18]).is_ok().then_some(stream))
    })?;
    greedy.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x02db")?;
    let mut read = b"\x25\x60\x95\x13\0\0\0\0cookie!!\0\0\0\0\0\0\0\0".to_vec();
    read.extend((4u32 << 20).to_be_bytes());
    greedy.set_write_timeout(Some(Duration::from_secs(1)))?;
    let _ = greedy.write_all(&read.repeat(10_000));
    for (name, reference) in &references {
        let copy = scene.site.path(&format!("{name}.raw"));
        run("nbdcopy", &[&served.uri(name)?, utf8(&copy)?])?;
        compare::same_bytes(&copy, reference)?;
    }
    let pid = served.running.process().pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let resident = resident.and_then(|it| it.trim().split(' ').next()?.parse::<u64>().ok());
    let resident = resident.context("no VmHWM")?;
    ensure!(resident < 200 << 10, "{resident} KiB at the most");
    // The silent ones are cut off in the end.
    for mut stream in silent {
        stream.set_read_timeout(Some(SOON))?;
        stream.read_to_end(&mut Vec::new())?;
    }
    served.end()?.assert_success();
    Ok(())
}

#[test]
fn its_socket_is_its_owners_alone_and_goes_with_it() -> Result<()> {
    let scene = Scene::new()?;
    let (backup, _) = scene.backup(&scene.order("chunked")?)?;
    let served = scene.serve(&backup.id, &[])?;
    let socket = served.socket()?;
    let folder = socket.parent().context("no folder")?.to_owned();
    ensure!(folder.starts_with(scene.site.path("state")), "{folder:?}");
    let mode =
        |path: &Path| Ok::<_, std::io::Error>(fs::metadata(path)?.permissions().mode() & 0o777);
    assert_eq!((mode(&folder)?, mode(&socket)?), (0o700, 0o600));
    // Another one beside it has a folder of its own, and a client that is connected does not keep the end up.
    let other = scene.serve(&backup.id, &[])?;
    assert_eq!(scene.folders()?, 2);
    let _client = UnixStream::connect(&socket)?;
    let outcome = served.end()?.assert_success();
    ensure!(outcome.stderr.contains("a signal ended"), "{outcome:?}");
    ensure!(!folder.exists(), "the folder is left");
    assert_eq!(scene.folders()?, 1);
    // One that is killed leaves it, and the next one removes it.
    other.running.kill_alone()?;
    assert_eq!(scene.folders()?, 1);
    let next = scene.serve(&backup.id, &[])?;
    assert_eq!(scene.folders()?, 1);
    run("nbdinfo", &["--size", &next.uri("da")?])?;
    next.end()?.assert_success();
    assert_eq!(scene.folders()?, 0);
    Ok(())
}

#[test]
fn a_socket_that_is_named_is_taken_from_nobody_who_lives() -> Result<()> {
    let scene = Scene::new()?;
    let (backup, _) = scene.backup(&scene.order("chunked")?)?;
    let socket = scene.site.path("served.sock");
    let named = ["--socket", utf8(&socket)?];
    let served = scene.serve(&backup.id, &named)?;
    assert_eq!(fs::metadata(&socket)?.permissions().mode() & 0o777, 0o600);
    let refused = scene.command(&backup.id, &named).run()?;
    refused.assert_refused(2, "is there already");
    run("nbdinfo", &["--size", &served.uri("da")?])?;
    served.running.kill_alone()?;
    ensure!(socket.exists(), "a killed process cannot remove it");
    let again = scene.serve(&backup.id, &named)?;
    run("nbdinfo", &["--size", &again.uri("da")?])?;
    again.end()?.assert_success();
    ensure!(!socket.exists(), "the socket is left");
    fs::write(&socket, "mine")?;
    let refused = scene.command(&backup.id, &named).run()?;
    refused.assert_refused(2, "is there already");
    assert_eq!(fs::read(&socket)?, b"mine");
    let unknown = scene.command(&backup.id, &["--volume", "dc"]).run()?;
    unknown.assert_refused(2, "holds no volume 'dc' (there is da, db)");
    Ok(())
}

#[test]
fn it_ends_by_itself_in_time() -> Result<()> {
    let scene = Scene::new()?;
    let (backup, _) = scene.backup(&scene.order("chunked")?)?;
    let idle = scene.serve(&backup.id, &["--idle-seconds", "1"])?;
    let outcome = idle.running.finish()?.assert_success();
    ensure!(
        outcome.stderr.contains("nobody is connected"),
        "{outcome:?}"
    );
    let wall = scene.serve(&backup.id, &["--wall-seconds", "2", "--idle-seconds", "60"])?;
    let _client = UnixStream::connect(wall.socket()?)?;
    let outcome = wall.running.finish()?.assert_success();
    ensure!(outcome.stderr.contains("--wall-seconds"), "{outcome:?}");
    assert_eq!(scene.folders()?, 0);
    Ok(())
}

#[test]
fn a_provider_that_fails_fails_what_it_claimed_and_nothing_else() -> Result<()> {
    let scene = Scene::new()?;
    let order = scene.order("image")?;
    let (backup, _) = scene.backup(&order)?;
    // What keeps the component is gone, and what is zero is not its.
    let archive = scene.site.archive();
    let files = files_below(&archive)?.into_iter();
    for file in files.filter(|file| file.iter().any(|name| name == "components")) {
        fs::remove_file(archive.join(file))?;
    }
    let served = scene.serve(&backup.id, &[])?;
    let uri = served.uri("db")?;
    let commands = [format!("read -P 0 {} 64k", 50 * BLOCK), "read 0 64k".into()];
    let said = qemu_io(&["-r", "-f", "raw"], &uri, &commands)?;
    ensure!(
        said.contains("read 65536/65536 bytes at offset 3276800"),
        "{said}"
    );
    ensure!(said.contains("Input/output error"), "{said}");
    let outcome = served.end()?;
    assert_eq!(outcome.code(), Some(10), "{}", outcome.stderr);
    ensure!(
        outcome
            .stderr
            .contains("cannot be asked for what it claimed"),
        "{outcome:?}"
    );
    Ok(())
}
