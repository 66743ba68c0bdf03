//! JSON with its own digest, by which every change is noticed.

use super::error::{Damage, Error};
use fleecebox_contract::{digest::Digest, with_causes};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The field that is no part of what it is the digest of.
const DIGEST: &str = "digest";

/// Compact JSON with sorted keys, and its digest among them.
pub(super) fn seal(content: &impl Serialize) -> Result<Vec<u8>, Error> {
    let serialise = |error: serde_json::Error| Error::Serialise(with_causes(&error));
    let mut value = serde_json::to_value(content).map_err(serialise)?;
    let digest = digest_of(&value).map_err(serialise)?;
    if let Value::Object(fields) = &mut value {
        fields.insert(DIGEST.into(), Value::String(digest.to_string()));
    }
    serde_json::to_vec(&value).map_err(serialise)
}

/// The reverse of [`seal`], where nothing was changed since. `otherwise` says what bytes without a format are not.
pub(super) fn unseal<T: DeserializeOwned>(
    bytes: &[u8],
    expected: u32,
    otherwise: &'static str,
) -> Result<T, Damage> {
    let json = |error: serde_json::Error| Damage::Json(with_causes(&error));
    let mut value: Value = serde_json::from_slice(bytes).map_err(json)?;
    // First, since another format may carry its digest in another way.
    match value.get("format").and_then(Value::as_u64) {
        Some(format) if format == u64::from(expected) => {}
        Some(actual) => return Err(Damage::Format { expected, actual }),
        None => return Err(Damage::Malformed(otherwise)),
    }
    let recorded = value
        .as_object_mut()
        .and_then(|fields| fields.remove(DIGEST));
    let actual = digest_of(&value).map_err(json)?;
    if recorded != Some(Value::String(actual.to_string())) {
        return Err(Damage::Digest);
    }
    serde_json::from_value(value).map_err(json)
}

/// Of the compact JSON with sorted keys.
fn digest_of(value: &Value) -> serde_json::Result<Digest> {
    serde_json::to_vec(value).map(|bytes| Digest::of(&bytes))
}
