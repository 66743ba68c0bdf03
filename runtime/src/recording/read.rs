//! Reading a recording, which comes from somebody else's machine: anything may be in it.

use super::{FORMAT, Header, Line, MAX_RECORDING, Payload, carried_by_answer, carried_by_call};
use crate::channel::{self, Answer, Bounds, Call, ImageRead, Order};
use crate::contract::with_causes;
use std::io::{self, BufRead, Read};
use std::time::Duration;

/// Longest line, in bytes: a payload's or a receipt's digits, and what stands around them.
const MAX_LINE: u64 = 2 * channel::Payload::TRANSFER_SIZE + (1 << 20);

/// Most memory that a recorded order may give, in bytes: all that 32 bits reach.
const MAX_MEMORY: u64 = 4 << 30;

/// Most processor time that it may give.
const MAX_TIME: Duration = Duration::from_secs(3600);

/// What a recording holds.
#[derive(Debug)]
pub struct Recording {
    /// The first line.
    pub header: Header,
    /// In the order in which they were started.
    pub processes: Vec<Recorded>,
    /// Why it ends before the job did.
    pub cut: Option<String>,
}

/// One sandbox process, from its order on.
#[derive(Debug)]
pub struct Recorded {
    /// A run or an opened image, within what a host gives.
    pub order: Order,
    pub(super) steps: Vec<Step>,
    awaited: Awaited,
}

/// What happened in a process, in this order.
#[derive(Debug)]
pub(super) enum Step {
    /// A call, and its answer if the process got one.
    Call {
        call: Call,
        payload: Option<Payload>,
        answer: Option<(Answer, Option<Payload>)>,
    },
    /// The image was asked for bytes.
    Ask(ImageRead),
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Call,
    Answer,
    Ask,
}

/// Why a file is no recording.
#[derive(Debug, thiserror::Error)]
pub enum BadRecording {
    /// It cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it is no recording: {0}")]
    Header(String),
    /// It is a recording, and damaged.
    #[error("line {line}: {what}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// One line.
        what: String,
    },
}

impl Recording {
    /// Reads all of it. One that ends within a line was cut there.
    pub fn read(file: &mut impl BufRead) -> Result<Self, BadRecording> {
        let mut file = file.take(MAX_RECORDING + MAX_LINE);
        let first = line(&mut file)?.unwrap_or_default();
        let header: Header = serde_json::from_slice(&first).map_err(|error| {
            BadRecording::Header(format!("its first line: {}", with_causes(&error)))
        })?;
        if header.fleecebox_recording != FORMAT {
            return Err(BadRecording::Header(format!(
                "it is of format {}, made by {}; this program reads format {FORMAT}",
                header.fleecebox_recording,
                header.program.escape_debug()
            )));
        }
        let mut recording = Self {
            header,
            processes: Vec::new(),
            cut: None,
        };
        let mut number = 1;
        while let Some(bytes) = line(&mut file)? {
            number += 1;
            let bad = |what| BadRecording::Line { line: number, what };
            if recording.cut.is_some() {
                return Err(bad("there is more after the recording's end".into()));
            }
            match serde_json::from_slice(&bytes) {
                Ok(read) => recording.add(read).map_err(bad)?,
                Err(_) if bytes.last() != Some(&b'\n') => {
                    recording.cut = Some("the recording ends within a line".into());
                }
                Err(error) => return Err(bad(with_causes(&error))),
            }
        }
        Ok(recording)
    }

    fn add(&mut self, line: Line) -> Result<(), String> {
        let Line {
            process,
            order,
            call,
            answer,
            ask,
            payload,
            cut,
        } = line;
        let process = match (process, cut) {
            (None, Some(why)) => {
                self.cut = Some(why);
                return Ok(());
            }
            (Some(process), None) => process as usize,
            _ => return Err("it has to have either `process` or `cut`".into()),
        };
        let count = self.processes.len();
        let known = self.processes.get_mut(process).ok_or_else(|| {
            format!("process {process} has no order, and the next one to begin is {count}")
        });
        match (order, call, answer, ask) {
            (Some(order), None, None, None) if process == count => {
                self.processes.push(Recorded::begin(order)?);
                Ok(())
            }
            (Some(_), None, None, None) => Err(format!(
                "the next process to begin is {count}, not {process}"
            )),
            (None, Some(call), None, None) => known?.call(call, payload),
            (None, None, Some(answer), None) => known?.answer(answer, payload),
            (None, None, None, Some(ask)) => known?.ask(ask),
            _ => Err("it has to have one of `order`, `call`, `answer` and `ask`".into()),
        }
    }
}

