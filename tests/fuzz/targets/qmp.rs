//! Lines as a QMP monitor sends them, and everything that asks one what there is.
//!
//! What must hold: no panic and no hang, whatever an answer says.

#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use fleecebox::qemu::{Choice, Monitor, Schema, bitmap, leftovers, machine};
use fleecebox_fuzz::{json, runtime};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Keys, and texts that decide something.
const WORDS: &[&str] = &[
    "QMP",
    "return",
    "error",
    "class",
    "desc",
    "id",
    "event",
    "data",
    "timestamp",
    "name",
    "meta-type",
    "arg-type",
    "members",
    "command",
    "object",
    "device",
    "qdev",
    "inserted",
    "node-name",
    "drv",
    "driver",
    "ro",
    "file",
    "image",
    "virtual-size",
    "format-specific",
    "compat",
    "0.10",
    "qcow2",
    "raw",
    "dirty-bitmaps",
    "granularity",
    "count",
    "recording",
    "busy",
    "persistent",
    "inconsistent",
    "status",
    "running",
    "type",
    "offset",
    "actual-size",
    "filename",
    "/machine/peripheral/scsi0",
    "scsi0",
    "scsi-block",
    "scsi-hd",
    "drive-scsi0",
    "CommandNotFound",
    "GenericError",
    "JOB_STATUS_CHANGE",
    "shutting-down",
    "paused",
    "backup",
    "write-threshold",
    "removable",
    "locked",
    "io-status",
    "encrypted",
    "children",
    "fbx-0123456789abcdef-sa0",
    "fbx-0123456789abcdef-fl0",
    "fbx-0123456789abcdef-x0",
    "fbx-0123456789abcdef-job0",
];

#[derive(Debug)]
struct Case {
    greeting: Option<Vec<u8>>,
    questions: Vec<Question>,
    lines: Vec<Line>,
}

#[derive(Debug)]
enum Line {
    /// The answer to the command at hand.
    Answer(Value),
    Refusal(Value),
    Event(Value),
    Other(Value),
    Bytes(Vec<u8>),
}

#[derive(Debug, Arbitrary)]
enum Question {
    Schema,
    AllDisks,
    NamedDisks,
    Leftovers,
    Bitmaps,
    RunState,
}

impl<'a> Arbitrary<'a> for Line {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u.int_in_range(0..=7)? {
            0 => Self::Bytes(u.arbitrary()?),
            1 => Self::Other(json::value(u, WORDS)?),
            2 => Self::Event(json::value(u, WORDS)?),
            3 => Self::Refusal(json::value(u, WORDS)?),
            _ => Self::Answer(json::value(u, WORDS)?),
        })
    }
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            greeting: if u.ratio(1, 8)? {
                Some(u.arbitrary()?)
            } else {
                None
            },
            questions: u.arbitrary()?,
            lines: u.arbitrary()?,
        })
    }
}

fuzz_target!(|case: Case| {
    runtime::run(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets can be made");
        tokio::join!(client(&case, ours), server(&case, theirs));
    });
});

async fn client(case: &Case, stream: UnixStream) {
    let Ok(monitor) = Monitor::over(stream, "monitor").await else {
        return;
    };
    for question in case.questions.iter().take(8) {
        match question {
            Question::Schema => {
                if let Ok(schema) = Schema::probe(&monitor).await {
                    schema.command_has_argument("backup", "filename");
                }
            }
            Question::AllDisks => {
                let _ = machine::disks(&monitor, &Choice::All).await;
            }
            Question::NamedDisks => {
                let choice = Choice::Named(vec!["scsi0".into(), "drive-scsi0".into()]);
                if let Err(error) = machine::disks(&monitor, &choice).await {
                    let _ = error.to_string();
                }
            }
            Question::Leftovers => drop(leftovers::find(&monitor).await),
            Question::Bitmaps => drop(bitmap::find(&monitor).await),
            Question::RunState => drop(machine::run_state(&monitor).await),
        }
    }
}

/// Answers commands in turn, then hangs up.
async fn server(case: &Case, stream: UnixStream) {
    let (hear, mut say) = stream.into_split();
    let mut hear = BufReader::new(hear);
    if let Some(bytes) = &case.greeting {
        let _ = say.write_all(&[bytes, &b"\n"[..]].concat()).await;
    } else if say.write_all(b"{\"QMP\":{}}\n").await.is_ok()
        && let Some(id) = command(&mut hear).await
    {
        let _ = say
            .write_all(format!("{{\"return\":{{}},\"id\":{id}}}\n").as_bytes())
            .await;
    }
    let mut lines = case.lines.iter();
    'commands: while let Some(id) = command(&mut hear).await {
        for line in lines.by_ref() {
            let (text, answered) = match line {
                Line::Answer(value) => (format!("{{\"return\":{value},\"id\":{id}}}"), true),
                Line::Refusal(value) => (format!("{{\"error\":{value},\"id\":{id}}}"), true),
                Line::Event(value) => (format!("{{\"event\":\"X\",\"data\":{value}}}"), false),
                Line::Other(value) => (value.to_string(), false),
                Line::Bytes(bytes) => {
                    if say.write_all(&[bytes, &b"\n"[..]].concat()).await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            if say.write_all(format!("{text}\n").as_bytes()).await.is_err() {
                return;
            }
            // An error of the wrong form is not taken for an answer.
            if answered && !matches!(line, Line::Refusal(error) if !is_refusal(error)) {
                continue 'commands;
            }
        }
        return;
    }
}

fn is_refusal(error: &Value) -> bool {
    error.is_object()
        && ["class", "desc"]
            .iter()
            .all(|&key| error.get(key).is_none_or(Value::is_string))
}

/// The id of the next command.
async fn command(hear: &mut (impl AsyncBufReadExt + Unpin)) -> Option<Value> {
    let mut line = String::new();
    if hear.read_line(&mut line).await.ok()? == 0 {
        return None;
    }
    let command: Value = serde_json::from_str(&line).expect("the product sends JSON");
    Some(command["id"].clone())
}
