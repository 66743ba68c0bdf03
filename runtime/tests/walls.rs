//! The walls of the house, as far as the compiler does not hold them: which room may name which, and which rooms open
//! nothing by a path.
//!
//! Between crates an arrow that is not in a `Cargo.toml` does not compile, so that those are compared. Between the rooms of
//! the product the paths in its sources are read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A room, and what it may name of Fleecebox's. Each stands above all that it names, so that there is no circle.
type Table = &'static [(&'static str, &'static [&'static str])];

const CRATES: Table = &[
    ("contract", &[]),
    ("channel", &["contract"]),
    ("nbd", &["contract"]),
    ("qemu", &["contract"]),
    ("archive", &["contract"]),
    ("sandbox", &["channel", "contract"]),
    ("worker", &["channel", "contract"]),
];

/// Crates of others that belong to one room, and the reason.
const ALONE: &[(&str, &str, &str)] = &[
    (
        "wasmtime",
        "worker",
        "only a confined process runs code of others",
    ),
    (
        "wasmtime-wasi",
        "worker",
        "only a confined process runs code of others",
    ),
    ("landlock", "worker", "it is how that process is confined"),
    ("zstd", "archive", "the host encodes, and reads it back"),
];

/// Of the product; below, the crates stand in one line with its rooms.
const ROOMS: Table = &[
    ("event", &["channel"]),
    ("registry", &["contract"]),
    ("templates", &[]),
    ("access", &["archive", "digest", "extent"]),
    ("volume", &["buffer", "digest", "extent", "nbd"]),
    ("config", &["archive", "contract", "qemu"]),
    ("policy", &["archive", "config", "contract"]),
    ("recording", &["channel", "contract", "sandbox"]),
    ("simulator", &["extent", "nbd", "volume"]),
    (
        "grants",
        &[
            "archive", "channel", "config", "contract", "digest", "event", "extent", "nbd",
            "sandbox", "volume",
        ],
    ),
    (
        "job",
        &[
            "access", "archive", "channel", "config", "contract", "digest", "event", "extent",
            "grants", "nbd", "policy", "qemu", "sandbox", "volume",
        ],
    ),
    (
        "conformance",
        &[
            "archive",
            "channel",
            "config",
            "contract",
            "event",
            "extent",
            "grants",
            "job",
            "sandbox",
            "simulator",
        ],
    ),
    (
        "cli",
        &[
            "archive",
            "config",
            "conformance",
            "contract",
            "event",
            "grants",
            "job",
            "nbd",
            "policy",
            "qemu",
            "recording",
            "registry",
            "sandbox",
            "templates",
            "terminal",
        ],
    ),
];

/// Rooms that get what they work on as handles, and open nothing by a path.
const WITHOUT_PATHS: &[&str] = &[
    "../contract/src",
    "../channel/src",
    "../nbd/src",
    "../archive/src",
    "access",
    "event",
    "grants",
    "policy",
    "recording",
    "templates",
    "volume",
];

/// What of the job opens something by a path nevertheless. What a user names is opened by the command line, but for the
/// place of a restored volume: the walk there, which follows no other user's link, and what is then done in its folder
/// belong together.
const JOBS_OWN: &[(&str, &str)] = &[
    (
        "ending.rs",
        "the watchdog's folder, again in a process of its own",
    ),
    (
        "fleecing.rs",
        "the mounts of this process, and the program that ends one",
    ),
    (
        "power.rs",
        "the operator's commands, and a process's parent",
    ),
    ("in_use.rs", "what /proc and /sys tell of open files"),
    ("place.rs", "the walk to where a volume goes"),
    ("qemu_img.rs", "the program, which gets open files"),
    ("temporary.rs", "a file without a name, by /proc"),
];

/// How a path would be opened.
const OPENS: &[&str] = &[
    "fs::canonicalize(",
    "fs::copy(",
    "fs::create_dir",
    "fs::metadata(",
    "fs::open(",
    "fs::read(",
    "fs::read_dir(",
    "fs::read_link(",
    "fs::read_to_string(",
    "fs::remove_",
    "fs::rename(",
    "fs::write(",
    "File::create(",
    "File::open(",
    "File::options(",
    "Command::new(",
    "ambient_authority",
    "CWD,",
];

