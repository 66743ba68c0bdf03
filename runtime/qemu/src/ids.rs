//! The ids of everything that a job makes inside QEMU. Each carries one prefix and the job's id, so
//! that a later run finds what a dead job left behind, and knows whose it was.

use std::fmt;
use std::str::FromStr;

/// Begins every id that this program gives to a node, job or export.
const PREFIX: &str = "fbx";

/// The longest node name that QEMU takes (its node names have 32 bytes, one for the end).
pub const NODE_NAME_MAX: usize = 31;

/// One run of one backup: 64 random bits, written as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(u64);

/// The text is not 16 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not the id of a job: 16 hexadecimal digits are expected")]
pub struct NotAJobId {
    text: String,
}

impl JobId {
    /// A new id from the system's random numbers.
    ///
    /// # Errors
    /// Where the system gives none.
    pub fn random() -> Result<Self, getrandom::Error> {
        getrandom::u64().map(Self)
    }
}

impl JobId {
    /// The name of the job's folder for fleecing images.
    pub fn folder(self) -> String {
        format!("{PREFIX}-{self}")
    }

    /// The job whose folder has that name.
    pub fn of_folder(name: &str) -> Option<Self> {
        let job = name.strip_prefix(PREFIX)?.strip_prefix('-')?;
        job.parse().ok()
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for JobId {
    type Err = NotAJobId;

    fn from_str(text: &str) -> Result<Self, NotAJobId> {
        let canonical = |id: &Self| id.to_string() == text;
        u64::from_str_radix(text, 16)
            .map(Self)
            .ok()
            .filter(canonical)
            .ok_or_else(|| NotAJobId { text: text.into() })
    }
}

/// What a thing of ours inside QEMU is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The node of the fleecing image.
    Fleecing,
    /// The copy-before-write filter above the disk.
    Filter,
    /// The node that reads as of the point in time.
    Access,
    /// The block job that owns the filter.
    Job,
    /// The NBD export, its id and its name.
    Export,
    /// The FUSE export of the same node.
    File,
    /// The export of the disk itself, by which its storage is asked whether it answers.
    Probe,
    /// The node of a file that the VM does not have.
    Extra,
    /// The file below a fleecing image that is more than raw.
    Image,
    /// The job that formats it.
    Create,
    /// The disk of nothing that a bitmap's mark comes from, and its export.
    Mark,
}

impl Role {
    const ALL: [Self; 11] = [
        Self::Fleecing,
        Self::Filter,
        Self::Access,
        Self::Job,
        Self::Export,
        Self::File,
        Self::Probe,
        Self::Extra,
        Self::Image,
        Self::Create,
        Self::Mark,
    ];

    fn tag(self) -> &'static str {
        match self {
            Self::Fleecing => "fl",
            Self::Filter => "cbw",
            Self::Access => "sa",
            Self::Job => "job",
            Self::Export => "x",
            Self::File => "f",
            Self::Probe => "pr",
            Self::Extra => "ro",
            Self::Image => "img",
            Self::Create => "mk",
            Self::Mark => "mark",
        }
    }
}

/// An id of ours: `fbx-<job>-<role><index>`, at most [`NODE_NAME_MAX`] characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnId {
    /// The job that made it.
    pub job: JobId,
    /// What it is for.
    pub role: Role,
    /// Which of the job's disks it belongs to.
    pub index: u16,
}

impl OwnId {
    /// Reads an id back; nothing where it is not one of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix(PREFIX)?.strip_prefix('-')?;
        let (job, rest) = rest.split_once('-')?;
        let job = job.parse().ok()?;
        let digits = rest.find(|c: char| c.is_ascii_digit())?;
        let (tag, index) = rest.split_at(digits);
        let id = Self {
            job,
            role: Role::ALL.into_iter().find(|role| role.tag() == tag)?,
            index: index.parse().ok()?,
        };
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for OwnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}-{}-{}{}", self.job, self.role.tag(), self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_id_reads_back_and_fits_a_node_name(job: u64, role in 0usize..10, index: u16) {
            let id = OwnId { job: JobId(job), role: Role::ALL[role], index };
            let text = id.to_string();
            prop_assert!(text.len() <= NODE_NAME_MAX);
            prop_assert_eq!(OwnId::parse(&text), Some(id));
            prop_assert_eq!(id.job.to_string().parse(), Ok(id.job));
        }

        #[test]
        fn what_parses_is_written_the_same(text in "(fbx-)?[0-9a-fA-F+]{15,17}-?(fl|cbw|sa|job|x|f|pr|ro|img|mk|y)?[0-9+]{0,6}") {
            if let Some(id) = OwnId::parse(&text) {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            prop_assert!(OwnId::parse(&text).is_none_or(|id| id.to_string() == text));
        }
    }
}
