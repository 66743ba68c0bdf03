//! A crate with a copy of the SDK beside it: it builds wherever it lies, without this program's sources.

use super::{File, Plan, Whole};

const SDK: &[Whole] = sdk!["":
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
    "wit/provider.wit",
];

const SDK_MANIFEST: &str = include_str!("../../../guest-sdk/Cargo.toml");
const WORKSPACE: &str = include_str!("../../../Cargo.toml");

pub(super) fn project(plan: &Plan) -> Vec<File> {
    let source = plan.either(
        template!("rust/sighted.rs.in"),
        template!("rust/blind.rs.in"),
    );
    let mut files = vec![
        plan.filled("Cargo.toml", template!("rust/Cargo.toml.in")),
        plan.filled("src/lib.rs", source),
        plan.filled("README.md", template!("rust/README.md.in")),
        plan.filled(".gitignore", template!("rust/gitignore.in")),
        File::copy(("fleecebox-guest/Cargo.toml", sdk_manifest().as_bytes())),
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
