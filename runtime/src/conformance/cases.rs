//! What is tried. Each case makes a VM and an archive of its own.

use super::content::{self, Random};
use super::diagnosis::{self, Mistake};
use super::stand::{Attempt, Made, Stand};
use super::trace::{Conversation, Fault};
use super::{Case, KitError, Need, Needs, Outcome, Subject};
use crate::archive::{BackupId, Manifest, RunContent, VolumeRecord};
use crate::channel::{Answer, Call, Outcome as Ended};
use crate::config::Provider;
use crate::contract::{BitmapMode, ErrorCode, MAX_READ, World, with_causes};
use crate::extent::{Extent, ExtentSet};
use crate::grants::image::ImageError;
use crate::grants::run::RunError;
use crate::job::backup::BackupError;
use crate::job::prove::ProofError;
use crate::job::volume_run::VolumeError;
use crate::simulator::Export;
use std::collections::BTreeMap;
use std::sync::Arc;
use time::OffsetDateTime;

/// Calls that may still be made after the first that was answered `cancelled`: a stream is finished or two, then `run`
/// returns.
const CALLS_AFTER_CANCEL: usize = 4;

/// Requests for claimed ranges of one volume, out of order.
const REQUESTS: usize = 40;

/// Memory limits that are tried, in MiB, until one is enough.
const MEMORY: [u64; 6] = [4, 16, 32, 64, 128, 256];

/// Either is a reason to end a case early: the provider's mistake, or trouble of the kit's.
enum Stop {
    Mistake(Mistake),
    Kit(KitError),
}

impl From<Mistake> for Stop {
    fn from(mistake: Mistake) -> Self {
        Self::Mistake(mistake)
    }
}

impl<E: Into<KitError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Kit(error.into())
    }
}

type Tried = Result<Outcome, Stop>;

/// Tries one case.
pub(super) async fn attempt(
    subject: &Subject,
    case: Case,
    needs: &mut Option<Needs>,
) -> Result<Outcome, KitError> {
    let tried = match case {
        Case::Full => full(subject).await,
        Case::Incremental => incremental(subject).await,
        Case::Unchanged => unchanged(subject).await,
        Case::Resized => resized(subject).await,
        Case::BaseGone => base_gone(subject).await,
        Case::AnyOrder => any_order(subject).await,
        Case::Reproducible => reproducible(subject).await,
        Case::FailingCalls => failing_calls(subject).await,
        Case::FailingRestore => failing_restore(subject).await,
        Case::Cancelled => cancelled(subject).await,
        Case::Limits => limits(subject).await,
        Case::BadSector => bad_sector(subject).await,
        Case::Grants => grants(subject, needs).await,
    };
    match tried {
        Ok(outcome) => Ok(outcome),
        Err(Stop::Mistake(mistake)) => Ok(Outcome::Failed {
            mistakes: vec![mistake],
        }),
        Err(Stop::Kit(error)) => Err(error),
    }
}

fn passed(detail: impl Into<String>) -> Outcome {
    Outcome::Passed {
        detail: detail.into(),
    }
}

/// Passed with `detail`, unless there were mistakes.
fn judged(mistakes: Vec<Mistake>, detail: impl Into<String>) -> Tried {
    Ok(match mistakes.is_empty() {
        true => passed(detail),
        false => Outcome::Failed { mistakes },
    })
}

/// A backup that has to commit, and its manifest.
async fn good(stand: &mut Stand<'_>) -> Result<(Made, Arc<Manifest>), Stop> {
    let made = stand.backup().await?;
    let manifest = committed(&made)?;
    Ok((made, manifest))
}

fn committed(made: &Made) -> Result<Arc<Manifest>, Stop> {
    match made.own_failure() {
        Some(error) => Err(error.into()),
        None => Ok(Arc::clone(made.committed()?)),
    }
}

