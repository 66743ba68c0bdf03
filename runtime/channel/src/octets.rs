//! Bytes inside a message: as they are between the two processes, and as hexadecimal digits where people read them, in a
//! recording.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// For `#[serde(with)]`.
pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    match serializer.is_human_readable() {
        true => hex::serde::serialize(bytes, serializer),
        false => bytes.serialize(serializer),
    }
}

/// As [`serialize`].
pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    match deserializer.is_human_readable() {
        true => hex::serde::deserialize(deserializer),
        false => Vec::deserialize(deserializer),
    }
}

/// The same, of what may be missing.
pub(super) mod optional {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Octets(#[serde(with = "super")] Vec<u8>);

    pub(in super::super) fn serialize<S: Serializer>(
        bytes: &Option<Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        bytes.clone().map(Octets).serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Vec<u8>>, D::Error> {
        let bytes = Option::<Octets>::deserialize(deserializer)?;
        Ok(bytes.map(|Octets(bytes)| bytes))
    }
}
