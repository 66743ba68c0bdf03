//! From what a failed backup left behind to the mistake in the provider, in words that its author can act on.

use super::trace::Conversation;
use crate::channel::{Answer, Call};
use crate::contract::{BLOCK_SIZE, ErrorCode, RawRange, with_causes};
use crate::extent::{Extent, ExtentSet};
use crate::grants::image::ImageError;
use crate::grants::run::RunError;
use crate::job::backup::BackupError;
use crate::job::prove::ProofError;
use crate::job::volume_run::VolumeError;
use crate::simulator::Export;
use serde::Serialize;
use std::collections::BTreeMap;

/// Something that a provider does wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mistake {
    /// What it did, where.
    pub what: String,
    /// What that would mean in a real backup.
    pub means: String,
    /// What its author should look at.
    pub remedy: String,
}

impl Mistake {
    pub(super) fn new(
        what: impl Into<String>,
        means: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            what: what.into(),
            means: means.into(),
            remedy: remedy.into(),
        }
    }
}

const NO_COMMIT: &str = "the host does not commit such a backup, so there is none";

/// Why a backup of these disks did not commit.
pub(super) fn failed(error: &BackupError, exports: &[Export], trace: &[Conversation]) -> Mistake {
    match error {
        BackupError::Volume { volume, source } => {
            let export = exports.iter().find(|it| it.name() == volume);
            let run = trace
                .iter()
                .find(|it| it.volume.as_deref() == Some(volume.as_str()));
            match (source, export, run) {
                (VolumeError::Run(error), Some(export), Some(run)) => {
                    run_failed(volume, error, export, run, trace)
                }
                _ => other(error),
            }
        }
        BackupError::Proof { volume, source } => {
            given_back(volume, source, None, None, exports, 0, trace, &[])
        }
        _ => other(error),
    }
}

fn other(error: &BackupError) -> Mistake {
    Mistake::new(
        with_causes(error),
        NO_COMMIT,
        "see what the message names; `fleecebox provider inspect` shows what the component is",
    )
}

fn run_failed(
    volume: &str,
    error: &RunError,
    export: &Export,
    run: &Conversation,
    trace: &[Conversation],
) -> Mistake {
    match error {
        RunError::Uncovered { bytes, first } => uncovered(volume, *bytes, *first, export, run),
        RunError::Guest(text) => Mistake::new(
            format!("volume {volume}: {text}{}", last_refusal(run)),
            NO_COMMIT,
            "return an error instead of trapping: in Rust no `unwrap`, no index that may be out of range; an exception that nobody catches traps too",
        ),
        RunError::GaveUp(text) => {
            if let Some(mistake) = same_name_twice(volume, run, trace) {
                return mistake;
            }
            Mistake::new(
                format!(
                    "volume {volume}: `run` returned the error '{text}'{}",
                    last_refusal(run)
                ),
                "nothing of the backup is kept, although every call was granted",
                "the call that failed and its arguments are named; `wit/provider.wit` says what it fails with and why",
            )
        }
        RunError::WallTime { seconds } => Mistake::new(
            format!("volume {volume}: `run` did not return within {seconds} s"),
            "the host ends a provider that takes too long, and there is no backup",
            "look for a loop that does not end, such as one that goes on asking `dirty-regions.next` after its empty list",
        ),
        RunError::Receipt { limit, actual } => Mistake::new(
            format!("volume {volume}: the receipt has {actual} bytes, more than {limit}"),
            NO_COMMIT,
            "the receipt says where things are; write the things themselves, and long indexes, to an object",
        ),
        error => Mistake::new(
            format!("volume {volume}: {}", with_causes(error)),
            NO_COMMIT,
            "see what the message names",
        ),
    }
}