async fn full(subject: &Subject) -> Tried {
    let mut stand = Stand::new(subject, content::several(subject.seed))?;
    let (made, manifest) = good(&mut stand).await?;
    stand.restore(&made, &manifest).await?;
    let data: u64 = made.exports.iter().map(diagnosis::data_bytes).sum();
    Ok(passed(format!(
        "{} volumes with {data} bytes of data, restored byte for byte",
        made.exports.len()
    )))
}

async fn incremental(subject: &Subject) -> Tried {
    let mut stand = Stand::new(subject, content::several(subject.seed))?;
    let mut backups = vec![good(&mut stand).await?];
    for round in 1..=2 {
        content::change(&mut stand.disks, subject.seed ^ round);
        let (made, manifest) = good(&mut stand).await?;
        if let Some(full) = volumes(&manifest).find(|it| it.mode != BitmapMode::Reuse) {
            return Err(Stop::Kit(KitError::Host(format!(
                "volume {} was read in full: {:?}",
                full.name, full.fallback
            ))));
        }
        backups.push((made, manifest));
    }
    for (made, manifest) in &backups {
        stand.restore(made, manifest).await?;
    }
    let dirty: u64 = backups[1..]
        .iter()
        .flat_map(|(_, manifest)| volumes(manifest))
        .map(|it| it.dirty_bytes)
        .sum();
    Ok(passed(format!(
        "2 rounds, {dirty} bytes changed; all 3 backups restored byte for byte"
    )))
}

fn volumes(manifest: &Manifest) -> impl Iterator<Item = &VolumeRecord> {
    manifest.record.volumes.iter()
}

async fn unchanged(subject: &Subject) -> Tried {
    let mut stand = Stand::new(subject, content::several(subject.seed))?;
    good(&mut stand).await?;
    let (made, manifest) = good(&mut stand).await?;
    stand.restore(&made, &manifest).await?;
    let dirty: u64 = volumes(&manifest).map(|it| it.dirty_bytes).sum();
    Ok(passed(format!(
        "{dirty} bytes to back up; restored byte for byte"
    )))
}

async fn resized(subject: &Subject) -> Tried {
    let mut stand = Stand::new(subject, content::several(subject.seed))?;
    let first = good(&mut stand).await?;
    let grown = stand.disks[0].size() + 200_001;
    stand.disks[0].resize(grown);
    stand.disks[0].write(grown - 3, b"end");
    let shrunk = stand.disks[1].size() - 300_003;
    stand.disks[1].resize(shrunk);
    let second = good(&mut stand).await?;
    for (made, manifest) in [&first, &second] {
        stand.restore(made, manifest).await?;
    }
    Ok(passed(
        "one disk grown, one shrunk; both backups restored byte for byte",
    ))
}

async fn base_gone(subject: &Subject) -> Tried {
    let mut stand = Stand::new(subject, content::several(subject.seed))?;
    let (_, base) = good(&mut stand).await?;
    stand.forget(&base)?;
    content::change(&mut stand.disks, subject.seed);
    let (made, manifest) = good(&mut stand).await?;
    stand.restore(&made, &manifest).await?;
    Ok(passed("everything read again and restored byte for byte"))
}

async fn any_order(subject: &Subject) -> Tried {
    let mut stand = Stand::new(subject, content::several(subject.seed))?;
    let mut backups = vec![good(&mut stand).await?];
    content::change(&mut stand.disks, subject.seed);
    backups.push(good(&mut stand).await?);
    let mut random = Random::new(subject.seed);
    let mut asked = 0;
    for (made, manifest) in &backups {
        for (volume, export) in volumes(manifest).zip(&made.exports) {
            let claimed = claimed(&stand, manifest, volume)?;
            if claimed.is_empty() {
                continue;
            }
            let block = volume.root.block_size();
            let mut requests = requests(&claimed, block, &mut random);
            random.shuffle(&mut requests);
            asked += requests.len();
            read_back(&stand, manifest, export, &requests).await?;
        }
    }
    if asked == 0 {
        return Ok(Outcome::NotTried {
            reason: "nothing is claimed: the host restores everything by itself".into(),
        });
    }
    Ok(passed(format!(
        "{asked} ranges of {} backups read in any order",
        backups.len()
    )))
}

