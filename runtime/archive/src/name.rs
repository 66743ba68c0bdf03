//! Names of everything in the archive. A value of one of these types is safe to use as a file name.

use super::error::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

/// Longest name of an object or a namespace, in bytes: the contract's. File systems take 255; this leaves room for what a
/// store may put around it, and 128 names of this length fit into one page of a block table.
pub const NAME_LIMIT: usize = fleecebox_contract::MAX_NAME;

/// The text is not a name of the kind that was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid name")]
pub struct NotAName;

/// One plain component: not empty, not hidden, and of characters that mean the same to every file system,
/// shell and object store. Names of providers' objects and of namespaces both are.
fn plain_component(text: &str) -> Result<Arc<str>, NotAName> {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let fits = (1..=NAME_LIMIT).contains(&text.len());
    if fits && !text.starts_with('.') && text.bytes().all(plain) {
        Ok(text.into())
    } else {
        Err(NotAName)
    }
}

/// The name of an object that a provider created, unique within its backup: 1 to [`NAME_LIMIT`] ASCII
/// letters, digits, `.`, `_` and `-`, not beginning with `.`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(Arc<str>);

/// The name of one tenant's and provider's part of the archive, in the form of an [`ObjectName`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceName(Arc<str>);

/// Names one backup: `20261123T003000Z-0123456789abcdef`, the time in UTC and 64 random bits.
///
/// Ids sort by time so that people can read a list. No decision may rest on that order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackupId {
    /// Since 1970, at most [`LAST_SECOND`].
    seconds: u64,
    random: u64,
}

/// The end of the year 9999: years have four digits.
const LAST_SECOND: u64 = 253_402_300_799;

/// Names one pack: 128 random bits, 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackName([u8; 16]);

/// Names one archive: 64 random bits, 16 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ArchiveId([u8; 8]);

/// Names a component by the SHA-256 of its bytes, 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ComponentId([u8; 32]);

impl BackupId {
    /// A fresh id. A clock before 1970 counts as 1970.
    pub fn random(now: OffsetDateTime) -> Result<Self, Error> {
        let seconds = u64::try_from(now.unix_timestamp()).unwrap_or(0);
        Ok(Self {
            seconds: seconds.min(LAST_SECOND),
            random: u64::from_be_bytes(random()?),
        })
    }

    /// When it was made, in seconds since 1970.
    pub fn seconds(self) -> u64 {
        self.seconds
    }
}

impl PackName {
    /// A fresh name.
    pub(super) fn random() -> Result<Self, Error> {
        random().map(Self)
    }

    pub(super) const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub(super) const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// In `packs/`.
    pub(super) fn file_name(&self) -> String {
        format!("{self}.pack")
    }

    /// The reverse of [`Self::file_name`].
    pub(super) fn from_file_name(name: &str) -> Option<Self> {
        name.strip_suffix(".pack")?.parse().ok()
    }
}

impl ArchiveId {
    /// A fresh id.
    pub(super) fn random() -> Result<Self, Error> {
        random().map(Self)
    }
}

impl ComponentId {
    /// The id of a component with these bytes.
    pub fn of(component: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(component).into())
    }

    /// In `components/`.
    pub(super) fn file_name(&self) -> String {
        format!("{self}.wasm")
    }
}

/// `N` bytes that nobody can foretell.
pub(super) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    Ok(bytes)
}

/// Hexadecimal in the one form that we write, so that a name has one spelling.
fn lower_hex<const N: usize>(text: &str) -> Result<[u8; N], NotAName> {
    let mut bytes = [0; N];
    if text.bytes().any(|c| c.is_ascii_uppercase()) {
        return Err(NotAName);
    }
    hex::decode_to_slice(text, &mut bytes).map_err(|_| NotAName)?;
    Ok(bytes)
}

impl FromStr for BackupId {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        if !text.is_ascii() || text.len() != "20261123T003000Z-0123456789abcdef".len() {
            return Err(NotAName);
        }
        let digits = |range: std::ops::Range<usize>| {
            let part = &text[range];
            let all_digits = part.bytes().all(|c| c.is_ascii_digit());
            all_digits.then(|| part.parse::<u16>().ok()).flatten()
        };
        let byte = |range| digits(range).and_then(|number| u8::try_from(number).ok());
        let parse = || {
            let month = Month::try_from(byte(4..6)?).ok()?;
            let date = Date::from_calendar_date(digits(0..4)?.into(), month, byte(6..8)?).ok()?;
            let time = Time::from_hms(byte(9..11)?, byte(11..13)?, byte(13..15)?).ok()?;
            let seconds = PrimitiveDateTime::new(date, time)
                .assume_utc()
                .unix_timestamp();
            let punctuation = text.as_bytes()[8] == b'T' && &text[15..17] == "Z-";
            punctuation.then_some(Self {
                seconds: u64::try_from(seconds).ok()?,
                random: u64::from_be_bytes(lower_hex(&text[17..]).ok()?),
            })
        };
        parse().ok_or(NotAName)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = i64::try_from(self.seconds)
            .ok()
            .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
            .ok_or(fmt::Error)?;
        write!(f, "{:04}{:02}{:02}", t.year(), u8::from(t.month()), t.day())?;
        write!(f, "T{:02}{:02}{:02}Z", t.hour(), t.minute(), t.second())?;
        write!(f, "-{:016x}", self.random)
    }
}

