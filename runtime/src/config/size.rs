//! Numbers of bytes as people write them: whole, or with a unit.

use serde::Deserializer;
use serde::de::{Error, Visitor};
use std::fmt;
use std::num::NonZeroU64;

/// Powers of 1024.
const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

/// A number of bytes, such as `104857600` or `100MiB`, with or without a space before the unit.
///
/// # Errors
/// Where it is no such number, or passes 2⁶⁴.
pub fn parse(text: &str) -> Result<u64, String> {
    let unit = UNITS
        .iter()
        .find_map(|&(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    let number = number.trim_end().parse::<u64>().ok();
    let bytes = number.and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| {
        format!(
            "'{}' is no number of bytes; write it whole or with KiB, MiB, GiB or TiB, such as 104857600 or 100MiB",
            text.escape_debug()
        )
    })
}

/// For `#[serde(deserialize_with)]`: a whole number, or a text with a unit.
pub(super) fn bytes<'de, D: Deserializer<'de>, N: TryFrom<u64>>(
    deserializer: D,
) -> Result<N, D::Error> {
    let bytes = deserializer.deserialize_any(Size)?;
    bytes
        .try_into()
        .map_err(|_| D::Error::custom(format!("{bytes} bytes are not possible here")))
}

/// As [`bytes()`], for a key that may be left out.
pub(super) fn optional<'de, D: Deserializer<'de>, N: TryFrom<u64>>(
    deserializer: D,
) -> Result<Option<N>, D::Error> {
    bytes(deserializer).map(Some)
}

struct Size;

impl Visitor<'_> for Size {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of bytes, such as 104857600 or \"100MiB\"")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<u64, E> {
        Ok(bytes)
    }

    fn visit_i64<E: Error>(self, bytes: i64) -> Result<u64, E> {
        u64::try_from(bytes).map_err(|_| E::custom(format!("{bytes} bytes are less than none")))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u64, E> {
        parse(text).map_err(E::custom)
    }
}

/// Bytes in a second, of which there is at least one.
///
/// # Errors
/// As [`parse`], and where it is 0.
pub fn rate(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(parse(text)?)
        .ok_or_else(|| "nothing is ever read at 0 bytes in a second: more is needed, such as 104857600 or 100MiB".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Sizes {
        #[serde(deserialize_with = "bytes")]
        small: u32,
        #[serde(default, deserialize_with = "optional")]
        rate: Option<NonZeroU64>,
    }

    fn sizes(text: &str) -> Result<Sizes, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| error.message().to_owned())
    }

    #[test]
    fn a_size_is_a_number_or_a_text_with_a_unit() {
        let read = sizes("small = 65536\nrate = '1 GiB'").unwrap();
        assert_eq!((read.small, read.rate), (65536, NonZeroU64::new(1 << 30)));
        assert_eq!(sizes("small = '64KiB'").unwrap().small, 65536);
        for (wrong, why) in [
            ("small = -1", "less than none"),
            ("small = '64kb'", "'64kb' is no number of bytes"),
            ("small = ''", "'' is no number of bytes"),
            ("small = '4GiB'", "4294967296 bytes are not possible here"),
            ("small = 1\nrate = 0", "0 bytes are not possible here"),
            ("small = 1.5", "a number of bytes"),
            ("small = '16777216TiB'", "no number of bytes"),
        ] {
            let refused = sizes(wrong).unwrap_err();
            assert!(refused.contains(why), "{wrong}: {refused}");
        }
    }

    #[test]
    fn a_rate_is_bytes_with_or_without_a_unit_and_never_zero() {
        for (text, bytes) in [
            ("1", 1),
            ("100MiB", 100 << 20),
            ("3KiB", 3 << 10),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(rate(text).map(NonZeroU64::get), Ok(bytes));
        }
        for text in [
            "",
            "0",
            "0MiB",
            "-1",
            "1.5GiB",
            "MiB",
            "100MB",
            "99999999999GiB",
        ] {
            assert!(rate(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_more_than_a_refusal(text in "\\PC{0,20}") {
            let _ = parse(&text);
        }
    }
}