fn uncovered(
    volume: &str,
    bytes: u64,
    first: Extent,
    export: &Export,
    run: &Conversation,
) -> Mistake {
    let touches = |range: &RawRange| {
        Extent::new(range.offset, range.length).is_ok_and(|it| it.intersection(first).is_some())
    };
    let streams = Streams::of(run);
    let holder = run.exchanges.iter().find_map(|it| match &it.call {
        Call::Splice { stream, range } | Call::Claim { stream, range } if touches(range) => {
            Some(*stream)
        }
        _ => None,
    });
    if let Some(stream) = holder {
        let name = streams.name(stream);
        return if streams.open.contains_key(&stream) {
            leaked_stream(volume, name, Some(first))
        } else {
            Mistake::new(
                format!(
                    "volume {volume}: the object {name}, which holds {first}, is dropped unfinished"
                ),
                "a dropped stream is discarded with all that it covered, so the host refuses the backup",
                "call `output-stream.finish` on it, and look at what it returns",
            )
        };
    }
    let read = run.exchanges.iter().any(|it| match it.call {
        Call::Read { offset, length } => touches(&RawRange {
            offset,
            length: length.into(),
        }),
        _ => false,
    });
    let wrote = run
        .exchanges
        .iter()
        .any(|it| matches!(it.call, Call::Write { .. }));
    if read && wrote {
        return Mistake::new(
            format!(
                "volume {volume}: forgets a claim: {first} was read, but never claimed ({bytes} bytes in all)"
            ),
            "the host cannot know that the provider holds these bytes, so it refuses the backup",
            "call `output-stream.claim` for every range whose bytes were written, before that stream's `finish`",
        );
    }
    let size = export.bytes().len() as u64;
    let block = u64::from(BLOCK_SIZE);
    if first.end() == size && first.len() == bytes && bytes < block && !size.is_multiple_of(block) {
        return Mistake::new(
            format!("volume {volume}: skips the last short block, {first} ({bytes} bytes)"),
            "the end of the disk would be missing, so the host refuses the backup",
            format!(
                "the volume's size is no multiple of the block size: its last block counts as whole and ends at the size, {size}; round up when counting blocks"
            ),
        );
    }
    let handed_out = run.exchanges.iter().any(|it| match &it.answer {
        Some(Answer::Regions(regions)) => regions
            .iter()
            .any(|&(offset, length, _)| touches(&RawRange { offset, length })),
        _ => false,
    });
    if !handed_out {
        return Mistake::new(
            format!(
                "volume {volume}: stops asking `dirty-regions.next` too early: {first} was never handed out ({bytes} bytes missing in all)"
            ),
            "changes would be missing from the backup, so the host refuses it",
            "only an empty list means the end; a list that is shorter than the limit does not",
        );
    }
    Mistake::new(
        format!(
            "volume {volume}: skips {first}: no put, splice or claim covers it ({bytes} bytes missing in all)"
        ),
        "changes would be missing from the backup, so the host refuses it",
        "cover every region of kind `data` that `dirty-regions.next` gives, from its first to its last byte",
    )
}

/// A stream that was neither finished nor dropped when its run ended well: it is no backup's loss, but holds a file and
/// memory of the host until the end.
pub(super) fn leaked(trace: &[Conversation]) -> Option<Mistake> {
    trace.iter().find_map(|run| {
        let volume = run.volume.as_ref()?;
        let streams = Streams::of(run);
        let (_, name) = streams.open.first_key_value()?;
        Some(leaked_stream(volume, name, None))
    })
}

fn leaked_stream(volume: &str, name: &str, holds: Option<Extent>) -> Mistake {
    let holds = holds.map_or_else(String::new, |extent| format!(", which holds {extent},"));
    Mistake::new(
        format!(
            "volume {volume}: leaks a stream: the object {name}{holds} was created, and neither finished nor dropped"
        ),
        "an unfinished object is discarded with all that it covered, and its stream holds memory until the end",
        "call `output-stream.finish`, or drop the handle where the object is not wanted",
    )
}

/// The object streams of one run.
struct Streams {
    names: BTreeMap<u32, String>,
    /// Neither finished nor dropped.
    open: BTreeMap<u32, String>,
}

impl Streams {
    fn of(run: &Conversation) -> Self {
        let mut streams = Self {
            names: BTreeMap::new(),
            open: BTreeMap::new(),
        };
        for exchange in &run.exchanges {
            match (&exchange.call, &exchange.answer) {
                (Call::Create { name, .. }, Some(Answer::Stream(number))) => {
                    let name = format!("'{}'", name.escape_debug());
                    streams.names.insert(*number, name.clone());
                    streams.open.insert(*number, name);
                }
                (Call::Finish { stream } | Call::DropStream { stream }, _) => {
                    streams.open.remove(stream);
                }
                _ => {}
            }
        }
        streams
    }

    fn name(&self, stream: u32) -> &str {
        self.names.get(&stream).map_or("(unknown)", String::as_str)
    }
}

/// The names of the objects that a run created.
fn created(run: &Conversation) -> impl Iterator<Item = &str> {
    run.exchanges
        .iter()
        .filter_map(|it| match (&it.call, &it.answer) {
            (Call::Create { name, .. }, Some(Answer::Stream(_))) => Some(name.as_str()),
            _ => None,
        })
}

