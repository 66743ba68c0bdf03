//! Which world a component is for, and whether that world grants what it imports. Decided from names alone, before
//! any of its code runs.

use crate::{Wasi, World};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What a component imports and exports, by full interface name, such as `fleecebox:provider/volume@0.1.0`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// In the component's order.
    pub imports: Vec<String>,
    /// In the component's order.
    pub exports: Vec<String>,
}

/// What the world `provider` of `wit/provider.wit` imports.
const PROVIDER_IMPORTS: &[&str] = &[
    "fleecebox:provider/types@0.1.0",
    "fleecebox:provider/volume@0.1.0",
    "fleecebox:provider/content@0.1.0",
    "fleecebox:provider/archive@0.1.0",
    "fleecebox:provider/job@0.1.0",
    "fleecebox:provider/stored@0.1.0",
];

/// What the world `blind-provider` imports: nothing that shows a byte.
const BLIND_IMPORTS: &[&str] = &[
    "fleecebox:provider/types@0.1.0",
    "fleecebox:provider/volume@0.1.0",
    "fleecebox:provider/archive@0.1.0",
    "fleecebox:provider/job@0.1.0",
];

/// The interfaces of WASI 0.2 that can be granted, each with the parts that any one of grants it.
const WASI: &[(&str, &[Wasi])] = &[
    ("wasi:clocks/wall-clock", &[Wasi::Clocks]),
    ("wasi:clocks/monotonic-clock", &[Wasi::Clocks]),
    ("wasi:random/random", &[Wasi::Random]),
    ("wasi:random/insecure", &[Wasi::Random]),
    ("wasi:random/insecure-seed", &[Wasi::Random]),
    ("wasi:cli/environment", &[Wasi::Output]),
    ("wasi:cli/exit", &[Wasi::Output]),
    ("wasi:cli/stdin", &[Wasi::Output]),
    ("wasi:cli/stdout", &[Wasi::Output]),
    ("wasi:cli/stderr", &[Wasi::Output]),
    ("wasi:cli/terminal-input", &[Wasi::Output]),
    ("wasi:cli/terminal-output", &[Wasi::Output]),
    ("wasi:cli/terminal-stdin", &[Wasi::Output]),
    ("wasi:cli/terminal-stdout", &[Wasi::Output]),
    ("wasi:cli/terminal-stderr", &[Wasi::Output]),
    ("wasi:io/error", &[Wasi::Output]),
    ("wasi:io/streams", &[Wasi::Output]),
    ("wasi:io/poll", &[Wasi::Output, Wasi::Clocks]),
];

/// What a provider that sees the bytes exports, to back up.
pub const BACKUP: &str = "fleecebox:provider/backup@0.1.0";
/// What it exports besides, to restore.
pub const RESTORE: &str = "fleecebox:provider/restore@0.1.0";
/// What a provider exports that does not see the bytes.
pub const BLIND_BACKUP: &str = "fleecebox:provider/blind-backup@0.1.0";

/// Why a component is not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It imports what its world does not hold; the first such import, by name.
    #[error("it imports `{import}`, which is not granted to {}{}", described(.world), remedy(.import, .world))]
    NotGranted {
        /// As the component names it, control characters escaped.
        import: String,
        /// The world that its exports are of; none if they are of none.
        world: Option<World>,
    },
    /// It exports an interface of a world, but not all of them.
    #[error("it does not export `{export}`, which {} must", described(&Some(*.world)))]
    MissingExport {
        /// The interface.
        export: &'static str,
        /// The world.
        world: World,
    },
    /// It exports nothing that a provider exports.
    #[error("it is no provider: it exports neither `{BACKUP}` nor `{BLIND_BACKUP}`")]
    NoProvider,
    /// It exports what both worlds export, so it is unclear which to grant.
    #[error("it exports both `{BACKUP}` and `{BLIND_BACKUP}`; a provider is for one world")]
    TwoWorlds,
}

fn described(world: &Option<World>) -> &'static str {
    match world {
        Some(World::Provider) => "a provider that sees the bytes",
        Some(World::BlindProvider) => "a blind provider",
        None => "any provider",
    }
}

