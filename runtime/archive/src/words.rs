//! Words of the contract's as they stand in manifests. A message between two processes of one version may change; what is
//! on disk stays as it is, and a word that is new in the contract has to be given one here.

use fleecebox_contract::{BitmapMode, Encoding, GuestLimits, World};
use serde::{Deserialize, Serialize};

/// As [`World`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "World", rename_all = "kebab-case")]
pub(super) enum WorldWord {
    Provider,
    BlindProvider,
}

/// As [`BitmapMode`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "BitmapMode", rename_all = "kebab-case")]
pub(super) enum BitmapModeWord {
    None,
    New,
    Reuse,
}

/// As [`Encoding`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "Encoding", rename_all = "kebab-case")]
pub(super) enum EncodingWord {
    Identity,
    Zstd,
}

/// As [`GuestLimits`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "GuestLimits", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct GuestLimitsWords {
    memory: u64,
    cpu_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Serialize, Deserialize)]
    struct Words(
        #[serde(with = "WorldWord")] World,
        #[serde(with = "BitmapModeWord")] BitmapMode,
        #[serde(with = "EncodingWord")] Encoding,
        #[serde(with = "GuestLimitsWords")] GuestLimits,
    );

    #[test]
    fn the_words_in_manifests_stay_as_they_are() {
        let limits = GuestLimits {
            memory: 1,
            cpu_ms: 2,
        };
        let on_disk = json!({"memory": 1, "cpu-ms": 2});
        for (words, expected) in [
            (
                Words(
                    World::Provider,
                    BitmapMode::None,
                    Encoding::Identity,
                    limits,
                ),
                json!(["provider", "none", "identity", on_disk]),
            ),
            (
                Words(
                    World::BlindProvider,
                    BitmapMode::New,
                    Encoding::Zstd,
                    limits,
                ),
                json!(["blind-provider", "new", "zstd", on_disk]),
            ),
            (
                Words(World::Provider, BitmapMode::Reuse, Encoding::Zstd, limits),
                json!(["provider", "reuse", "zstd", on_disk]),
            ),
        ] {
            assert_eq!(serde_json::to_value(&words).unwrap(), expected);
            let read: Words = serde_json::from_value(expected).unwrap();
            assert_eq!(
                (read.0, read.1, read.2, read.3),
                (words.0, words.1, words.2, words.3)
            );
        }
    }
}
