//! Text for people: sizes, durations, and errors in one line.

pub(super) use crate::terminal::one_line;
use std::num::NonZeroU64;
use std::time::Duration;

/// The sum of sizes, which a forged manifest may make as large as it likes.
pub(super) fn total(sizes: impl Iterator<Item = u64>) -> u64 {
    sizes.fold(0, u64::saturating_add)
}

/// An error with its causes on one line. Most errors name their cause in their own words; it is not said twice.
pub(super) fn error(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    one_line(&said)
}

/// A number of bytes, such as `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Reads a number of bytes in a second, such as `104857600` or `100MiB`.
pub(super) fn rate(text: &str) -> Result<NonZeroU64, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let unit = units
        .iter()
        .find_map(|&(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    let rate = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .and_then(NonZeroU64::new);
    rate.ok_or_else(|| {
        "expected a whole number of bytes above 0, such as 104857600 or 100MiB (KiB, MiB, GiB)"
            .into()
    })
}

/// How long something took and how fast it was, such as `2.1 s, 487.1 MiB/s`.
pub(super) fn pace(bytes: u64, took: Duration) -> String {
    let rate = bytes as f64 / took.as_secs_f64().max(0.001);
    format!("{:.1} s, {}/s", took.as_secs_f64(), size(rate as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[derive(Debug, thiserror::Error)]
    #[error("volume a: {source}")]
    struct Volume {
        source: std::io::Error,
    }

    #[test]
    fn a_rate_is_bytes_with_or_without_a_unit_and_never_zero() {
        for (text, bytes) in [
            ("1", 1),
            ("100MiB", 100 << 20),
            ("3KiB", 3 << 10),
            ("2GiB", 2 << 30),
        ] {
            assert_eq!(rate(text).map(NonZeroU64::get), Ok(bytes), "{text}");
        }
        for text in [
            "0",
            "0MiB",
            "",
            "MiB",
            "1.5MiB",
            "-1",
            "1MB",
            "18446744073709551615KiB",
        ] {
            assert!(rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_error_names_each_cause_once_and_on_one_line() {
        let source = std::io::Error::other("no\nroom");
        let said = anyhow!(Volume { source }).context("the backup");
        assert_eq!(error(&said), r"the backup: volume a: no\nroom");
    }
}