/// What would make an import of WASI's granted, or why nothing does.
fn remedy(import: &str, world: &Option<World>) -> String {
    match parts(import) {
        Some([Wasi::Clocks]) if *world == Some(World::BlindProvider) => {
            "; with a clock it could tell which blocks are equal and how well they compress".into()
        }
        Some([Wasi::Clocks]) => {
            "; `wasi = [\"clocks\"]` in its grant, or --allow-wasi clocks, would do so where `read` is granted".into()
        }
        Some([part, ..]) => {
            let part = part.name();
            format!("; `wasi = [\"{part}\"]` in its grant, or --allow-wasi {part}, would do so")
        }
        _ if ["wasi:filesystem/", "wasi:sockets/", "wasi:http/"]
            .iter()
            .any(|never| import.starts_with(never)) =>
        {
            ", and never is: build it without files, sockets and HTTP".into()
        }
        _ => String::new(),
    }
}

/// The parts of WASI, any one of which grants `import`. None for what cannot be granted.
fn parts(import: &str) -> Option<&'static [Wasi]> {
    let (interface, version) = import.split_once('@')?;
    // Later versions of 0.2 only add to earlier ones; what they add is not linked.
    version.strip_prefix("0.2.")?;
    WASI.iter()
        .find(|(name, _)| *name == interface)
        .map(|(_, parts)| *parts)
}

/// The least that a component has to be granted of WASI. What cannot be granted is not among it.
pub fn wasi_of(interface: &Interface) -> BTreeSet<Wasi> {
    let needed = || interface.imports.iter().filter_map(|name| parts(name));
    let mut least: BTreeSet<Wasi> = needed()
        .filter_map(|parts| match parts {
            [only] => Some(*only),
            _ => None,
        })
        .collect();
    for parts in needed() {
        if !parts.iter().any(|part| least.contains(part)) {
            least.extend(parts.first());
        }
    }
    least
}