/// What one volume claimed in this very backup.
fn claimed(
    stand: &Stand<'_>,
    manifest: &Manifest,
    volume: &VolumeRecord,
) -> Result<ExtentSet, KitError> {
    let root = volume.root;
    let block = u64::from(root.block_size());
    let mut set = ExtentSet::new();
    for run in stand.namespace().table(root).entries(0..root.blocks())? {
        let run = run?;
        if matches!(run.content, RunContent::Claimed { backup, .. } if backup == manifest.backup)
            && let Some(extent) = Extent::between(
                run.blocks.start * block,
                (run.blocks.end * block).min(root.size()),
            )
        {
            set.insert(extent);
        }
    }
    Ok(set)
}

/// Whole blocks within what was claimed, of any length up to what is read at once; the last ones always among them.
fn requests(claimed: &ExtentSet, block: u32, random: &mut Random) -> Vec<Extent> {
    let runs: Vec<Extent> = claimed.iter().collect();
    let block = u64::from(block);
    let mut requests = Vec::new();
    for turn in 0..REQUESTS {
        let run = match turn {
            0 => runs[runs.len() - 1],
            _ => runs[random.below(runs.len() as u64) as usize],
        };
        let blocks = run.len().div_ceil(block);
        let most = (u64::from(MAX_READ) / block).min(blocks);
        let count = 1 + random.below(most);
        let first = match turn {
            0 => blocks - count,
            _ => random.below(blocks - count + 1),
        };
        let start = run.start() + first * block;
        requests.extend(Extent::between(
            start,
            (start + count * block).min(run.end()),
        ));
    }
    requests
}

async fn read_back(
    stand: &Stand<'_>,
    manifest: &Manifest,
    export: &Export,
    requests: &[Extent],
) -> Result<(), Stop> {
    let name = export.name();
    let mistake = |extent, how: String| diagnosis::out_of_order(name, extent, &how);
    let first = requests[0];
    let mut image = stand.open_image(manifest, name).await.map_err(|error| {
        mistake(
            first,
            format!("could not be opened: {}", with_causes(&error)),
        )
    })?;
    for &extent in requests {
        match image.read(extent).await {
            Ok(bytes)
                if bytes[..] == export.bytes()[extent.start() as usize..extent.end() as usize] => {}
            Ok(_) => {
                return Err(mistake(extent, "gives other bytes than the disk held".into()).into());
            }
            Err(error) => {
                let how = format!("does not give it: {}", with_causes(&error));
                return Err(mistake(extent, how).into());
            }
        }
    }
    image.close().await;
    Ok(())
}

async fn reproducible(subject: &Subject) -> Tried {
    let ids = [
        BackupId::random(OffsetDateTime::now_utc())?,
        BackupId::random(OffsetDateTime::now_utc())?,
    ];
    let mut twice = Vec::new();
    for _ in 0..2 {
        let mut stand = Stand::new(subject, content::several(subject.seed))?;
        let mut backups = Vec::new();
        for id in ids {
            let made = stand
                .attempt(&Attempt {
                    id: Some(id),
                    ..subject.attempt()
                })
                .await?;
            let manifest = committed(&made)?;
            backups.push((made, manifest));
            content::change(&mut stand.disks, subject.seed);
        }
        twice.push(backups);
    }
    let pairs = twice[0].iter().zip(&twice[1]);
    for (kind, (one, other)) in ["full", "incremental"].iter().zip(pairs) {
        same(kind, one, other)?;
    }
    let objects: usize = twice[0].iter().map(|(_, it)| it.objects.len()).sum();
    Ok(passed(format!(
        "the same calls, receipts and {objects} objects twice"
    )))
}