fn same_name_twice(volume: &str, run: &Conversation, trace: &[Conversation]) -> Option<Mistake> {
    let refused = run
        .exchanges
        .iter()
        .find_map(|it| match (&it.call, &it.answer) {
            (Call::Create { name, .. }, Some(Answer::Error(ErrorCode::Exists))) => Some(name),
            _ => None,
        })?;
    let other = trace.iter().find(|it| {
        it.volume.is_some()
            && it.volume.as_deref() != Some(volume)
            && created(it).any(|name| name == refused)
    })?;
    let other = other.volume.as_deref()?;
    Some(Mistake::new(
        format!(
            "volumes {volume} and {other}: both create an object named '{}'",
            refused.escape_debug()
        ),
        "names of objects are unique within a backup, so the second one fails with `exists`",
        "put the volume's name into the object's name; each volume runs in an instance of its own, so a counter in memory begins anew for each",
    ))
}

/// What the host last refused, where the provider gave up right after it.
fn last_refusal(run: &Conversation) -> String {
    let last = run.exchanges.iter().rev().find(|it| it.call.can_fail());
    match last.map(|it| (&it.call, &it.answer)) {
        Some((call, Some(Answer::Error(code)))) => {
            format!(" after `{}` failed with `{code}`", shown(call))
        }
        _ => String::new(),
    }
}

/// A call with its arguments.
fn shown(call: &Call) -> String {
    let name = call.name();
    match call {
        Call::Put(range, _)
        | Call::Discard(range)
        | Call::Splice { range, .. }
        | Call::Claim { range, .. } => {
            format!("{name}({} + {})", range.offset, range.length)
        }
        Call::Read { offset, length } => format!("{name}({offset} + {length})"),
        Call::Create { name: object, .. } => format!("{name}({object:?})"),
        Call::ObjectSize { name: object } => format!("{name}({object:?})"),
        Call::ObjectRead {
            name: object,
            offset,
            length,
        } => format!("{name}({object:?}, {offset} + {length})"),
        Call::Write { length, .. } => format!("{name}({length} bytes)"),
        _ => name.into(),
    }
}

/// Why what a provider claimed does not come back. `given` is what a second try gave for `extent`.
#[allow(clippy::too_many_arguments)] // all that is known of it
pub(super) fn given_back(
    volume: &str,
    error: &ProofError,
    given: Option<&[u8]>,
    extent: Option<Extent>,
    exports: &[Export],
    receipt: usize,
    backup: &[Conversation],
    image: &[Conversation],
) -> Mistake {
    let image: Vec<&Conversation> = image.iter().filter(|it| it.volume.is_none()).collect();
    if let Some(mistake) = anothers_object(volume, backup, &image) {
        return mistake;
    }
    if let (Some(given), Some(extent)) = (given, extent)
        && let Some(mistake) = wrong_bytes(volume, given, extent, exports)
    {
        return mistake;
    }
    let asked = image.iter().any(|it| {
        it.exchanges
            .iter()
            .any(|it| matches!(it.call, Call::ObjectRead { .. }))
    });
    let claimed = extent.map_or(u64::MAX, Extent::len);
    if !image.is_empty() && !asked && (receipt as u64) < claimed {
        return Mistake::new(
            format!(
                "volume {volume}: keeps state between instances: {}; its image read no object",
                with_causes(error)
            ),
            "an image is opened in a fresh instance, perhaps years later: what `run` kept in memory is not there",
            "open the image from the receipt and the objects alone; keep nothing in globals or statics",
        );
    }
    match error {
        ProofError::Open(ImageError::Guest(_))
        | ProofError::NotGivenBack {
            source: ImageError::Guest(_),
            ..
        } => Mistake::new(
            format!("volume {volume}: {}", with_causes(error)),
            "what was claimed could not be restored, so the host refuses the backup",
            "return an error instead of trapping; what the image needs must be in the receipt and the objects",
        ),
        _ => Mistake::new(
            format!("volume {volume}: {}", with_causes(error)),
            "what was claimed could not be restored, so the host refuses the backup",
            "`image.read` gives back exactly the bytes of any range of whole blocks that was claimed, whatever the claims were cut like",
        ),
    }
}

