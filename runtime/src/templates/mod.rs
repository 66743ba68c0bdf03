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
//! | `{{version}}` | this program's version |

mod rust;

use std::str::FromStr;

/// The contract, for every language.
const CONTRACT: (&str, &str) = (
    "wit/provider.wit",
    include_str!("../../../wit/provider.wit"),
);

/// What a provider can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Language {
    /// With the SDK as a crate
    Rust,
}

/// The name of a project: letters, digits, `-` and `_`, a letter first, at most 64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectName(String);

/// What cannot name a project.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' cannot name a project: use 1 to 64 lower-case letters, digits, '-' and '_', a letter first",
    .0.escape_debug()
)]
pub struct NotAProjectName(String);

impl FromStr for ProjectName {
    type Err = NotAProjectName;

    fn from_str(name: &str) -> Result<Self, NotAProjectName> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        // A crate of that name would be taken for the compiler's own.
        let taken = ["test", "core", "std", "alloc", "fleecebox-guest"].contains(&name);
        if first && name.len() <= 64 && name.bytes().all(plain) && !taken {
            Ok(Self(name.to_owned()))
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

    fn fill(&self, text: &str) -> String {
        text.replace("{{name}}", &self.0)
            .replace("{{crate}}", &self.snake_case())
            .replace("{{Type}}", &self.camel_case())
            .replace("{{version}}", env!("CARGO_PKG_VERSION"))
    }
}

/// One file of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Within the project's folder.
    pub path: &'static str,
    /// All of it.
    pub text: String,
    /// Whether it is to be run.
    pub executable: bool,
}

impl File {
    /// A file as it is.
    fn copy((path, text): (&'static str, &str)) -> Self {
        Self {
            path,
            text: text.to_owned(),
            executable: text.starts_with("#!"),
        }
    }

    /// A file with the project's name filled in.
    fn filled(name: &ProjectName, path: &'static str, text: &str) -> Self {
        Self::copy((path, &name.fill(text)))
    }
}

/// All files of a new project. A blind provider never sees a byte of a disk.
pub fn project(language: Language, name: &ProjectName, blind: bool) -> Vec<File> {
    match language {
        Language::Rust => rust::project(name, blind),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_a_file_and_a_type() {
        let name: ProjectName = "my-2nd_provider".parse().unwrap();
        assert_eq!(name.snake_case(), "my_2nd_provider");
        assert_eq!(name.camel_case(), "My2ndProvider");
        for wrong in ["", "-a", "2a", "A", "a/b", "a b", "test", &"a".repeat(65)] {
            wrong.parse::<ProjectName>().unwrap_err();
        }
    }

    #[test]
    fn nothing_is_left_to_fill_in() {
        let name = "mirror".parse().unwrap();
        for blind in [false, true] {
            for file in project(Language::Rust, &name, blind) {
                assert!(!file.text.contains("{{"), "{}", file.path);
            }
        }
    }
}