type Backup = (Made, Arc<Manifest>);

fn same(kind: &str, one: &Backup, other: &Backup) -> Result<(), Mistake> {
    const MEANS: &str = "what cannot be made again cannot be compared, and deduplicates badly";
    const REMEDY: &str = "let nothing but the volume, the settings and the base decide: no address of memory, no order of a hash table, no time";
    for volume in volumes(&one.1) {
        let name = &volume.name;
        let (calls, again) = (calls(&one.0, name), calls(&other.0, name));
        let differs = calls.iter().zip(&again).position(|(a, b)| a != b);
        let at = differs.or((calls.len() != again.len()).then(|| calls.len().min(again.len())));
        if let Some(at) = at {
            let shown =
                |calls: &[String]| calls.get(at).map_or("nothing", String::as_str).to_owned();
            return Err(Mistake::new(
                format!(
                    "volume {name}, {kind}: of two runs on the same disk call {} is {} in one and {} in the other",
                    at + 1,
                    shown(&calls),
                    shown(&again)
                ),
                MEANS,
                REMEDY,
            ));
        }
        let receipt = volumes(&other.1)
            .find(|it| it.name == *name)
            .map(|it| &it.receipt);
        if receipt != Some(&volume.receipt) {
            return Err(Mistake::new(
                format!(
                    "volume {name}, {kind}: two runs on the same disk return different receipts"
                ),
                MEANS,
                REMEDY,
            ));
        }
    }
    for (object, again) in one.1.objects.iter().zip(&other.1.objects) {
        if object != again {
            return Err(Mistake::new(
                format!(
                    "{kind}: the object '{}' has other bytes the second time, although the disks are the same",
                    object.name
                ),
                MEANS,
                REMEDY,
            ));
        }
    }
    Ok(())
}

fn calls(made: &Made, volume: &str) -> Vec<String> {
    let run = made.run(volume);
    let exchanges = run.iter().flat_map(|it| &it.exchanges);
    exchanges
        .map(|it| &it.call)
        .filter(|call| !matches!(call, Call::Log { .. }))
        .map(|call| format!("{call:?}"))
        .collect()
}

/// A good backup of one small disk, to know which calls are made.
async fn model(subject: &Subject) -> Result<Made, Stop> {
    let mut stand = Stand::new(subject, content::one(subject.seed))?;
    Ok(good(&mut stand).await?.0)
}

/// How often each call that can fail was made.
fn counted<'t>(
    conversations: impl Iterator<Item = &'t Conversation>,
) -> BTreeMap<&'static str, u32> {
    let mut counts = BTreeMap::new();
    for exchange in conversations.flat_map(|it| &it.exchanges) {
        if exchange.call.can_fail() {
            *counts.entry(exchange.call.name()).or_default() += 1;
        }
    }
    counts
}

/// The first and the last of a number of calls.
fn ends(count: u32) -> Vec<u32> {
    let mut ends = vec![0, count.saturating_sub(1)];
    ends.dedup();
    ends
}

/// A backup of one small disk in which something fails; where it commits all the same, it has to restore.
async fn with(
    subject: &Subject,
    attempt: &Attempt,
) -> Result<Result<(), (Made, BackupError)>, Stop> {
    let mut stand = Stand::new(subject, content::one(subject.seed))?;
    let mut made = stand.attempt(attempt).await?;
    if let Some(error) = made.own_failure() {
        return Err(error.into());
    }
    match std::mem::replace(
        &mut made.result,
        Err(BackupError::Cancelled { left: false }),
    ) {
        Ok(manifest) => {
            stand.restore(&made, &manifest).await?;
            Ok(Ok(()))
        }
        Err(error) => Ok(Err((made, error))),
    }
}

