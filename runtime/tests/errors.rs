//! Errors say their cause once: in no text of an error is the cause that its `source()` returns, and no error becomes text
//! but with its causes. The rule stands with `with_causes`, in the contract crate (`src/causes.rs`).
//!
//! The sources are read: what derives `thiserror::Error`, and what is done with values that are called like errors.

use std::fs;
use std::path::{Path, PathBuf};

/// All that runs on the host.
const SOURCES: &[&str] = &[
    "src",
    "contract/src",
    "channel/src",
    "nbd/src",
    "qemu/src",
    "archive/src",
    "sandbox/src",
    "worker/src",
];

/// What values are called that are errors. Words of one, which are text already, are called otherwise.
const NAMES: &[&str] = &[
    "e", "err", "error", "source", "cause", "failure", "refusal", "finding",
];

/// Where such a value is told by itself nevertheless.
const BY_ITSELF: &[(&str, &str, &str)] = &[(
    "contract/src/causes.rs",
    "error.to_string()",
    "it is the function that goes through the causes",
)];

/// Where a text names what its `source()` cannot return.
const NO_SOURCE: &[(&str, &str, &str)] = &[(
    "worker/src/process.rs",
    "wasmtime could not be set up: {0:#}",
    "it is none of the standard library's errors, and says its causes itself",
)];

/// The sources in a folder with their paths from here, without tests and comments; lines stay where they are.
fn texts(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_stem().is_some_and(|stem| stem == "tests") {
            continue;
        }
        if path.is_dir() {
            found.extend(texts(&path));
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let short = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
            found.push((short.to_owned(), code(&text)));
        }
    }
    found
}

fn all_texts() -> Vec<(PathBuf, String)> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let all: Vec<_> = SOURCES
        .iter()
        .flat_map(|it| texts(&here.join(it)))
        .collect();
    assert!(all.len() > 100, "the sources were not found");
    all
}

/// Without tests, which come last in a file, and with empty lines for comments.
fn code(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests {").next();
    let lines = code.unwrap_or_default().lines();
    let lines = lines.map(|line| match line.trim_start().starts_with("//") {
        true => "",
        false => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

fn is_of_a_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `text` has `word` as a word of its own.
fn has_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(is_of_a_word) && !after.is_some_and(is_of_a_word)
    })
}

/// What stands from an opening bracket to the one that closes it, and how long it is with both. Brackets in strings count
/// as little as they mean.
fn bracketed(text: &str) -> Option<(&str, usize)> {
    let mut depth = 0_usize;
    let mut quoted = false;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '(' | '[' | '{' if !quoted => depth += 1,
            ')' | ']' | '}' if !quoted => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some((&text[1..at], at + 1));
                }
            }
            _ => {}
        }
    }
    None
}