impl Recorded {
    /// Limits that no host gives are lowered: they are for this machine now.
    fn begin(mut order: Order) -> Result<Self, String> {
        let (limits, sizes) = match &mut order {
            Order::Compile { .. } | Order::Fit(_) => {
                return Err("a recording holds no compiling".into());
            }
            Order::Run(run) => (&mut run.limits, [run.max_read, run.max_write]),
            Order::OpenImage(open) => (&mut open.limits, [open.max_read, 0]),
        };
        if sizes
            .iter()
            .any(|&size| u64::from(size) > channel::Payload::TRANSFER_SIZE)
        {
            return Err("no host lets so much be read or written at once".into());
        }
        limits.memory = limits.memory.min(MAX_MEMORY);
        limits.cpu_ms = limits.cpu_ms.min(MAX_TIME.as_millis() as u64);
        Ok(Self {
            order,
            steps: Vec::new(),
            awaited: Awaited::Call,
        })
    }

    fn call(&mut self, call: Call, payload: Option<Payload>) -> Result<(), String> {
        self.expect(Awaited::Call)?;
        let bounds = Bounds::new(&self.order);
        bounds.check(&call).map_err(|error| with_causes(&error))?;
        check_payload(carried_by_call(&call), &payload)?;
        self.awaited = match &call {
            Call::Done(_) => Awaited::Ask,
            _ => Awaited::Answer,
        };
        self.steps.push(Step::Call {
            call,
            payload,
            answer: None,
        });
        Ok(())
    }

    fn answer(&mut self, answer: Answer, payload: Option<Payload>) -> Result<(), String> {
        self.expect(Awaited::Answer)?;
        check_payload(carried_by_answer(&answer), &payload)?;
        let Some(Step::Call {
            call,
            answer: given,
            ..
        }) = self.steps.last_mut()
        else {
            return Err("an answer without a call".into());
        };
        if !fits(call, &answer) {
            return Err(format!("this is no answer to {}", call.name()));
        }
        *given = Some((answer, payload));
        self.awaited = Awaited::Call;
        Ok(())
    }

    fn ask(&mut self, ask: ImageRead) -> Result<(), String> {
        self.expect(Awaited::Ask)?;
        match &self.order {
            Order::OpenImage(open) if ask.length <= open.max_read => {}
            _ => return Err("nobody asks that of this process".into()),
        }
        self.steps.push(Step::Ask(ask));
        self.awaited = Awaited::Call;
        Ok(())
    }

    fn expect(&self, what: Awaited) -> Result<(), String> {
        if self.awaited == what {
            return Ok(());
        }
        Err(match self.awaited {
            Awaited::Call => "a call of the process has to come first",
            Awaited::Answer => "its call has to be answered first",
            Awaited::Ask => "the process had ended",
        }
        .into())
    }
}

fn check_payload(carried: Option<u32>, payload: &Option<Payload>) -> Result<(), String> {
    match (carried, payload.as_ref().map(Payload::length)) {
        (None, None) => Ok(()),
        (Some(carried), Some(length)) if carried == length => {
            match u64::from(length) <= channel::Payload::TRANSFER_SIZE {
                true => Ok(()),
                false => Err(format!("a payload of {length} bytes")),
            }
        }
        (Some(carried), Some(length)) => {
            Err(format!("`payload` is of {length} bytes, not of {carried}"))
        }
        (Some(carried), None) => Err(format!("`payload`, of {carried} bytes, is missing")),
        (None, Some(_)) => Err("`payload` belongs to nothing here".into()),
    }
}

/// Whether a host answers that to this call: of the right kind, and no more bytes than were asked for.
fn fits(call: &Call, answer: &Answer) -> bool {
    match (call, answer) {
        (_, Answer::Error(_)) => call.can_fail(),
        (
            Call::Read { length, .. } | Call::ObjectRead { length, .. },
            Answer::Bytes { length: given },
        ) => length == given,
        (Call::NextRegions { limit }, Answer::Regions(regions)) => {
            regions.len() as u64 <= u64::from(*limit)
        }
        (Call::Attachment { .. }, Answer::Bytes { .. } | Answer::Nothing) => true,
        (Call::Create { .. }, Answer::Stream(_)) => true,
        (Call::Finish { .. } | Call::ObjectSize { .. }, Answer::Size(_)) => true,
        (
            Call::Discard(_)
            | Call::Put(..)
            | Call::Write { .. }
            | Call::Splice { .. }
            | Call::Claim { .. }
            | Call::DropStream { .. }
            | Call::Log { .. },
            Answer::Unit,
        ) => true,
        _ => false,
    }
}

