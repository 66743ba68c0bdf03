//! The documents are so: each command line in them is run here, or by another test that is named, or stands in a short
//! list with the reason why not; each option, link, anchor and path in them exists; the front door is short.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use fleecebox_tests::{Emulator, Fleecebox, MIB, Random, Site, component};
use serde_json::json;

/// Longest README, in lines.
const FRONT_DOOR: usize = 150;

/// Command lines that another test runs: the line, the file of that test, and words of it that would go with it.
const RUN_ELSEWHERE: [(&str, &str, &str); 15] = [
    (
        "qemu-system-x86_64 … -qmp unix:/run/web.qmp,server=on,wait=off",
        "tests/src/libvirt.rs",
        "unix:{},server=on,wait=off",
    ),
    (
        "make demo",
        "tests/tests/house/demo.rs",
        r#""demo", "--components""#,
    ),
    (
        "cargo test",
        "tests/tests/providers/new_provider.rs",
        r#""test", "--release""#,
    ),
    (
        r#"cargo build --release --target wasm32-unknown-unknown --config "$(fleecebox-guest/wasm-std.sh)""#,
        "tests/tests/providers/new_provider.rs",
        "fleecebox-guest/wasm-std.sh",
    ),
    (
        "fleecebox provider new mirror --lang rust --blind",
        "tests/tests/providers/new_provider.rs",
        r#""--blind""#,
    ),
    (
        "fleecebox provider test target/wasm32-unknown-unknown/release/mirror.wasm",
        "tests/tests/providers/new_provider.rs",
        "passes_the_kit",
    ),
    (
        "fleecebox provider install registry.example/acme/mirror@sha256:DIGEST",
        "tests/tests/providers/registry.rs",
        r#""provider", "install""#,
    ),
    (
        "fleecebox export web --tracking nightly",
        "tests/tests/backups/export.rs",
        r#""--tracking", "nightly""#,
    ),
    (
        "nbdcopy 'nbd+unix:///fbx-…-x0?socket=…' scsi0.raw",
        "tests/tests/backups/export.rs",
        r#"run("nbdcopy""#,
    ),
    (
        "fleecebox export end web --success",
        "tests/tests/backups/export.rs",
        r#""export", "end", "web", "--success""#,
    ),
    (
        "fleecebox export end web --failure",
        "tests/tests/backups/export.rs",
        r#""export", "end", "web", "--failure""#,
    ),
    (
        "fleecebox export web --mechanism file-handle",
        "tests/tests/backups/export.rs",
        "file-handle",
    ),
    (
        "fleecebox serve BACKUP --archive /srv/backups",
        "tests/tests/restore/serve.rs",
        r#""serve", id"#,
    ),
    (
        "nbdcopy 'nbd+unix:///scsi0?socket=…' scsi0.raw",
        "tests/tests/restore/serve.rs",
        r#"run("nbdcopy", &[&uri"#,
    ),
    (
        "qemu-img create -f qcow2 -b 'nbd+unix:///scsi0?socket=…' -F raw overlay.qcow2",
        "tests/tests/restore/serve.rs",
        r#""-f", "qcow2", "-b""#,
    ),
];

/// Command lines that no test runs, and why not.
const NOT_RUN: [(&str, &str); 13] = [
    ("cd mirror", "changes a shell's folder and nothing else"),
    ("mkdir /srv/backups", "is outside of what a test may touch"),
    ("make test", "runs this test"),
    ("make lint", "compiles all of it another time"),
    ("make zoo WORDS=blind", "is a part of `make test`"),
    ("make soak SECONDS=3600", "takes an hour"),
    ("make demo-vm", "boots a guest, as guest_backup.rs does"),
    ("make bench", "takes minutes of a quiet machine"),
    ("make bench-languages", "takes minutes of a quiet machine"),
    ("make fuzz SECONDS=60", "needs a nightly compiler"),
    (
        "tests/setup/fresh.sh nothing make demo",
        "needs root, debootstrap and a network",
    ),
    (
        "cargo test --release --locked --workspace --test contract --test backups export::",
        "is a part of `make test`",
    ),
    (
        "systemd-run --scope -p Delegate=yes fleecebox backup web",
        "needs a systemd; `runtime/tests/sandbox` tries delegated groups",
    ),
];

