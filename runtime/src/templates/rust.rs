//! A crate with a copy of the SDK beside it: it builds wherever it lies, without this program's sources.

use super::{CONTRACT, File, ProjectName};

/// The files of `guest-sdk/`, where they go.
macro_rules! sdk {
    ($($path:literal),* $(,)?) => {
        &[$((
            concat!("fleecebox-guest/", $path),
            include_str!(concat!("../../../guest-sdk/", $path)),
        )),*]
    };
}

const SDK: &[(&str, &str)] = sdk![
    "src/archive.rs",
    "src/bindings.rs",
    "src/context.rs",
    "src/error.rs",
    "src/export.rs",
    "src/extent.rs",
    "src/lib.rs",
    "src/mock/host.rs",
    "src/mock/mod.rs",
    "src/objects.rs",
    "src/provider.rs",
    "src/runs.rs",
    "src/volume.rs",
    "wasm-std.sh",
];

const SDK_MANIFEST: &str = include_str!("../../../guest-sdk/Cargo.toml");
const WORKSPACE: &str = include_str!("../../../Cargo.toml");

/// One file of the template.
macro_rules! template {
    ($path:literal) => {
        include_str!(concat!("../../../guest-sdk/templates/rust/", $path))
    };
}

pub(super) fn project(name: &ProjectName, blind: bool) -> Vec<File> {
    let source = match blind {
        true => template!("blind.rs.in"),
        false => template!("sighted.rs.in"),
    };
    let mut files = vec![
        File::filled(name, "Cargo.toml", template!("Cargo.toml.in")),
        File::filled(name, "src/lib.rs", source),
        File::filled(name, "README.md", template!("README.md.in")),
        File::filled(name, ".gitignore", template!("gitignore.in")),
        File::copy(("fleecebox-guest/Cargo.toml", &sdk_manifest())),
        File::copy(CONTRACT),
    ];
    files.extend(SDK.iter().copied().map(File::copy));
    files
}

/// The SDK's manifest with what it takes from the workspace written out.
fn sdk_manifest() -> String {
    let parse = |text: &str| text.parse::<toml::Table>().unwrap_or_default();
    let (manifest, workspace) = (parse(SDK_MANIFEST), parse(WORKSPACE));
    let mut whole = toml::Table::new();
    for (section, entries) in manifest {
        let shared = match section.as_str() {
            "package" => "package",
            "dependencies" | "dev-dependencies" => "dependencies",
            _ => {
                whole.insert(section, entries);
                continue;
            }
        };
        let shared = workspace.get("workspace").and_then(|it| it.get(shared));
        let toml::Value::Table(entries) = entries else {
            continue;
        };
        let written = entries.into_iter().filter_map(|(key, value)| {
            let inherits = value.get("workspace").is_some();
            let value = match inherits {
                true => shared?.get(&key)?.clone(),
                false => value,
            };
            Some((key, value))
        });
        whole.insert(section, toml::Value::Table(written.collect()));
    }
    whole.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_whole_sdk_is_in_a_project() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-sdk");
        let mut sources = Vec::new();
        let mut folders = vec![folder.join("src")];
        while let Some(path) = folders.pop() {
            for entry in std::fs::read_dir(path).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => sources.push(path),
                }
            }
        }
        let listed = |path: &Path| {
            let path = path.strip_prefix(&folder).unwrap().to_str().unwrap();
            let path = format!("fleecebox-guest/{path}");
            SDK.iter().any(|(listed, _)| *listed == path)
        };
        for source in &sources {
            assert!(listed(source), "{} is not listed", source.display());
        }
        assert_eq!(sources.len() + 1, SDK.len());
    }

    #[test]
    fn the_sdks_manifest_stands_alone() {
        let manifest = sdk_manifest();
        assert!(!manifest.contains("workspace"), "{manifest}");
        for part in [
            "name = \"fleecebox-guest\"",
            "edition = \"2024\"",
            "wit-bindgen",
            "0.61",
        ] {
            assert!(manifest.contains(part), "{part}: {manifest}");
        }
    }
}