async fn failing_calls(subject: &Subject) -> Tried {
    let model = model(subject).await?;
    let runs = model.trace.iter().filter(|it| it.volume.is_some());
    let mut mistakes = Vec::new();
    let mut tried = 0;
    for (call, count) in counted(runs) {
        for after in ends(count) {
            tried += 1;
            let attempt = Attempt {
                fault: Some(Fault {
                    call: Some(call),
                    after,
                    lasting: false,
                    code: ErrorCode::Io,
                }),
                ..subject.attempt()
            };
            let when = format!("when call {} of `{call}` failed with `io`", after + 1);
            if let Err((_, error)) = with(subject, &attempt).await? {
                mistakes.extend(after_a_refusal(&when, &error));
            }
        }
    }
    judged(
        mistakes,
        format!("{tried} calls failed with `io`; each error was passed on"),
    )
}

/// What a provider makes of a call that failed: to give up with an error, or to try again, is right.
fn after_a_refusal(when: &str, error: &BackupError) -> Option<Mistake> {
    let (what, remedy) = match error {
        BackupError::Volume {
            source: VolumeError::Run(error),
            ..
        } => match error {
            RunError::GaveUp(_) => return None,
            RunError::Guest(text) => (
                text.clone(),
                "return the error as it came instead of trapping",
            ),
            RunError::Uncovered { first, .. } => (
                format!("`run` returned success, but {first} is in no finished object"),
                "look at what every call returns, and return its error from `run`",
            ),
            RunError::WallTime { seconds } => (
                format!("`run` did not return within {seconds} s"),
                "a call that fails may be tried again once or twice, not for ever",
            ),
            error => (with_causes(error), "return the error as it came"),
        },
        BackupError::Proof { source, .. } => (
            format!("`run` returned success, but {}", with_causes(source)),
            "claim only what was written: look at what every call returns",
        ),
        error => (with_causes(error), "return the error as it came"),
    };
    Some(Mistake::new(
        format!("{when}, {what}"),
        "the operator would not learn why there is no backup",
        remedy,
    ))
}

async fn failing_restore(subject: &Subject) -> Tried {
    let model = model(subject).await?;
    let images = model.trace.iter().filter(|it| it.volume.is_none());
    let counts = counted(images);
    if counts.is_empty() {
        return Ok(Outcome::NotTried {
            reason: "no image reads an object".into(),
        });
    }
    let mut mistakes = Vec::new();
    let mut tried = 0;
    for (call, count) in counts {
        for after in ends(count) {
            tried += 1;
            let attempt = Attempt {
                fault: Some(Fault {
                    call: Some(call),
                    after,
                    lasting: false,
                    code: ErrorCode::Io,
                }),
                ..subject.attempt()
            };
            let Err((_, error)) = with(subject, &attempt).await? else {
                continue;
            };
            let BackupError::Proof { source, .. } = &error else {
                continue;
            };
            let said = match source {
                ProofError::Open(ImageError::Answered(_))
                | ProofError::NotGivenBack {
                    source: ImageError::Answered(_),
                    ..
                } => continue,
                source => with_causes(source),
            };
            mistakes.push(Mistake::new(
                format!("when call {} of `{call}` failed with `io`: {said}", after + 1),
                "whoever restores would be told of a broken provider instead of a broken archive",
                "return the error from `image.open` or `image.read` as it came; never make bytes up",
            ));
        }
    }
    judged(
        mistakes,
        format!("{tried} reads of objects failed with `io`; each error was passed on"),
    )
}