/// A room that names another.
type Arrow = (String, String);

fn source(room: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(room);
    match path.is_dir() {
        true => path,
        false => path.with_extension("rs"),
    }
}

/// The sources in a folder, or the one file, without their tests.
fn texts(path: &Path) -> Vec<(PathBuf, String)> {
    if path.is_file() {
        let text = fs::read_to_string(path).unwrap();
        return vec![(path.to_owned(), without_tests(&text))];
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        let is_test = path.file_stem().is_some_and(|stem| stem == "tests");
        if !is_test && (path.is_dir() || path.extension().is_some_and(|it| it == "rs")) {
            found.extend(texts(&path));
        }
    }
    found
}

/// Code alone: comments may point anywhere, and tests come last in a file.
fn without_tests(text: &str) -> String {
    let code = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default();
    let code = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    code.collect::<Vec<_>>().join("\n")
}

/// What follows `crate::` in a text, that is each room that it names.
fn named(text: &str) -> BTreeSet<String> {
    let rooms = text.match_indices("crate::").filter(|(at, _)| {
        let before = text[..*at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$')
    });
    let word = |at: usize| -> String {
        let rest = text[at..].chars();
        rest.take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    rooms.map(|(at, prefix)| word(at + prefix.len())).collect()
}

/// Whether a text has these words, not as the end of a longer one.
fn is_said(text: &str, words: &str) -> bool {
    text.match_indices(words).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}

fn arrows(table: Table) -> BTreeSet<Arrow> {
    let mut found = BTreeSet::new();
    for (room, _) in table {
        let texts = texts(&source(room));
        assert!(!texts.is_empty(), "there is nothing in {room}");
        for (path, text) in texts {
            assert!(
                !text.contains("use crate::{"),
                "{}: a list of rooms in one line cannot be read here; a line for each",
                path.display()
            );
            found.extend(named(&text).into_iter().map(|to| (room.to_string(), to)));
        }
    }
    found.retain(|(from, to)| from != to);
    found
}

/// Those that no line of the table allows.
fn forbidden(found: &BTreeSet<Arrow>, table: Table) -> Vec<Arrow> {
    let allowed = |(from, to): &Arrow| {
        let line = table.iter().find(|(room, _)| room == from);
        line.is_some_and(|(_, names)| names.contains(&to.as_str()))
    };
    found
        .iter()
        .filter(|arrow| !allowed(arrow))
        .cloned()
        .collect()
}

/// Lines of the table that nothing needs.
fn needless(found: &BTreeSet<Arrow>, table: Table) -> Vec<Arrow> {
    let all = table.iter().flat_map(|(from, names)| {
        let arrow = |to: &&str| (from.to_string(), to.to_string());
        names.iter().map(arrow).collect::<Vec<_>>()
    });
    all.filter(|arrow| !found.contains(arrow)).collect()
}

/// In the table's order no room names one that comes later.
fn upwards(table: Table) -> Vec<Arrow> {
    let rank: BTreeMap<_, _> = table
        .iter()
        .enumerate()
        .map(|(at, (room, _))| (*room, at))
        .collect();
    let mut found = Vec::new();
    for (at, (from, names)) in table.iter().enumerate() {
        for to in *names {
            if rank.get(to).is_some_and(|&other| other >= at) {
                found.push((from.to_string(), to.to_string()));
            }
        }
    }
    found
}

fn dependencies(of: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(of)
        .join("Cargo.toml");
    let manifest: toml::Table = toml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let table = manifest.get("dependencies").and_then(toml::Value::as_table);
    table
        .into_iter()
        .flat_map(|table| table.keys().cloned())
        .collect()
}

#[test]
fn no_crate_depends_on_more_than_it_may() {
    let mut found = BTreeSet::new();
    for (name, _) in CRATES {
        let ours = dependencies(name).into_iter();
        let ours = ours.filter_map(|it| it.strip_prefix("fleecebox-").map(str::to_owned));
        found.extend(ours.map(|to| (name.to_string(), to)));
    }
    assert_eq!(forbidden(&found, CRATES), []);
    assert_eq!(needless(&found, CRATES), []);
    assert_eq!(upwards(CRATES), []);
    for (dependency, room, reason) in ALONE {
        let all = CRATES.iter().map(|(name, _)| *name).chain(["."]);
        let have: Vec<_> = all
            .filter(|name| dependencies(name).contains(*dependency))
            .collect();
        assert_eq!(have, [*room], "{dependency} is for {room} alone: {reason}");
    }
}

#[test]
fn no_room_names_one_that_it_may_not() {
    let found = arrows(ROOMS);
    assert_eq!(forbidden(&found, ROOMS), []);
    assert_eq!(needless(&found, ROOMS), []);
    assert_eq!(upwards(ROOMS), []);
    // Every room is in the table.
    let rooms: BTreeSet<_> = ROOMS.iter().map(|(room, _)| room.to_string()).collect();
    let library = fs::read_to_string(source("lib")).unwrap();
    let declared = library
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    assert_eq!(declared.map(str::to_owned).collect::<BTreeSet<_>>(), rooms);
}

#[test]
fn a_planted_arrow_is_found() {
    let planted = "//! crate::cli is told of here.\nuse crate::nbd;\nfn f() {\n    crate::job::backup::backup();\n}\n\n#[cfg(test)]\nmod tests {\n    use crate::qemu;\n}\n";
    let found = named(&without_tests(planted));
    assert_eq!(found, BTreeSet::from(["job".into(), "nbd".into()]));
    let arrows = found
        .into_iter()
        .map(|to| ("volume".to_string(), to))
        .collect();
    assert_eq!(forbidden(&arrows, ROOMS), [("volume".into(), "job".into())]);
    assert_eq!(
        upwards(&[("low", &["high"]), ("high", &[])]),
        [("low".into(), "high".into())]
    );
}

#[test]
fn rooms_that_are_given_handles_open_nothing_by_a_path() {
    for room in WITHOUT_PATHS {
        for (path, text) in texts(&source(room)) {
            let opens = OPENS.iter().find(|opens| is_said(&text, opens));
            assert_eq!(opens, None, "{}", path.display());
        }
    }
}

#[test]
fn a_job_opens_by_a_path_only_what_is_listed() {
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let opening = texts(&source("job")).into_iter();
    let opening = opening.filter(|(_, text)| OPENS.iter().any(|opens| is_said(text, opens)));
    let opening: BTreeSet<_> = opening.map(|(path, _)| name(&path)).collect();
    let listed = JOBS_OWN.iter().map(|(file, _)| file.to_string());
    assert_eq!(opening, listed.collect());
}

/// What cargo would build, a line for each package with its features.
fn built(what: &[&str]) -> BTreeSet<String> {
    let mut tree = std::process::Command::new(env!("CARGO"));
    tree.args(["tree", "--offline", "--locked", "--prefix", "none"]);
    let told = tree.args(what).output().unwrap();
    assert!(told.status.success(), "{told:?}");
    let text = String::from_utf8(told.stdout).unwrap();
    let marks = [" (*)", " (proc-macro)"];
    let lines = text.lines().map(|line| {
        let cut = |line: String, mark: &&str| line.replace(*mark, "");
        marks.iter().fold(line.to_owned(), cut).trim().to_owned()
    });
    lines.filter(|line| !line.is_empty()).collect()
}

/// The longest part of a first build, by far: what the demonstration has built has to serve the tests.
#[test]
fn wasmtime_is_built_alike_for_the_programs_and_for_the_tests() {
    let all = |edges| built(&["--workspace", "-e", edges, "-f", "{p} {f}"]);
    let (programs, tests) = (all("normal,build"), all("normal,build,dev"));
    let below = built(&["-p", "wasmtime", "-e", "normal,build", "-f", "{p}"]);
    let is_below = |line: &&String| below.iter().any(|it| line.starts_with(&format!("{it} ")));
    let otherwise = programs.symmetric_difference(&tests).filter(is_below);
    assert_eq!(
        otherwise.collect::<Vec<_>>(),
        Vec::<&String>::new(),
        "these features are turned on by what only tests need: let tests/Cargo.toml turn them on always"
    );
    assert!(below.len() > 20, "{below:?}");
}