/// An image that reads what another volume's run wrote, and nothing of its own.
fn anothers_object(
    volume: &str,
    backup: &[Conversation],
    image: &[&Conversation],
) -> Option<Mistake> {
    let own: Vec<&str> = backup
        .iter()
        .filter(|it| it.volume.as_deref() == Some(volume))
        .flat_map(created)
        .collect();
    let read = image
        .iter()
        .flat_map(|it| &it.exchanges)
        .filter_map(|it| match &it.call {
            Call::ObjectRead { name, .. } => Some(name.as_str()),
            _ => None,
        });
    let foreign = read.into_iter().find(|name| !own.contains(name))?;
    let owner = backup
        .iter()
        .find(|it| it.volume.is_some() && created(it).any(|name| name == foreign))?;
    let owner = owner.volume.as_deref()?;
    Some(Mistake::new(
        format!(
            "volume {volume}: mixes up two volumes: its image reads the object '{}', which the run on {owner} wrote",
            foreign.escape_debug()
        ),
        format!(
            "a restore of {volume} would write bytes of {owner}, so the host refuses the backup"
        ),
        "put into each receipt the names of that volume's own objects",
    ))
}

fn wrong_bytes(volume: &str, given: &[u8], extent: Extent, exports: &[Export]) -> Option<Mistake> {
    let export = exports.iter().find(|it| it.name() == volume)?;
    let expected = slice(export, extent)?;
    // The host reads more at once than the block that is wrong.
    let given = given.get(..expected.len())?;
    let differing: Vec<usize> = (0..expected.len())
        .filter(|&at| expected[at] != given[at])
        .collect();
    let (&first, count) = (differing.first()?, differing.len());
    let place = extent.start() + first as u64;
    let what = if let Some(other) = exports
        .iter()
        .find(|it| it.name() != volume && slice(it, extent) == Some(given))
    {
        let other = other.name();
        format!("mixes up two volumes: for {extent} its image gives the bytes of {other}")
    } else if let Some(at) = elsewhere(export, extent, given) {
        format!("for {extent} its image gives the bytes of {at}: mixes up two places")
    } else if given.iter().all(|&byte| byte == 0) {
        format!("for {extent} its image gives zeroes")
    } else if count == 1 {
        format!(
            "corrupts one byte: at {place} its image gives 0x{:02x} instead of 0x{:02x}",
            given[first], expected[first]
        )
    } else {
        format!(
            "{count} bytes of {extent} are wrong in what its image gives back, the first at {place}"
        )
    };
    Some(Mistake::new(
        format!("volume {volume}: {what}"),
        "a restore would write wrong bytes, so the host, which reads every claim back, refuses the backup",
        "compare how `run` writes with how `image.read` finds: offsets, lengths, headers between records",
    ))
}

fn slice(export: &Export, extent: Extent) -> Option<&[u8]> {
    export
        .bytes()
        .get(extent.start() as usize..extent.end() as usize)
}

fn elsewhere(export: &Export, extent: Extent, given: &[u8]) -> Option<Extent> {
    let size = export.bytes().len() as u64;
    let all = Extent::between(0, size)?;
    all.pieces(BLOCK_SIZE.into()).find_map(|block| {
        let place = Extent::new(block.start(), extent.len()).ok()?;
        (place != extent && slice(export, place)? == given && given.iter().any(|&byte| byte != 0))
            .then_some(place)
    })
}

/// The host restored other bytes than it proved: never the provider's doing alone.
pub(super) fn restored_otherwise(volume: &str, bytes: &[u8], export: &Export) -> Mistake {
    let pairs = bytes.iter().zip(export.bytes().iter());
    let at = pairs.take_while(|(a, b)| a == b).count();
    Mistake::new(
        format!("volume {volume}: the restored disk differs from byte {at} on"),
        "a committed backup does not restore to the disk as of its point in time",
        "report it: the host should have refused the backup",
    )
}

/// A restore that ends with a finding.
pub(super) fn not_restored(volume: &str, why: &str) -> Mistake {
    Mistake::new(
        format!("volume {volume}: it cannot be restored: {why}"),
        "a backup that was proven when it was made is of no use afterwards",
        "an image depends on nothing but its receipt and objects, and gives the same bytes every time it is asked",
    )
}

/// What an image was asked for in any order, and did not give.
pub(super) fn out_of_order(volume: &str, extent: Extent, how: &str) -> Mistake {
    Mistake::new(
        format!(
            "volume {volume}: depends on call order: asked for {extent} out of order, its image {how}"
        ),
        "a restore of one file or of a part of the disk would fail or be wrong, although a full one works",
        "`image.read` is called in any order, for any whole blocks that were claimed; look each range up and keep no position between calls",
    )
}

/// The dirty bytes that no region of kind zero spares, for the summary.
pub(super) fn data_bytes(export: &Export) -> u64 {
    let dirty = export.dirty();
    let zero: ExtentSet = dirty
        .iter()
        .flat_map(|extent| export.holes().within(extent).collect::<Vec<_>>())
        .collect();
    dirty.bytes() - zero.bytes()
}