/// Binary forms are for pages, where names are many and nobody reads them.
impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            (self.seconds, self.random).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return String::deserialize(deserializer)?
                .parse()
                .map_err(de::Error::custom);
        }
        let (seconds, random) = Deserialize::deserialize(deserializer)?;
        if seconds > LAST_SECOND {
            return Err(de::Error::custom(NotAName));
        }
        Ok(Self { seconds, random })
    }
}

impl Serialize for PackName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for PackName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return String::deserialize(deserializer)?
                .parse()
                .map_err(de::Error::custom);
        }
        Deserialize::deserialize(deserializer).map(Self)
    }
}

/// What names of plain text share.
macro_rules! plain_name {
    ($name:ident) => {
        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NotAName;

            fn from_str(text: &str) -> Result<Self, NotAName> {
                plain_component(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// What names in hexadecimal share.
macro_rules! hex_name {
    ($name:ident) => {
        impl FromStr for $name {
            type Err = NotAName;

            fn from_str(text: &str) -> Result<Self, NotAName> {
                lower_hex(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
    };
}

/// Written and parsed as text in every format.
macro_rules! text_serde {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?
                    .parse()
                    .map_err(de::Error::custom)
            }
        }
    };
}

macro_rules! debug_is_display {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )*};
}

plain_name!(ObjectName);
plain_name!(NamespaceName);
hex_name!(PackName);
hex_name!(ArchiveId);
hex_name!(ComponentId);
text_serde!(ObjectName);
text_serde!(NamespaceName);
text_serde!(ArchiveId);
text_serde!(ComponentId);
debug_is_display!(ObjectName NamespaceName BackupId PackName ArchiveId ComponentId);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_that_could_leave_its_directory_is_refused() {
        for bad in [
            "", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a\0b", "a b", "ü", "a\n", "~a:",
        ] {
            assert!(bad.parse::<ObjectName>().is_err(), "{bad:?}");
            assert!(bad.parse::<NamespaceName>().is_err(), "{bad:?}");
        }
        assert!("x".repeat(NAME_LIMIT).parse::<ObjectName>().is_ok());
        assert!("x".repeat(NAME_LIMIT + 1).parse::<ObjectName>().is_err());
        assert!("drive-scsi0.img_1".parse::<ObjectName>().is_ok());
    }

    #[test]
    fn a_backup_id_reads_as_its_time_and_has_one_spelling() {
        let id: BackupId = "20261123T003000Z-0123456789abcdef".parse().unwrap();
        assert_eq!(id.seconds, 1_795_393_800);
        assert_eq!(id.to_string(), "20261123T003000Z-0123456789abcdef");
        for bad in [
            "20261123T003000Z-0123456789ABCDEF",
            "20261323T003000Z-0123456789abcdef",
            "20260230T003000Z-0123456789abcdef",
            "20261123T003060Z-0123456789abcdef",
            "20261123t003000Z-0123456789abcdef",
            "+0261123T003000Z-0123456789abcdef",
            "19691231T235959Z-0123456789abcdef",
            "20261123T003000Z-0123456789abcdef0",
            "20261123T003000Z/0123456789abcdef",
        ] {
            assert!(bad.parse::<BackupId>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn backup_ids_sort_as_their_text_and_survive_both_forms(a in (0..=LAST_SECOND, any::<u64>()), b in (0..=LAST_SECOND, any::<u64>())) {
            let id = |(seconds, random)| BackupId { seconds, random };
            let (a, b) = (id(a), id(b));
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
            prop_assert_eq!(a.to_string().parse::<BackupId>(), Ok(a));
            let bytes = postcard::to_stdvec(&a).unwrap();
            prop_assert_eq!(postcard::from_bytes::<BackupId>(&bytes).unwrap(), a);
        }

        #[test]
        fn any_text_parses_to_itself_or_not_at_all(text in "\\PC{0,40}", near in "[0-9]{8}[Tt][0-9]{6}Z-[0-9a-fA-F]{16}") {
            for text in [text, near] {
                if let Ok(id) = text.parse::<BackupId>() {
                    prop_assert_eq!(id.to_string(), text.clone());
                }
                if let Ok(name) = text.parse::<ObjectName>() {
                    prop_assert_eq!(name.as_str(), text);
                }
            }
        }
    }
}