/// The next line with its end; none after the last.
fn line(file: &mut impl BufRead) -> Result<Option<Vec<u8>>, BadRecording> {
    let mut bytes = Vec::new();
    file.take(MAX_LINE).read_until(b'\n', &mut bytes)?;
    Ok((!bytes.is_empty()).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOUND: &[&str] = &[
        r#"{"fleecebox-recording":1,"program":"0.1.0","provider":"p","component":"00","bytes":true,"tells":""}"#,
        r#"{"process":0,"order":{"run":{"world":"provider","limits":{"memory":18446744073709551615,"cpu-ms":1000},"context":{"id":"i","settings":""},"volume":{"name":"a","size":65536,"block-size":65536,"mode":"reuse"},"reader":true,"discarder":false,"base":"00ff","max-read":4194304,"max-write":4194304}}}"#,
        r#"{"process":0,"call":{"next-regions":{"limit":1024}}}"#,
        r#"{"process":1,"order":{"open-image":{"limits":{"memory":1,"cpu-ms":1},"context":{"id":"i","settings":""},"receipt":"","max-read":4194304}}}"#,
        r#"{"process":0,"answer":{"regions":[[0,65536,false]]}}"#,
        r#"{"process":1,"call":{"done":"opened"}}"#,
        r#"{"process":1,"ask":{"offset":0,"length":2}}"#,
        r#"{"process":0,"call":{"read":{"offset":0,"length":4}}}"#,
        r#"{"process":0,"answer":{"bytes":{"length":4}},"payload":{"hex":"00ff00ff"}}"#,
        r#"{"process":1,"call":{"done":{"bytes":{"length":2}}},"payload":{"zero":2}}"#,
        r#"{"process":0,"call":{"create":{"name":"o","encoding":"zstd"}}}"#,
        r#"{"process":0,"answer":{"stream":0}}"#,
        r#"{"process":0,"call":{"write":{"stream":0,"length":3}},"payload":{"withheld":3}}"#,
        r#"{"process":0,"answer":{"error":{"quota-exceeded":"output-bytes"}}}"#,
        r#"{"process":0,"call":{"done":{"guest-error":{"other":"no room"}}}}"#,
    ];

    fn read(lines: &[impl AsRef<str>]) -> Result<Recording, BadRecording> {
        let lines: Vec<_> = lines.iter().map(AsRef::as_ref).collect();
        Recording::read(&mut (lines.join("\n") + "\n").as_bytes())
    }

    #[test]
    fn a_sound_recording_is_read_and_bounded() {
        let recording = read(SOUND).unwrap();
        assert_eq!(recording.processes.len(), 2);
        assert_eq!(recording.processes[0].steps.len(), 5);
        assert_eq!(recording.processes[1].steps.len(), 3);
        assert!(recording.cut.is_none());
        let Order::Run(run) = &recording.processes[0].order else {
            panic!("a run");
        };
        assert_eq!(run.limits.memory, MAX_MEMORY);
        assert_eq!(run.base.as_deref(), Some(&[0, 0xff][..]));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let with = |line: usize, text: &str| {
            let mut lines = SOUND.to_vec();
            lines[line - 1] = text;
            read(&lines).unwrap_err().to_string()
        };
        let cases = [
            (
                1,
                r#"{"fleecebox-recording":2,"program":"9","provider":"","component":"","bytes":true,"tells":""}"#,
                "format 2, made by 9",
            ),
            (1, "PK", "it is no recording"),
            (
                2,
                r#"{"process":1,"order":{"compile":{"length":1}}}"#,
                "line 2: the next process to begin is 0, not 1",
            ),
            (
                2,
                r#"{"process":0,"order":{"compile":{"length":1}}}"#,
                "line 2: a recording holds no compiling",
            ),
            (
                3,
                r#"{"process":0,"answer":"unit"}"#,
                "line 3: a call of the process has to come first",
            ),
            (
                3,
                r#"{"process":0,"call":{"discard":{"offset":0,"length":1}}}"#,
                "line 3: it made a call (discarder.discard) that it holds no handle for",
            ),
            (3, r#"{"process":0}"#, "one of `order`, `call`"),
            (
                5,
                r#"{"process":0,"answer":"unit"}"#,
                "line 5: this is no answer to dirty-regions.next",
            ),
            (
                7,
                r#"{"process":0,"ask":{"offset":0,"length":2}}"#,
                "line 7: a call of the process has to come first",
            ),
            (
                9,
                r#"{"process":0,"answer":{"bytes":{"length":4}}}"#,
                "line 9: `payload`, of 4 bytes, is missing",
            ),
            (
                9,
                r#"{"process":0,"answer":{"bytes":{"length":4}},"payload":{"zero":5}}"#,
                "line 9: `payload` is of 5 bytes",
            ),
            (11, r#"{"cut":"the end"}"#, "line 12: there is more"),
            (
                15,
                r#"{"process":0,"call":{"done":"opened"},"more":1}"#,
                "line 15: unknown field `more`",
            ),
        ];
        let told = cases.map(|(line, text, said)| (with(line, text), said));
        let others: Vec<_> = told
            .iter()
            .filter(|(error, said)| !error.contains(said))
            .collect();
        assert!(others.is_empty(), "{others:#?}");
    }

    #[test]
    fn a_recording_that_breaks_off_is_read_to_there() {
        let mut whole = SOUND.join("\n").into_bytes();
        whole.truncate(whole.len() - 10);
        let recording = Recording::read(&mut &whole[..]).unwrap();
        assert!(recording.cut.unwrap().contains("within a line"));
    }

    /// What is done to a line.
    #[derive(Debug, Clone)]
    enum Damage {
        Drop,
        Double,
        Swap(usize),
        Byte(usize, u8),
        Cut(usize),
    }

    fn damage() -> impl Strategy<Value = (usize, Damage)> {
        let kinds = prop_oneof![
            Just(Damage::Drop),
            Just(Damage::Double),
            (0..SOUND.len()).prop_map(Damage::Swap),
            (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
            any::<usize>().prop_map(Damage::Cut),
        ];
        (0..SOUND.len(), kinds)
    }

    proptest! {
        #[test]
        fn whatever_is_read_can_be_replayed(damages in prop::collection::vec(damage(), 0..6)) {
            let mut lines: Vec<Vec<u8>> = SOUND.iter().map(|line| line.as_bytes().to_vec()).collect();
            for (at, damage) in damages {
                let at = at % lines.len();
                match damage {
                    Damage::Drop if lines.len() > 1 => drop(lines.remove(at)),
                    Damage::Drop => {}
                    Damage::Double => lines.insert(at, lines[at].clone()),
                    Damage::Swap(other) => { let other = other % lines.len(); lines.swap(at, other) }
                    Damage::Byte(place, byte) => if let Some(length) = lines[at].len().checked_sub(1) {
                        lines[at][place % (length + 1)] = byte;
                    },
                    Damage::Cut(length) => { let length = length % (lines[at].len() + 1); lines[at].truncate(length) }
                }
            }
            let text = lines.join(&b'\n');
            if let Ok(recording) = Recording::read(&mut &text[..]) {
                check(&recording);
            }
        }
    }

    /// What a replay relies on.
    fn check(recording: &Recording) {
        for recorded in &recording.processes {
            let mut ended = false;
            for (index, step) in recorded.steps.iter().enumerate() {
                match step {
                    Step::Ask(_) => assert!(ended && matches!(recorded.order, Order::OpenImage(_))),
                    Step::Call {
                        call,
                        payload,
                        answer,
                    } => {
                        assert!(!ended || matches!(recorded.steps[index - 1], Step::Ask(_)));
                        ended = matches!(call, Call::Done(_));
                        assert_eq!(carried_by_call(call), payload.as_ref().map(Payload::length));
                        assert!(answer.is_some() || ended || index + 1 == recorded.steps.len());
                        if let Some((answer, payload)) = answer {
                            assert!(fits(call, answer));
                            assert_eq!(
                                carried_by_answer(answer),
                                payload.as_ref().map(Payload::length)
                            );
                        }
                    }
                }
            }
        }
    }
}
