//! Projects for authors of providers, as `fleecebox provider new` writes them.
//!
//! The files of each language lie in `guest-sdk/templates/LANGUAGE/` and in the SDK itself, and are part of this program.
//! One module for each language lists them. In a file that ends in `.in`, these words are replaced:
//!
//! | word | is replaced by |
//! |---|---|
//! | `{{name}}` | the project's name, such as `my-provider` |
//! | `{{crate}}` | the same with `_` for `-` |
//! | `{{Type}}` | the same in camel case, `MyProvider` |
//! | `{{backUp}}` | what the mock's disk does with it in JavaScript, `backUp` or `backUpBlindly` |
//! | `{{world}}` | the contract's world, `provider` or `blind-provider` |
//! | `{{version}}` | this program's version |

/// Files of `guest-sdk/LANGUAGE/`, where they go in a project: in `fleecebox-guest/`.
macro_rules! sdk {
    ($folder:literal: $($path:literal),* $(,)?) => {
        &[$((
            concat!("fleecebox-guest/", $path),
            include_bytes!(concat!("../../../guest-sdk/", $folder, $path)) as &[u8],
        )),*]
    };
}

/// One file of `guest-sdk/templates/`.
macro_rules! template {
    ($path:literal) => {
        include_str!(concat!("../../../guest-sdk/templates/", $path))
    };
}

mod c;
mod javascript;
mod python;
mod rust;

use std::str::FromStr;

/// A file as it is: its path in the project, and all of it.
type Whole = (&'static str, &'static [u8]);

/// What a provider can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Language {
    /// With the SDK as a crate
    Rust,
    /// With the SDK as a package; componentize-py builds it
    Python,
    /// With the SDK as a package, with types for TypeScript; componentize-js builds it
    Javascript,
    /// With the SDK as a header; clang builds it
    C,
}

/// Crates of these names would be taken for the compiler's own, or for the SDK.
const TAKEN: [&str; 5] = ["test", "core", "std", "alloc", "fleecebox-guest"];

/// What the templates use by these names; a provider's type would hide it.
const TAKEN_TYPES: [&str; 31] = [
    "Archive",
    "BigInt",
    "BlindProvider",
    "BlindVolume",
    "Bytes",
    "Context",
    "DataView",
    "Disk",
    "Encoding",
    "Err",
    "Error",
    "Extent",
    "Fault",
    "GaveUp",
    "Image",
    "None",
    "Number",
    "Objects",
    "Ok",
    "Option",
    "OutOfRange",
    "Provider",
    "ProviderError",
    "Result",
    "Self",
    "Stored",
    "StoredObject",
    "String",
    "Struct",
    "Vec",
    "Volume",
];

/// The name of a project: letters, digits, `-` and `_`, a letter first, at most 64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectName(String);

/// What cannot name a project.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' cannot name a project: use 1 to 64 lower-case letters, digits, '-' and '_', a letter first, and no word of a \
     language or of the SDK",
    .0.escape_debug()
)]
pub struct NotAProjectName(String);

impl FromStr for ProjectName {
    type Err = NotAProjectName;

    fn from_str(name: &str) -> Result<Self, NotAProjectName> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        let ours = Self(name.to_owned());
        let taken = TAKEN.contains(&name) || TAKEN_TYPES.contains(&ours.camel_case().as_str());
        if first && name.len() <= 64 && name.bytes().all(plain) && !taken {
            Ok(ours)
        } else {
            Err(NotAProjectName(name.to_owned()))
        }
    }
}

impl ProjectName {
    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As a file of Rust or Python is named.
    pub fn snake_case(&self) -> String {
        self.0.replace('-', "_")
    }

    fn camel_case(&self) -> String {
        let words = self.0.split(['-', '_']);
        words
            .flat_map(|word| {
                let (first, rest) = word.split_at(word.len().min(1));
                [first.to_ascii_uppercase(), rest.to_owned()]
            })
            .collect()
    }
}

/// What a project is to be.
#[derive(Debug)]
struct Plan<'a> {
    name: &'a ProjectName,
    blind: bool,
}