async fn cancelled(subject: &Subject) -> Tried {
    let model = model(subject).await?;
    let runs = model.trace.iter().filter(|it| it.volume.is_some());
    let calls: u32 = counted(runs).values().sum();
    let mut points = vec![0, calls / 2];
    points.dedup();
    // Told so and left to go on, which shows what it makes of it, and really cancelled, which leaves it a moment.
    let told = points.iter().map(|&after| {
        let fault = Fault {
            call: None,
            after,
            lasting: true,
            code: ErrorCode::Cancelled,
        };
        (after, Some(fault), None)
    });
    let really = points.iter().map(|&after| (after, None, Some(after)));
    let mut mistakes = Vec::new();
    for (after, fault, cut) in told.chain(really) {
        let attempt = Attempt {
            fault,
            cut,
            ..subject.attempt()
        };
        let when = match cut {
            None => format!("when the job was cancelled at call {}", after + 1),
            Some(_) => format!(
                "when the job was cancelled in the midst of call {}",
                after + 1
            ),
        };
        let Err((made, error)) = with(subject, &attempt).await? else {
            continue;
        };
        match cut {
            None => mistakes.extend(after_a_refusal(&when, &error)),
            Some(_) => mistakes.extend(after_a_cancel(&when, &made)),
        }
        let refused = made
            .trace
            .iter()
            .flat_map(|it| &it.exchanges)
            .filter(|it| matches!(&it.answer, Some(Answer::Error(ErrorCode::Cancelled))));
        let refused = refused.count();
        if refused > CALLS_AFTER_CANCEL {
            mistakes.push(Mistake::new(
                format!("{when}, `run` made {refused} more calls before it returned"),
                "a cancelled job takes longer than it has to, and the guest pays for its snapshot all the while",
                "return at the first call that fails with `cancelled`",
            ));
        }
    }
    judged(
        mistakes,
        format!(
            "cancelled at {} points, and told so at as many; `run` returned promptly",
            points.len()
        ),
    )
}

/// A run that was really cancelled. One that does not return in time is ended, which is no mistake: it may be slow.
fn after_a_cancel(when: &str, made: &Made) -> Option<Mistake> {
    let mut exchanges = made.trace.iter().flat_map(|it| &it.exchanges);
    let failure = exchanges.find_map(|exchange| match &exchange.call {
        Call::Done(Ended::Failed(failure)) => Some(failure),
        _ => None,
    })?;
    Some(Mistake::new(
        format!("{when}, {}", with_causes(failure)),
        "the operator would be told of a broken provider instead of a cancelled job",
        "return the error as it came instead of trapping",
    ))
}

async fn limits(subject: &Subject) -> Tried {
    let model = model(subject).await?;
    let used = Used::of(&model);
    let mut mistakes = Vec::new();
    let mut tried = Vec::new();
    let short = |amount: u64| amount.checked_sub(1);
    let used = [
        ("objects", u64::from(used.objects)),
        ("output-bytes", used.output),
        ("read-bytes", used.read),
    ];
    for (name, used) in used {
        // What is not used has no limit that is one short of it.
        let Some(limit) = short(used) else {
            continue;
        };
        tried.push(name);
        let mut attempt = subject.attempt();
        let limits = &mut attempt.provider.limits;
        match name {
            "objects" => limits.objects = limit as u32,
            "output-bytes" => limits.output_bytes = limit,
            _ => limits.read_bytes = limit,
        }
        if let Err((_, error)) = with(subject, &attempt).await? {
            let when = format!("under a limit of {limit} {name}");
            mistakes.extend(after_a_refusal(&when, &error));
        }
    }
    judged(
        mistakes,
        format!("{}: each error was passed on", tried.join(", ")),
    )
}

/// What a run charged.
#[derive(Debug, Default)]
struct Used {
    objects: u32,
    output: u64,
    read: u64,
}

impl Used {
    fn of(made: &Made) -> Self {
        let mut used = Self::default();
        for exchange in made.trace.iter().flat_map(|it| &it.exchanges) {
            if matches!(exchange.answer, None | Some(Answer::Error(_))) {
                continue;
            }
            match &exchange.call {
                Call::Create { .. } => used.objects += 1,
                Call::Put(range, _) | Call::Splice { range, .. } => {
                    used.output += range.length;
                    used.read += range.length;
                }
                Call::Write { length, .. } => used.output += u64::from(*length),
                Call::Read { length, .. } => used.read += u64::from(*length),
                _ => {}
            }
        }
        used
    }
}