/// Options of other programs that stand in backticks by themselves.
const FOREIGN_OPTIONS: [&str; 1] = ["--stub-wasi"];

/// What a line of a document begins with that is a command.
const PROGRAMS: [&str; 8] = [
    "fleecebox ",
    "make ",
    "cargo ",
    "qemu-",
    "nbdcopy ",
    "mkdir ",
    "systemd-run ",
    "virsh ",
];

struct Document {
    /// Below the checkout.
    path: PathBuf,
    text: String,
}

/// A line of a document, for errors.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    path: PathBuf,
    line: usize,
}

/// A part of a document between two lines of backticks.
struct Fence<'a> {
    language: &'a str,
    /// With their numbers.
    lines: Vec<(usize, &'a str)>,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

#[test]
fn the_front_door_is_short() -> Result<()> {
    let lines = fs::read_to_string(checkout().join("README.md"))?
        .lines()
        .count();
    ensure!(
        lines <= FRONT_DOOR,
        "README.md has {lines} lines; {FRONT_DOOR} are the most"
    );
    Ok(())
}

#[test]
fn each_command_line_is_run_or_it_is_known_why_not() -> Result<()> {
    let mut wrong = Vec::new();
    let mut met = BTreeSet::new();
    for document in documents()? {
        let mut scene = None;
        for (place, line) in document.commands()? {
            if known(&line) {
                met.insert(line);
                continue;
            }
            let made = match scene.take() {
                Some(scene) => scene,
                None => Scene::new(&document.path)?,
            };
            if let Err(error) = scene.insert(made).run(&line) {
                wrong.push(format!("{place}: {line}: {error:#}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    let listed = RUN_ELSEWHERE.iter().map(|(line, ..)| *line);
    let listed = listed.chain(NOT_RUN.iter().map(|(line, _)| *line));
    let gone: Vec<_> = listed.filter(|line| !met.contains(*line)).collect();
    ensure!(gone.is_empty(), "no document has these any more: {gone:#?}");
    Ok(())
}

fn known(line: &str) -> bool {
    RUN_ELSEWHERE.iter().any(|(listed, ..)| *listed == line)
        || NOT_RUN.iter().any(|(listed, _)| *listed == line)
}

#[test]
fn what_another_test_is_said_to_run_it_runs() -> Result<()> {
    for (line, file, words) in RUN_ELSEWHERE {
        let text = fs::read_to_string(checkout().join(file)).context(file)?;
        // Wherever rustfmt breaks its lines.
        let joined = text.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(
            joined.contains(words),
            "{file} does not run `{line}` any more: it has no {words}"
        );
    }
    Ok(())
}

#[test]
fn each_command_and_each_option_in_the_documents_exists() -> Result<()> {
    let program = Options::read()?;
    let mut wrong = Vec::new();
    for document in documents()? {
        for (place, line) in document.commands()? {
            let Some(at) = line.find("fleecebox ").filter(|at| {
                // A word of its own, in the place of a command.
                *at == 0 || line[..*at].ends_with(' ')
            }) else {
                continue;
            };
            // The real parser, which looks at all that stands before.
            let arguments = words(&line[at + "fleecebox ".len()..])?;
            let outcome = Fleecebox::new(arguments).arg("--help").run()?;
            if outcome.code() != Some(0) {
                wrong.push(format!("{place}: {line}: {}", outcome.stderr));
            }
        }
        for (place, span) in document.spans() {
            if let Some(line) = span.strip_prefix("fleecebox ") {
                if let Err(error) = program.check(line) {
                    wrong.push(format!("{place}: {error:#}"));
                }
            } else if span.starts_with("--") {
                let option = option_of(&span);
                if !program.has(option) && !FOREIGN_OPTIONS.contains(&option) {
                    wrong.push(format!("{place}: no command has {option}"));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn each_target_and_each_suite_that_is_named_exists() -> Result<()> {
    let makefile = fs::read_to_string(checkout().join("Makefile"))?;
    let target = |name: &str| {
        let begins = format!("{name}:");
        makefile.lines().any(|line| line.starts_with(&begins))
    };
    let suite = |name: &str| {
        ["tests/tests", "runtime/tests"].iter().any(|folder| {
            let folder = checkout().join(folder);
            folder.join(format!("{name}.rs")).exists() || folder.join(name).exists()
        })
    };
    let mut wrong = Vec::new();
    for document in documents()? {
        let spans = document.spans().into_iter();
        for (place, line) in document.commands()?.into_iter().chain(spans) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let ["make", name, ..] = words[..]
                // Projects in C have a Makefile of their own, whose one target has a name that is here too.
                && !target(name)
            {
                wrong.push(format!("{place}: the Makefile has no {name}"));
            }
            for pair in words.windows(2) {
                if let ["--test", name] = pair[..]
                    && !suite(name)
                {
                    wrong.push(format!("{place}: there is no suite {name}"));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn the_exit_statuses_of_the_documents_are_those_of_the_help() -> Result<()> {
    let help = Fleecebox::new(["--help"]).run()?.assert_success().stdout;
    let page = fs::read_to_string(checkout().join("runtime/docs/operating.md"))?;
    let table = help.split("Exit status:").nth(1).context("no table")?;
    let statuses = table
        .lines()
        .filter_map(|line| line.trim().split_once("  "));
    let mut count = 0;
    for (status, means) in statuses {
        let row = format!("| {status} | {means} |");
        ensure!(page.contains(&row), "operating.md lacks this row: {row}");
        count += 1;
    }
    let rows = page.split("| status | means |").nth(1).context("no rows")?;
    let rows = rows.trim().lines().take_while(|line| !line.is_empty());
    ensure!(
        count > 5 && count + 1 == rows.count(),
        "another number of rows"
    );
    Ok(())
}

#[test]
fn each_suite_is_told_to_who_contributes() -> Result<()> {
    let page = fs::read_to_string(checkout().join(".github/CONTRIBUTING.md"))?;
    for entry in fs::read_dir(checkout().join("tests/tests"))? {
        let entry = entry?;
        let path = format!("`tests/tests/{}`", entry.file_name().display());
        let row = page.lines().find(|line| line.contains(&path));
        let row = row.with_context(|| format!("CONTRIBUTING.md lacks {path}"))?;
        for part in parts(&entry.path())? {
            ensure!(row.contains(&format!("`{part}`")), "{path} has {part}");
        }
    }
    Ok(())
}

/// The modules of a suite that have tests.
fn parts(suite: &Path) -> Result<Vec<String>> {
    let mut parts = Vec::new();
    if suite.is_file() {
        return Ok(parts);
    }
    for entry in fs::read_dir(suite)? {
        let path = entry?.path();
        let file = match path.is_dir() {
            true => path.join("mod.rs"),
            false => path.clone(),
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if name != "main" && fs::read_to_string(file)?.contains("#[test]") {
            parts.push(name.into_owned());
        }
    }
    Ok(parts)
}

#[test]
fn each_link_and_each_anchor_leads_somewhere() -> Result<()> {
    let mut wrong = Vec::new();
    for document in documents()? {
        for (place, target) in document.links() {
            if target.contains("://") {
                continue;
            }
            let (path, anchor) = match target.split_once('#') {
                Some((path, anchor)) => (path, Some(anchor)),
                None => (&*target, None),
            };
            let folder = document.path.parent().unwrap_or(Path::new(""));
            let file = match path {
                "" => document.path.clone(),
                path => plain(&folder.join(path)),
            };
            let Ok(found) = checkout().join(&file).canonicalize() else {
                wrong.push(format!("{place}: {target}: there is no such file"));
                continue;
            };
            if let Some(anchor) = anchor {
                let text = fs::read_to_string(found)?;
                if !(Document { path: file, text }).anchors().contains(anchor) {
                    wrong.push(format!("{place}: {target}: there is no such heading"));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn each_path_in_backticks_is_there() -> Result<()> {
    let top: BTreeSet<String> = fs::read_dir(checkout())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    let is_ours = |path: &str| {
        let (first, rest) = path.split_once('/').unwrap_or((path, ""));
        first != "target" && !rest.is_empty() && top.contains(first)
    };
    let mut wrong = Vec::new();
    for document in documents()? {
        let mut named = document.spans();
        for fence in document.fences()? {
            if fence.language == "toml" {
                named.extend(document.toml_words(&fence));
            }
        }
        for (place, path) in named {
            if is_path(&path) && is_ours(&path) && !checkout().join(&path).exists() {
                wrong.push(format!("{place}: there is no {path}"));
            }
        }
    }
    for example in examples()? {
        for word in fs::read_to_string(&example)?.split_whitespace() {
            let path = word.trim_end_matches([';', ',', '.', ':']);
            if is_path(path) && is_ours(path) && !checkout().join(path).exists() {
                wrong.push(format!("{}: there is no {path}", example.display()));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn each_configuration_in_the_documents_is_sound() -> Result<()> {
    let site = Site::new()?;
    let mut texts = Vec::new();
    for document in documents()? {
        for fence in document.fences()? {
            if fence.language == "toml" {
                let lines: Vec<&str> = fence.lines.iter().map(|(_, line)| *line).collect();
                let line = fence.lines.first().map_or(0, |(line, _)| *line);
                texts.push((document.at(line).to_string(), lines.join("\n")));
            }
        }
    }
    for example in examples()? {
        let text = fs::read_to_string(&example)?;
        // What is only shown as possible has to be possible too.
        let all = text.lines().map(|line| match line.strip_prefix("# ") {
            Some(key) if key.contains(" = ") && !key.contains('…') => key,
            _ => line,
        });
        texts.push((
            format!("all of {}", example.display()),
            all.collect::<Vec<_>>().join("\n"),
        ));
        texts.push((example.display().to_string(), text));
    }
    ensure!(texts.len() > 4, "there are few configurations: {texts:?}");
    for (name, text) in texts {
        let file = site.path("shown.toml");
        fs::write(&file, text)?;
        let check = site.command(&["policy", "check"]).arg(&file);
        let outcome = check.run()?;
        ensure!(
            outcome.code() == Some(0) && outcome.stderr.contains("0 findings"),
            "{name}: {}{}",
            outcome.stdout,
            outcome.stderr
        );
    }
    Ok(())
}

/// A VM, an archive, providers and a configuration in the place of the reader's.
struct Scene {
    site: Site,
    vm: Emulator,
    folder: PathBuf,
}

impl Scene {
    fn new(document: &Path) -> Result<Self> {
        let site = Site::new()?;
        let vm = Emulator::running(|folder| {
            let image = folder.join("scsi0.raw");
            Random::new(3).fill_file(&image, 2)?;
            fs::File::options()
                .write(true)
                .open(&image)?
                .set_len(4 * MIB)?;
            let disk = json!({"driver": "raw", "node-name": "web", "file": {"driver": "file", "filename": image}});
            Ok(vec![
                "-device".into(),
                "virtio-scsi-pci".into(),
                "-blockdev".into(),
                disk.to_string(),
                "-device".into(),
                "scsi-hd,id=scsi0,drive=web".into(),
            ])
        })?;
        let folder = site.path("reader");
        fs::create_dir_all(folder.join("target"))?;
        let chunked = component("chunked")?;
        let components = chunked.parent().context("a folder")?;
        std::os::unix::fs::symlink(components, folder.join("target/components"))?;
        fs::copy(&chunked, folder.join("mirror.wasm"))?;
        if document.ends_with("policy.md") {
            let example = checkout().join("runtime/docs/examples/tenants.toml");
            site.configure(&fs::read_to_string(example)?)?;
        } else {
            site.configure(&format!(
                "[vm.web]\nqmp = {:?}\nfleecing = {:?}\nprovider = 'chunked'\narchive = 'main'\n\
                 [archive.main]\npath = {:?}\n[provider.chunked]\ncomponent = {chunked:?}\n",
                vm.monitors().product,
                site.path("fleecing"),
                site.archive(),
            ))?;
        }
        Ok(Self { site, vm, folder })
    }

    fn run(&mut self, line: &str) -> Result<()> {
        if let Some(folder) = line.strip_prefix("mkdir ") {
            return Ok(fs::create_dir(self.folder.join(folder))?);
        }
        let line = line
            .strip_prefix("fleecebox ")
            .context("nothing runs it, and no list says why")?;
        let digest = Command::new("sha256sum")
            .arg(self.folder.join("mirror.wasm"))
            .output()?;
        let digest = String::from_utf8(digest.stdout)?;
        let digest = digest.split(' ').next().context("no digest")?;
        let backups = match line.contains("BACKUP") {
            true => self.site.list(&self.site.archive())?,
            false => Vec::new(),
        };
        let site = |path: PathBuf| path.display().to_string();
        let mut arguments = Vec::new();
        for word in words(line)? {
            if word == "--libvirt" {
                // A domain's name is a VM's here: `tests/tests/libvirt` has domains.
                continue;
            }
            arguments.push(match &*word {
                "BACKUP" => backups.last().context("no backup")?.clone(),
                "/srv/backups" => site(self.site.archive()),
                "/run/web.qmp" => site(self.vm.monitors().product.clone()),
                "/usr/lib/fleecebox/chunked.wasm" => site(component("chunked")?),
                "/etc/fleecebox.toml" => site(self.site.path("fleecebox.toml")),
                word => word.replace("DIGEST", digest),
            });
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let command = self.site.command(&arguments).in_folder(&self.folder);
        let outcome = command.run()?;
        ensure!(
            outcome.code() == Some(0),
            "exit status {:?}: {}{}",
            outcome.code(),
            outcome.stdout,
            outcome.stderr
        );
        Ok(())
    }
}

/// The program's commands with their options, by its own help.
struct Options(BTreeMap<String, BTreeSet<String>>);

impl Options {
    fn read() -> Result<Self> {
        let mut all = Self(BTreeMap::new());
        all.add("")?;
        ensure!(all.0.len() > 20, "the help shows few commands");
        Ok(all)
    }

    fn add(&mut self, command: &str) -> Result<()> {
        let arguments = command.split_whitespace().chain(["--help"]);
        let help = Fleecebox::new(arguments).run()?.assert_success().stdout;
        let options = help
            .split(|c: char| c.is_whitespace() || ",[]<>".contains(c))
            .filter(|word| word.starts_with("--"))
            .map(|word| option_of(word).to_owned());
        self.0.insert(command.to_owned(), options.collect());
        let commands = help.split("Commands:\n").nth(1).unwrap_or_default();
        for line in commands.lines().take_while(|line| !line.is_empty()) {
            let name = line.split_whitespace().next().unwrap_or_default();
            // Deeper lines go on with the one before.
            if line.starts_with("  ") && !line.starts_with("   ") && name != "help" {
                self.add(format!("{command} {name}").trim())?;
            }
        }
        Ok(())
    }

    fn has(&self, option: &str) -> bool {
        self.0.values().any(|options| options.contains(option))
    }

    /// A line with placeholders, such as `provider new NAME [--blind]`.
    fn check(&self, line: &str) -> Result<()> {
        let line = line.replace(['[', ']', '|'], " ");
        let mut command = String::new();
        for word in line.split_whitespace() {
            let longer = format!("{command} {word}").trim().to_owned();
            if !self.0.contains_key(&longer) {
                break;
            }
            command = longer;
        }
        let options = self.0.get(&command).context("no such command")?;
        ensure!(
            !command.is_empty() || line.trim_start().starts_with("--"),
            "there is no command `fleecebox {line}`"
        );
        for word in line
            .split_whitespace()
            .filter(|word| word.starts_with("--"))
        {
            let option = option_of(word);
            ensure!(
                options.contains(option),
                "`fleecebox {command}` has no {option}"
            );
        }
        Ok(())
    }
}

/// `--lang` of `--lang=rust`, or of `--lang rust`.
fn option_of(word: &str) -> &str {
    let end = word.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
    &word[..end.unwrap_or(word.len())]
}

/// As a shell parts them, of which the documents use quotes alone.
fn words(line: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ' ') => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    ensure!(quote.is_none(), "a quote without an end: {line}");
    words.extend(word);
    Ok(words)
}

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Without `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

fn is_path(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    text.contains('/') && text.chars().all(fits)
}

fn documents() -> Result<Vec<Document>> {
    let mut paths = vec!["README.md".into(), "runtime/CHANGELOG.md".into()];
    for folder in ["runtime/docs", ".github"] {
        let files = fleecebox_tests::files_below(&checkout().join(folder))?;
        let pages = files
            .into_iter()
            .filter(|file| file.extension() == Some("md".as_ref()));
        paths.extend(pages.map(|file| Path::new(folder).join(file)));
    }
    ensure!(paths.len() > 10, "there are few documents: {paths:?}");
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(checkout().join(&path))?;
            Ok(Document { path, text })
        })
        .collect()
}

fn examples() -> Result<Vec<PathBuf>> {
    let folder = checkout().join("runtime/docs/examples");
    let files = fleecebox_tests::files_below(&folder)?;
    Ok(files.into_iter().map(|file| folder.join(file)).collect())
}

impl Document {
    fn at(&self, line: usize) -> Place {
        let path = self.path.clone();
        Place { path, line }
    }

    fn fences(&self) -> Result<Vec<Fence<'_>>> {
        let mut fences = Vec::new();
        let mut open: Option<Fence<'_>> = None;
        for (number, line) in (1..).zip(self.text.lines()) {
            match (line.trim_start().strip_prefix("```"), &mut open) {
                (Some(language), None) => {
                    let lines = Vec::new();
                    open = Some(Fence { language, lines });
                }
                (Some(_), Some(_)) => fences.extend(open.take()),
                (None, Some(fence)) => fence.lines.push((number, line)),
                (None, None) => {}
            }
        }
        ensure!(
            open.is_none(),
            "{}: a fence without an end",
            self.path.display()
        );
        Ok(fences)
    }

    /// Lines outside of fences.
    fn prose(&self) -> Vec<(usize, &str)> {
        let mut fenced = false;
        let lines = (1..).zip(self.text.lines());
        let prose = lines.filter(|(_, line)| {
            let mark = line.trim_start().starts_with("```");
            fenced ^= mark;
            !fenced && !mark
        });
        prose.collect()
    }

    /// All lines of the fences that hold commands, without what is said beside them.
    fn commands(&self) -> Result<Vec<(Place, String)>> {
        let mut commands = Vec::new();
        for fence in self.fences()? {
            let holds_commands = ["", "sh"].contains(&fence.language);
            for (number, line) in fence.lines {
                let place = self.at(number);
                let begins = line.trim_start();
                if holds_commands {
                    let command = line.split("  #").next().unwrap_or_default().trim();
                    if !command.is_empty() {
                        commands.push((place, command.to_owned()));
                    }
                } else if PROGRAMS.iter().any(|program| begins.starts_with(program)) {
                    bail!("{place}: a command in a fence of {}", fence.language);
                }
            }
        }
        Ok(commands)
    }

    /// What stands between single backticks, which may go on in the next line.
    fn spans(&self) -> Vec<(Place, String)> {
        let mut spans = Vec::new();
        let (mut open, mut begun) = (None::<String>, 0);
        for (number, line) in self.prose() {
            if line.trim().is_empty() {
                open = None;
            }
            for (index, part) in line.split('`').enumerate() {
                if index > 0 {
                    match open.take() {
                        Some(span) => spans.push((self.at(begun), span)),
                        None => (open, begun) = (Some(String::new()), number),
                    }
                }
                if let Some(span) = &mut open {
                    span.push_str(part);
                }
            }
            if let Some(span) = &mut open {
                span.push(' ');
            }
        }
        spans
    }

    /// Words of a configuration that may be paths.
    fn toml_words(&self, fence: &Fence<'_>) -> Vec<(Place, String)> {
        let mut found = Vec::new();
        for (number, line) in &fence.lines {
            for word in line.split(|c: char| c.is_whitespace() || "\"`,;".contains(c)) {
                found.push((self.at(*number), word.to_owned()));
            }
        }
        found
    }

    fn links(&self) -> Vec<(Place, String)> {
        let mut links = Vec::new();
        for (number, line) in self.prose() {
            let mut rest = line;
            while let Some((_, after)) = rest.split_once("](") {
                let Some((target, after)) = after.split_once(')') else {
                    break;
                };
                links.push((self.at(number), target.to_owned()));
                rest = after;
            }
        }
        links
    }

    /// As hosting sites make them of headings.
    fn anchors(&self) -> BTreeSet<String> {
        let headings = self.prose().into_iter().filter_map(|(_, line)| {
            let text = line.trim_start_matches('#');
            (text.len() < line.len()).then_some(text.strip_prefix(' ')?)
        });
        let anchor = |heading: &str| {
            let kept = heading.to_lowercase();
            let kept = kept.chars().filter_map(|c| match c {
                ' ' => Some('-'),
                c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
                _ => None,
            });
            kept.collect::<String>()
        };
        headings.map(anchor).collect()
    }
}
