//! Running a component against a recording in place of a host: until it asks something else.

use super::Payload;
use super::read::{Recorded, Step};
use crate::channel::{Answer, Call, Order};
use crate::contract::{LogLevel, World, with_causes};
use crate::sandbox::{self, Compiled, Program};
use serde::Serialize;

/// What became of one recorded process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replayed {
    /// What it was for.
    pub process: Process,
    /// Calls that were as recorded. Lines of the log are not counted: they may differ.
    pub same_calls: u64,
    /// How it ended, as recorded and now; none where the recording ends first.
    pub end: Option<String>,
    /// Where it first went another way.
    pub difference: Option<Difference>,
    /// Whether it was given zeroes in place of bytes that the recording does not hold.
    pub withheld: bool,
}

/// What a process was for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Process {
    /// A run of this volume.
    Run(String),
    /// An opened image.
    Image,
}

/// The first call that is not as it was recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The recorded one, in the words of the recording.
    pub recorded: String,
    /// What the component does now.
    pub now: String,
}

/// Why a recording cannot be replayed with a component.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// It is of another kind than the recorded one.
    #[error(
        "the component's world is {}, and the recorded one's was {}",
        .component.name(),
        .recorded.name()
    )]
    World {
        /// The component's.
        component: World,
        /// The recorded one's.
        recorded: World,
    },
    /// The sandbox.
    #[error("the provider's sandbox")]
    Sandbox(#[from] sandbox::Error),
}

/// Runs the component as `recorded` and gives it the recorded answers. `log` gets what it logs.
pub async fn replay(
    recorded: &Recorded,
    program: &Program,
    (compiled, world): (&Compiled, World),
    mut log: impl FnMut(LogLevel, &str),
) -> Result<Replayed, ReplayError> {
    let (process, was) = match &recorded.order {
        Order::Run(run) => (Process::Run(run.volume.name.clone()), run.world),
        _ => (Process::Image, World::Provider),
    };
    if was != world {
        return Err(ReplayError::World {
            component: world,
            recorded: was,
        });
    }
    let mut replayed = Replayed {
        process,
        same_calls: 0,
        end: None,
        difference: None,
        withheld: false,
    };
    let mut sandbox = sandbox::Process::start(program, &recorded.order, &compiled.file).await?;
    for step in &recorded.steps {
        let (call, payload, answer) = match step {
            Step::Ask(read) => {
                sandbox.read_image(*read)?;
                continue;
            }
            Step::Call {
                call: Call::Log { .. },
                ..
            } => continue,
            Step::Call {
                call,
                payload,
                answer,
            } => (call, payload, answer),
        };
        let now = loop {
            match sandbox.next().await? {
                Call::Log { level, message } => {
                    log(level, &message);
                    sandbox.answer(&Answer::Unit)?;
                }
                call => break call,
            }
        };
        let difference = match &now == call {
            false => Some(Difference {
                recorded: words(call),
                now: words(&now),
            }),
            true => match payload {
                Some(payload) => other_bytes(call, payload, &sandbox)?,
                None => None,
            },
        };
        if difference.is_some() {
            replayed.difference = difference;
            break;
        }
        replayed.same_calls += 1;
        if let Call::Done(outcome) = call {
            replayed.end = Some(ending(outcome));
        }
        let Some((answer, payload)) = answer else {
            continue;
        };
        if let Some(payload) = payload {
            replayed.withheld |= matches!(payload, Payload::Withheld(_));
            sandbox.give_payload(&payload.bytes())?;
        }
        sandbox.answer(answer)?;
    }
    sandbox.kill().await;
    Ok(replayed)
}

/// The bytes of a call beside the recorded ones, where these are known.
fn other_bytes(
    call: &Call,
    recorded: &Payload,
    sandbox: &sandbox::Process,
) -> Result<Option<Difference>, sandbox::Error> {
    if matches!(recorded, Payload::Withheld(_)) {
        return Ok(None);
    }
    let (expected, now) = (recorded.bytes(), sandbox.take_payload(recorded.length())?);
    let at = expected.iter().zip(&now).position(|(a, b)| a != b);
    Ok(at.map(|at| Difference {
        recorded: format!("{}, byte {at} of it {:#04x}", words(call), expected[at]),
        now: format!("the same with {:#04x} there", now[at]),
    }))
}

impl Payload {
    /// Zeroes in place of what was withheld.
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Zero(length) | Self::Withheld(length) => vec![0; *length as usize],
            Self::Hex(bytes) => bytes.clone(),
        }
    }
}

fn words(call: &Call) -> String {
    // All keys are strings and no value refuses to be written.
    serde_json::to_string(call).unwrap_or_default()
}

fn ending(outcome: &crate::channel::Outcome) -> String {
    use crate::channel::Outcome;
    match outcome {
        Outcome::GuestError(code) => format!("the provider gave up: {}", with_causes(code)),
        Outcome::Failed(failure) => format!("the provider failed: {}", with_causes(failure)),
        Outcome::Receipt(receipt) => format!("a receipt of {} bytes", receipt.len()),
        Outcome::Opened => "the image is open".into(),
        Outcome::Bytes { length } => format!("{length} bytes"),
        Outcome::Compiled { .. } => "compiled".into(),
        Outcome::Fits => "fits".into(),
    }
}
