//! Recordings of what a job's providers asked and were answered, so that a vendor can go after a customer's case without
//! the customer's disk: `fleecebox backup --record FILE`, then `fleecebox provider test COMPONENT --replay FILE`.
//!
//! # The format
//!
//! Lines of JSON. The first is the [`Header`]; each other one is one event of one sandbox process, numbered
//! in the order in which these were started. Calls of several processes lie between each other as they happened.
//!
//! ```json
//! {"fleecebox-recording":1,"program":"0.1.0","provider":"mirror","component":"9f86…","bytes":false,"tells":"…"}
//! {"process":0,"order":{"run":{"world":"provider","limits":{…},"volume":{"name":"scsi0",…},…}}}
//! {"process":0,"call":{"next-regions":{"limit":1024}}}
//! {"process":0,"answer":{"regions":[[0,65536,false]]}}
//! {"process":0,"call":{"read":{"offset":0,"length":65536}}}
//! {"process":0,"answer":{"bytes":{"length":65536}},"payload":{"withheld":65536}}
//! {"process":0,"call":{"done":{"receipt":"736373693030"}}}
//! {"process":1,"order":{"open-image":{…}}}
//! {"process":1,"ask":{"offset":0,"length":65536}}
//! {"cut":"the recording has reached its limit of 268435456 bytes"}
//! ```
//!
//! `order`, `call`, `answer` and `ask` are the messages of [`crate::channel`], by their names there. `payload` goes with
//! a call or an answer that carries bytes: `{"zero":LENGTH}`, `{"withheld":LENGTH}`, or `{"hex":"…"}`.
//!
//! # What a recording tells of the disk
//!
//! Without `--record-bytes` no byte of a disk is in it, and no digest of one: of each read and each write it says the
//! length, and whether all of it was zero. What else it tells is in the words of [`TELLS`], which stand in its first
//! line. With `--record-bytes` it holds what the provider read and wrote, and is as secret as the disk.
//!
//! # What it costs
//!
//! Nothing that the job waits for: lines are queued, and a thread writes them. When the file fails or falls behind, or
//! the recording reaches [`MAX_RECORDING`], it ends there, and the job goes on.

mod read;
mod replay;
mod write;

pub use read::{BadRecording, Recorded, Recording};
pub use replay::{Difference, Process, ReplayError, Replayed, replay};
pub use write::Recorder;

use crate::channel::{Answer, Call, ImageRead, Order, Outcome};
use serde::{Deserialize, Serialize};

/// The version of the format. Messages of another version of the program need not have the same words.
const FORMAT: u32 = 1;

/// Most bytes of a recording.
pub const MAX_RECORDING: u64 = 256 << 20;

/// What stands in the first line of one without the disk's bytes.
pub const TELLS: &str = "names, sizes and changed and zero ranges of the volumes; the provider's settings; names of \
    attachments and objects; and what the provider itself said: its log, its errors and its receipts. No other byte of a \
    disk";

/// What stands in the first line of one with them.
pub const TELLS_ALL: &str = "all that the provider read of the disks, and all that it wrote";

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Header {
    /// `FORMAT`.
    pub fleecebox_recording: u32,
    /// The version that made it.
    pub program: String,
    /// The provider's name.
    pub provider: String,
    /// SHA-256 of its component.
    pub component: String,
    /// Whether it holds what was read and written.
    pub bytes: bool,
    /// For whoever hands it on.
    pub tells: String,
}

impl Header {
    /// Of a recording that begins now.
    pub fn new(provider: String, component: String, bytes: bool) -> Self {
        Self {
            fleecebox_recording: FORMAT,
            program: env!("CARGO_PKG_VERSION").into(),
            provider,
            component,
            bytes,
            tells: if bytes { TELLS_ALL } else { TELLS }.into(),
        }
    }
}

/// Any other line: one of `order`, `call`, `answer` and `ask` with its process, or `cut`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<Order>,
    #[serde(skip_serializing_if = "Option::is_none")]
    call: Option<Call>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Answer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ask: Option<ImageRead>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Payload>,
    /// Why the recording ends here, though the job did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    cut: Option<String>,
}

/// The bytes of a call or an answer, as far as they are known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    /// So many zeroes.
    Zero(u32),
    /// So many bytes, not all of them zero.
    Withheld(u32),
    /// These.
    Hex(#[serde(with = "hex::serde")] Vec<u8>),
}

impl Payload {
    fn of(bytes: Vec<u8>, kept: bool) -> Self {
        // Payloads are far smaller than 4 GiB.
        let length = bytes.len() as u32;
        match (bytes.iter().all(|&byte| byte == 0), kept) {
            (true, _) => Self::Zero(length),
            (false, true) => Self::Hex(bytes),
            (false, false) => Self::Withheld(length),
        }
    }

    fn length(&self) -> u32 {
        match self {
            Self::Zero(length) | Self::Withheld(length) => *length,
            Self::Hex(bytes) => u32::try_from(bytes.len()).unwrap_or(u32::MAX),
        }
    }
}

/// How many bytes go with a call from the sandbox.
fn carried_by_call(call: &Call) -> Option<u32> {
    match call {
        Call::Write { length, .. } | Call::Done(Outcome::Bytes { length }) => Some(*length),
        _ => None,
    }
}

/// How many bytes go with an answer.
fn carried_by_answer(answer: &Answer) -> Option<u32> {
    match answer {
        Answer::Bytes { length } => Some(*length),
        _ => None,
    }
}