/// The world that a component is for, if that world and `wasi` grant everything that the component imports.
///
/// A blind provider is given no clock, whatever `wasi` says.
pub fn world_of(interface: &Interface, wasi: &BTreeSet<Wasi>) -> Result<World, Refusal> {
    let exports = |name| interface.exports.iter().any(|export| export == name);
    let world = match (exports(BACKUP), exports(BLIND_BACKUP)) {
        (true, true) => return Err(Refusal::TwoWorlds),
        (true, false) => Some(World::Provider),
        (false, true) => Some(World::BlindProvider),
        (false, false) => None,
    };
    let granted = match world {
        Some(World::BlindProvider) => BLIND_IMPORTS,
        Some(World::Provider) | None => PROVIDER_IMPORTS,
    };
    let may = |name: &str| {
        let clocks = world != Some(World::BlindProvider);
        parts(name).is_some_and(|parts| {
            parts
                .iter()
                .any(|part| wasi.contains(part) && (clocks || *part != Wasi::Clocks))
        })
    };
    if let Some(import) = interface
        .imports
        .iter()
        .find(|name| !granted.contains(&name.as_str()) && !may(name))
    {
        return Err(Refusal::NotGranted {
            import: import.escape_debug().to_string(),
            world,
        });
    }
    match world {
        None => Err(Refusal::NoProvider),
        Some(World::Provider) if !exports(RESTORE) => Err(Refusal::MissingExport {
            export: RESTORE,
            world: World::Provider,
        }),
        Some(world) => Ok(world),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without anything of WASI's.
    fn world_of(interface: &Interface) -> Result<World, Refusal> {
        super::world_of(interface, &BTreeSet::new())
    }

    fn interface(imports: &[&str], exports: &[&str]) -> Interface {
        Interface {
            imports: imports.iter().map(|&name| name.into()).collect(),
            exports: exports.iter().map(|&name| name.into()).collect(),
        }
    }

    #[test]
    fn exports_decide_the_world() {
        assert_eq!(
            world_of(&interface(PROVIDER_IMPORTS, &[BACKUP, RESTORE])),
            Ok(World::Provider)
        );
        assert_eq!(
            world_of(&interface(BLIND_IMPORTS, &[BLIND_BACKUP])),
            Ok(World::BlindProvider)
        );
        assert_eq!(
            world_of(&interface(&[], &[RESTORE])),
            Err(Refusal::NoProvider)
        );
        assert_eq!(
            world_of(&interface(&[], &[BACKUP, BLIND_BACKUP, RESTORE])),
            Err(Refusal::TwoWorlds)
        );
        assert!(matches!(
            world_of(&interface(&[], &[BACKUP])),
            Err(Refusal::MissingExport {
                export: RESTORE,
                ..
            })
        ));
    }

    #[test]
    fn the_first_import_that_is_not_granted_is_named() {
        let refused =
            |imports: &[&str], exports: &[&str]| match world_of(&interface(imports, exports)) {
                Err(Refusal::NotGranted { import, .. }) => import,
                other => panic!("{other:?}"),
            };
        let sockets = "wasi:sockets/tcp@0.2.0";
        assert_eq!(
            refused(
                &[PROVIDER_IMPORTS[0], sockets, "wasi:clocks/wall-clock@0.2.0"],
                &[BLIND_BACKUP]
            ),
            sockets
        );
        assert_eq!(refused(&[sockets], &[]), sockets);
        assert_eq!(
            refused(PROVIDER_IMPORTS, &[BLIND_BACKUP]),
            "fleecebox:provider/content@0.1.0"
        );
        assert_eq!(
            refused(&["fleecebox:provider/types@0.2.0"], &[BACKUP, RESTORE]),
            "fleecebox:provider/types@0.2.0"
        );
    }

    #[test]
    fn a_refusal_says_what_and_why_in_one_line() {
        let refusal =
            world_of(&interface(&["wasi:sockets/tcp@0.2.0"], &[BLIND_BACKUP])).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "it imports `wasi:sockets/tcp@0.2.0`, which is not granted to a blind provider, and never is: build it \
             without files, sockets and HTTP"
        );
    }

    #[test]
    fn wasi_is_granted_by_its_parts_and_a_clock_never_to_a_blind_provider() {
        let sees = |import: &str, granted: &[Wasi]| {
            let granted = granted.iter().copied().collect();
            super::world_of(&interface(&[import], &[BACKUP, RESTORE]), &granted)
        };
        let blind = |import: &str, granted: &[Wasi]| {
            let granted = granted.iter().copied().collect();
            super::world_of(&interface(&[import], &[BLIND_BACKUP]), &granted)
        };
        for (import, parts) in WASI {
            for part in Wasi::ALL {
                let import = format!("{import}@0.2.6");
                let granted = parts.contains(&part);
                assert_eq!(sees(&import, &[part]).is_ok(), granted, "{import} {part:?}");
                let granted = granted && part != Wasi::Clocks;
                assert_eq!(
                    blind(&import, &[part]).is_ok(),
                    granted,
                    "{import} {part:?}"
                );
            }
        }
        for never in [
            "wasi:filesystem/types@0.2.0",
            "wasi:sockets/tcp@0.2.0",
            "wasi:http/types@0.2.0",
            "wasi:clocks/wall-clock@0.3.0",
            "wasi:clocks/wall-clock",
            "wasi:clocks/timezone@0.2.0",
        ] {
            assert!(sees(never, &Wasi::ALL).is_err(), "{never}");
        }
        let clock = "wasi:clocks/wall-clock@0.2.0";
        let said = sees(clock, &[]).unwrap_err().to_string();
        assert!(said.contains("--allow-wasi clocks"), "{said}");
        let said = blind(clock, &[Wasi::Clocks]).unwrap_err().to_string();
        assert!(said.contains("blocks are equal"), "{said}");
    }

    #[test]
    fn the_least_that_a_component_needs_of_wasi_is_known() {
        let needs = |imports: &[&str]| -> Vec<Wasi> {
            wasi_of(&interface(imports, &[])).into_iter().collect()
        };
        assert_eq!(needs(&["wasi:sockets/tcp@0.2.0"]), []);
        let poll = "wasi:io/poll@0.2.0";
        assert_eq!(needs(&[poll]), [Wasi::Output]);
        assert_eq!(
            needs(&[poll, "wasi:clocks/monotonic-clock@0.2.3"]),
            [Wasi::Clocks]
        );
        assert_eq!(
            needs(&["wasi:random/random@0.2.0", "wasi:cli/stderr@0.2.0"]),
            [Wasi::Random, Wasi::Output]
        );
    }
}