async fn bad_sector(subject: &Subject) -> Tried {
    let mut stand = Stand::new(subject, content::one(subject.seed))?;
    let bad = Extent::new(700_000, 512).map_err(|_| KitError::Own("a constant is no range"))?;
    let attempt = Attempt {
        bad_sector: Some(bad),
        ..subject.attempt()
    };
    let made = stand.attempt(&attempt).await?;
    let ends = made.trace.iter().flat_map(|it| &it.exchanges);
    for exchange in ends {
        if let Call::Done(Ended::Failed(failure)) = &exchange.call {
            return Err(Mistake::new(
                format!(
                    "when the disk could not be read at {bad}, {}",
                    with_causes(failure)
                ),
                "the operator would be told of a broken provider instead of a broken disk",
                "return the error as it came instead of trapping",
            )
            .into());
        }
    }
    if made.result.is_ok() || stand.backups()? != 0 {
        return Err(Stop::Kit(KitError::Host(
            "a backup of a disk that cannot be read was committed".into(),
        )));
    }
    let (made, manifest) = good(&mut stand).await?;
    stand.restore(&made, &manifest).await?;
    Ok(passed(
        "no backup while a sector is bad; the next one restored byte for byte",
    ))
}

async fn grants(subject: &Subject, needs: &mut Option<Needs>) -> Tried {
    let model = model(subject).await?;
    let mut mistakes = Vec::new();
    let world = subject.component.world;
    let reader = match world {
        World::BlindProvider => Need::Unused,
        World::Provider => {
            let used = has_call(&model, |call| matches!(call, Call::Read { .. }));
            let (need, mistake) =
                withheld(subject, "reader", used, |it| it.grant.read = false).await?;
            mistakes.extend(mistake);
            need
        }
    };
    let used = has_call(&model, |call| matches!(call, Call::Discard(_)));
    let (discarder, mistake) =
        withheld(subject, "discarder", used, |it| it.grant.discard = false).await?;
    mistakes.extend(mistake);
    // The host discards nothing by itself then, which no provider may notice.
    let mut attempt = subject.attempt();
    attempt.provider.grant.trim_finished = false;
    if let Err((made, error)) = with(subject, &attempt).await? {
        mistakes.push(diagnosis::failed(&error, &made.exports, &made.trace));
    }
    let memory = least_memory(subject).await?;
    let found = Needs {
        world,
        reader,
        discarder,
        objects: Used::of(&model).objects,
        memory,
    };
    if mistakes.is_empty() {
        *needs = Some(found);
    }
    judged(mistakes, "each handle withheld once; see what it needs")
}

fn has_call(made: &Made, is: impl Fn(&Call) -> bool) -> bool {
    let exchanges = made.trace.iter().flat_map(|it| &it.exchanges);
    exchanges.map(|it| &it.call).any(is)
}

async fn withheld(
    subject: &Subject,
    handle: &str,
    used: bool,
    withhold: impl Fn(&mut Provider),
) -> Result<(Need, Option<Mistake>), Stop> {
    let mut attempt = subject.attempt();
    withhold(&mut attempt.provider);
    Ok(match with(subject, &attempt).await? {
        Ok(()) if used => (Need::Used, None),
        Ok(()) => (Need::Unused, None),
        Err((_, error)) => {
            let when = format!("without a {handle}");
            (Need::Required, after_a_refusal(&when, &error))
        }
    })
}

/// The smallest limit that is enough. Passing it is no mistake: the host ends the instance.
async fn least_memory(subject: &Subject) -> Result<Option<u64>, Stop> {
    for limit in MEMORY.map(|mib| mib << 20) {
        if limit > subject.provider.limits.memory {
            break;
        }
        let mut attempt = subject.attempt();
        attempt.provider.limits.memory = limit;
        if with(subject, &attempt).await?.is_ok() {
            return Ok(Some(limit));
        }
    }
    Ok(None)
}
