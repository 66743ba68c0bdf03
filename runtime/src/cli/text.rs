//! Text for people: sizes, durations, and errors in one line.

use crate::contract::with_causes;
pub(super) use crate::terminal::one_line;
use std::time::Duration;

/// The sum of sizes, which a forged manifest may make as large as it likes.
pub(super) fn total(sizes: impl Iterator<Item = u64>) -> u64 {
    sizes.fold(0, u64::saturating_add)
}

/// An error with its causes on one line.
pub(super) fn error(error: &anyhow::Error) -> String {
    one_line(&with_causes(error.as_ref()))
}

/// A number of bytes, such as `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
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
    #[error("volume a")]
    struct Volume {
        source: std::io::Error,
    }

    #[test]
    fn an_error_names_each_cause_once_and_on_one_line() {
        let source = std::io::Error::other("no\nroom");
        let said = anyhow!(Volume { source }).context("the backup");
        assert_eq!(error(&said), r"the backup: volume a: no\nroom");
    }
}
