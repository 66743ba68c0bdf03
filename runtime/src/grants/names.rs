//! Under which names objects are stored.
//!
//! A backup's names are one set, so that an image finds what all volumes wrote. Where a provider may not see the bytes, it
//! must not tell time either, and a name that another instance took at some moment is a clock. There each volume has names
//! of its own; nothing of what such a provider wrote is ever asked for by name.

use crate::archive::ObjectName;

/// The name under which volume number `volume` stores what it calls `name`: another for each volume and each name.
pub(super) fn of_volume(
    volume: usize,
    name: &ObjectName,
) -> Result<ObjectName, crate::archive::NotAName> {
    // What follows the number tells the two forms apart.
    format!("{volume}-{name}").parse().or_else(|_| {
        let digest = blake3::hash(name.to_string().as_bytes());
        format!("{volume}.{}", digest.to_hex()).parse()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::NAME_LIMIT;
    use std::collections::BTreeSet;

    #[test]
    fn each_volume_and_each_name_has_one_of_its_own() {
        let long = |last: &str| "n".repeat(NAME_LIMIT - 1) + last;
        let names = ["a", "1-a", "-a", "a.b", &long("a"), &long("b")];
        let stored: BTreeSet<_> = (0..12)
            .flat_map(|volume| names.map(|name| of_volume(volume, &name.parse().unwrap()).unwrap()))
            .collect();
        assert_eq!(stored.len(), 12 * names.len());
    }
}