impl Plan<'_> {
    /// The template for this kind of provider.
    fn either<'t>(&self, sighted: &'t str, blind: &'t str) -> &'t str {
        if self.blind { blind } else { sighted }
    }

    /// A template with its words filled in.
    fn filled(&self, path: &'static str, template: &str) -> File {
        let world = self.either("provider", "blind-provider");
        let text = template
            .replace("{{name}}", &self.name.0)
            .replace("{{crate}}", &self.name.snake_case())
            .replace("{{Type}}", &self.name.camel_case())
            .replace("{{backUp}}", self.either("backUp", "backUpBlindly"))
            .replace("{{world}}", world)
            .replace("{{version}}", env!("CARGO_PKG_VERSION"));
        File::copy((path, text.as_bytes()))
    }
}

/// One file of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Within the project's folder.
    pub path: &'static str,
    /// All of it. Text, but for what C's bindings are linked with.
    pub bytes: Vec<u8>,
    /// Whether it is to be run.
    pub executable: bool,
}

impl File {
    /// A file as it is.
    fn copy((path, bytes): (&'static str, &[u8])) -> Self {
        Self {
            path,
            bytes: bytes.to_vec(),
            executable: bytes.starts_with(b"#!"),
        }
    }
}

/// All files of a new project. A blind provider never sees a byte of a disk.
pub fn project(language: Language, name: &ProjectName, blind: bool) -> Vec<File> {
    let plan = Plan { name, blind };
    match language {
        Language::Rust => rust::project(&plan),
        Language::Python => python::project(&plan),
        Language::Javascript => javascript::project(&plan),
        Language::C => c::project(&plan),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn a_name_becomes_a_file_and_a_type() {
        let name: ProjectName = "my-2nd_provider".parse().unwrap();
        assert_eq!(name.snake_case(), "my_2nd_provider");
        assert_eq!(name.camel_case(), "My2ndProvider");
        for wrong in [
            "",
            "-a",
            "2a",
            "A",
            "a/b",
            "a b",
            "test",
            "self",
            "blind-provider",
            &"a".repeat(65),
        ] {
            wrong.parse::<ProjectName>().unwrap_err();
        }
    }

    #[test]
    fn nothing_is_left_to_fill_in_and_no_file_is_there_twice() {
        let name = "mirror".parse().unwrap();
        for &language in Language::value_variants() {
            for blind in [false, true] {
                let files = project(language, &name, blind);
                for file in &files {
                    let text = String::from_utf8_lossy(&file.bytes);
                    assert!(!text.contains("{{"), "{language:?}: {}", file.path);
                }
                let paths: BTreeSet<_> = files.iter().map(|file| file.path).collect();
                assert_eq!(paths.len(), files.len(), "{language:?}");
                for always in ["README.md", ".gitignore"] {
                    assert!(paths.contains(always), "{language:?} has no {always}");
                }
            }
        }
    }

    /// A file that was added to an SDK and not to its list would be missing in every project.
    #[test]
    fn the_whole_sdk_of_each_language_is_in_a_project() {
        let name = "mirror".parse().unwrap();
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-sdk");
        for (language, folder, sources) in [
            (Language::Rust, "", "src"),
            (Language::Python, "python", "fleecebox_guest"),
            (Language::Javascript, "javascript", "src"),
        ] {
            let sdk = checkout.join(folder);
            let mut expected = BTreeSet::new();
            let mut folders = vec![sdk.join(sources)];
            while let Some(path) = folders.pop() {
                for entry in std::fs::read_dir(path).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        folders.push(path);
                    } else if path.extension().is_some_and(|ending| ending != "pyc") {
                        let within = path.strip_prefix(&sdk).unwrap().display();
                        expected.insert(format!("fleecebox-guest/{within}"));
                    }
                }
            }
            let held: BTreeSet<String> = project(language, &name, false)
                .into_iter()
                .map(|file| file.path.to_owned())
                .filter(|path| path.starts_with(&format!("fleecebox-guest/{sources}/")))
                .collect();
            assert_eq!(held, expected, "{language:?}");
        }
    }
}
