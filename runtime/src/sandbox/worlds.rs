//! Which world a component is for, and whether that world grants what it imports. Decided from names alone, before
//! any of its code runs.

use crate::channel::{Interface, World};

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

const BACKUP: &str = "fleecebox:provider/backup@0.1.0";
const RESTORE: &str = "fleecebox:provider/restore@0.1.0";
const BLIND_BACKUP: &str = "fleecebox:provider/blind-backup@0.1.0";

/// Why a component is not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It imports what its world does not hold; the first such import, by name.
    #[error("it imports `{import}`, which is not granted to {}", described(.world))]
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

/// The world that a component is for, if that world grants everything that the component imports.
pub fn world_of(interface: &Interface) -> Result<World, Refusal> {
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
    if let Some(import) = interface
        .imports
        .iter()
        .find(|name| !granted.contains(&name.as_str()))
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
            "it imports `wasi:sockets/tcp@0.2.0`, which is not granted to a blind provider"
        );
    }
}