/// The parts of a list that commas separate, but for commas in brackets.
fn listed(list: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut from, mut depth) = (0, 0_i32);
    for (at, c) in list.char_indices() {
        match c {
            '(' | '[' | '{' | '<' => depth += 1,
            ')' | ']' | '}' | '>' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&list[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[from..]);
    parts
}

/// What a format string and its arguments name.
fn names(shown: &str, field: &str) -> bool {
    let quote = shown.find('"').unwrap_or(0);
    let end = shown.rfind('"').unwrap_or(shown.len());
    let (format, arguments) = (&shown[quote..end], &shown[end..]);
    let placeholder = format.split('{').skip(1).any(|it| {
        let name = it.split(['}', ':']).next();
        name == Some(field)
    });
    let argument = match field.parse::<usize>() {
        Ok(_) => arguments.contains(&format!(".{field}")),
        Err(_) => has_word(arguments, field),
    };
    placeholder || argument
}

/// A field of a variant or a structure, by its name or its number.
struct Field {
    name: String,
    /// As it is marked or called, or as its type is.
    is_cause: bool,
}

impl Field {
    fn read(number: usize, text: &str, by_name: bool) -> Self {
        let marked = text.contains("#[from]") || text.contains("#[source]");
        let declared = text.rsplit("]\n").next().unwrap_or_default();
        let declared = declared.trim_start_matches("#[from]");
        let declared = declared.trim_start_matches("#[source]");
        let (name, kind) = match declared.split_once(':') {
            Some((name, kind)) if by_name => (name, kind),
            _ => ("", declared),
        };
        let name = name.trim().rsplit(' ').next().unwrap_or_default();
        let mut words = kind.split(|c| !is_of_a_word(c));
        Self {
            is_cause: marked || name == "source" || words.any(|word| word.ends_with("Error")),
            name: match by_name {
                true => name.to_owned(),
                false => number.to_string(),
            },
        }
    }
}

/// The fields of the variant or structure that begins in `rest`.
fn fields(rest: &str) -> Vec<Field> {
    let mut rest = rest.trim_start();
    // Other attributes of it.
    while let Some(attribute) = rest.strip_prefix('#') {
        let Some((_, length)) = bracketed(attribute) else {
            return Vec::new();
        };
        rest = attribute[length..].trim_start();
    }
    for visible in ["pub(crate)", "pub(super)"] {
        rest = rest.trim_start_matches(visible);
    }
    let Some(at) = rest.find(['(', '{', ',', ';', '}']) else {
        return Vec::new();
    };
    let by_name = rest[at..].starts_with('{');
    if !by_name && !rest[at..].starts_with('(') {
        return Vec::new();
    }
    let list = bracketed(&rest[at..]).map_or("", |(list, _)| list);
    let fields = listed(list).into_iter().enumerate();
    fields
        .map(|(number, text)| Field::read(number, text, by_name))
        .collect()
}

/// The lines of a source in which an error's text names its cause.
fn causes_named(text: &str) -> Vec<usize> {
    let mut found = Vec::new();
    for (at, attribute) in text.match_indices("#[error") {
        let start = at + attribute.len();
        let Some((shown, length)) = bracketed(&text[start..]) else {
            continue;
        };
        if shown.trim() == "transparent" {
            continue;
        }
        let rest = text[start + length..].trim_start_matches(']');
        let named = |field: &Field| field.is_cause && names(shown, &field.name);
        if fields(rest).iter().any(named) {
            found.push(line_of(text, at));
        }
    }
    found
}

/// The lines of a source in which an error becomes text without its causes, and how.
fn told_by_themselves(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for name in NAMES {
        let ways = [
            format!("{{{name}}}"),
            format!("{name}.to_string()"),
            format!("%{name},"),
            format!("%{name})"),
        ];
        for way in ways {
            for (at, _) in text.match_indices(&way) {
                let before = text[..at].chars().next_back();
                if !before.is_some_and(|c| is_of_a_word(c) || c == '.' || c == '{') {
                    found.push((line_of(text, at), way.clone()));
                }
            }
        }
    }
    found
}

#[test]
fn no_errors_text_names_the_cause_that_its_source_is() {
    let mut found = Vec::new();
    for (path, mut text) in all_texts() {
        let here = NO_SOURCE
            .iter()
            .filter(|(file, ..)| path == Path::new(file));
        for (_, words, _) in here {
            assert!(text.contains(words), "{words} is not there any more");
            text = text.replace(words, "");
        }
        let lines = causes_named(&text).into_iter();
        found.extend(lines.map(|line| format!("{}:{line}", path.display())));
    }
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn no_error_is_told_without_its_causes() {
    let mut found = Vec::new();
    for (path, text) in all_texts() {
        let may = |way: &String| {
            let mut all = BY_ITSELF.iter();
            all.any(|(file, allowed, _)| path == Path::new(file) && way == allowed)
        };
        let told = told_by_themselves(&text).into_iter();
        let told = told.filter(|(_, way)| !may(way));
        found.extend(told.map(|(line, way)| format!("{}:{line}: {way}", path.display())));
    }
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn planted_causes_are_found() {
    let planted = r#"
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// {source} is told of here.
    #[error("reading failed: {0}")]
    Read(#[from] io::Error),
    #[error("{path}: {source}", path = path.display())]
    #[non_exhaustive]
    At {
        /// Where.
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "it went wrong ({}), and \"{{0}}\" is no field",
        why(.reason)
    )]
    Why {
        #[source]
        reason: Other,
    },
    #[error("{0} cannot be had")]
    Had(String, #[source] Map<String, Other>),
    #[error(transparent)]
    Plain(#[from] Plain),
    #[error("it has {actual} bytes")]
    Length { actual: u64 },
    #[error("it is lost: {0}")]
    Lost(Arc<io::Error>),
    #[error("it is damaged")]
    Damaged(#[source] Damage),
}

#[derive(Debug, thiserror::Error)]
#[error("volume {name}: {source:#}")]
pub(crate) struct Volume {
    pub name: String,
    pub source: Other,
}

#[error("the cache failed: {}", .0)]
pub struct Cache(#[from] io::Error);
"#;
    assert_eq!(causes_named(&code(planted)), [5, 7, 14, 28, 35, 41]);
    let planted = "warn!(\"{error}\");\nwarn!(%e, \"x\");\nwarn!(\"{error:#}\");\nlet a = error.to_string();\nlet b = an_error.to_string();";
    let found: Vec<_> = told_by_themselves(planted).into_iter().collect();
    let mut lines: Vec<_> = found.iter().map(|(line, _)| *line).collect();
    lines.sort_unstable();
    assert_eq!(lines, [1, 2, 4]);
}
