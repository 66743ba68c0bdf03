//! Messages of libvirt's protocol: their header, and what of those that come is of use here.

use super::Malformed;
use super::xdr::{Reader, Writer};
use crate::monitor::Event;
use serde_json::{Value, json};

/// Longest message (`VIR_NET_MESSAGE_MAX`), its length included.
pub(super) const MESSAGE_CAP: usize = 32 << 20;

/// Of the length and the header.
const HEAD: usize = 28;

const VERSION: u32 = 1;

/// Which of the daemon's programs is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Program {
    /// `REMOTE_PROGRAM`.
    Remote = 0x2000_8086,
    /// `QEMU_PROGRAM`.
    Qemu = 0x2000_8087,
}

/// `virNetMessageType`.
const CALL: u32 = 0;
const REPLY: u32 = 1;
const MESSAGE: u32 = 2;
const CALL_WITH_DESCRIPTORS: u32 = 4;
const REPLY_WITH_DESCRIPTORS: u32 = 5;

/// `virNetMessageStatus`.
const OK: u32 = 0;
const ERROR: u32 = 1;

/// `REMOTE_PROC_DOMAIN_EVENT_CALLBACK_LIFECYCLE`.
const LIFECYCLE: u32 = 318;
/// `QEMU_PROC_DOMAIN_MONITOR_EVENT`.
const MONITOR_EVENT: u32 = 6;
/// `VIR_DOMAIN_EVENT_STOPPED`.
const STOPPED: u32 = 5;

/// The bytes of a call, after which `descriptors` descriptors follow.
pub(super) fn call(
    program: Program,
    procedure: u32,
    serial: u32,
    arguments: &[u8],
    descriptors: u32,
) -> Vec<u8> {
    let kind = match descriptors {
        0 => CALL,
        _ => CALL_WITH_DESCRIPTORS,
    };
    let mut body = Writer::default()
        .number(program as u32)
        .number(VERSION)
        .number(procedure)
        .number(kind)
        .number(serial)
        .number(OK);
    if descriptors > 0 {
        body = body.number(descriptors);
    }
    let body = body.bytes(arguments).done();
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    Writer::default().number(length).bytes(&body).done()
}

/// How long the message is that begins so, without the length itself.
pub(super) fn length(first: [u8; 4]) -> Result<usize, Malformed> {
    let length = u32::from_be_bytes(first) as usize;
    match (HEAD..=MESSAGE_CAP).contains(&length) {
        true => Ok(length - 4),
        false => Err(Malformed::TooLong),
    }
}

/// What the daemon said.
#[derive(Debug, PartialEq)]
pub(super) enum Incoming<'a> {
    /// To the call of that serial number.
    Answer {
        serial: u32,
        result: Result<&'a [u8], Refusal>,
    },
    /// Of its own accord.
    Notice(Notice),
    /// Nothing that was asked for.
    Other,
}

/// `virNetMessageError`, as far as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: i32,
    pub(super) message: String,
}

/// What happened to a domain.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Notice {
    /// QEMU's monitor told it.
    Event(Event),
    /// Its QEMU has ended.
    Stopped,
}

impl<'a> Incoming<'a> {
    /// Reads a message, its length taken off.
    pub(super) fn parse(message: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(message);
        let program = reader.number()?;
        let _version = reader.number()?;
        let procedure = reader.number()?;
        let kind = reader.number()?;
        let serial = reader.number()?;
        let status = reader.number()?;
        match kind {
            REPLY => {}
            // None is asked for that would bring descriptors, which would be lost to us and closed.
            REPLY_WITH_DESCRIPTORS => drop(reader.number()?),
            MESSAGE => {
                return Ok(notice(program, procedure, reader)?.map_or(Self::Other, Self::Notice));
            }
            _ => return Ok(Self::Other),
        }
        let result = match status {
            OK => Ok(reader.rest()),
            ERROR => Err(refusal(reader)?),
            _ => return Err(Malformed::Unknown),
        };
        Ok(Self::Answer { serial, result })
    }
}

fn refusal(mut reader: Reader<'_>) -> Result<Refusal, Malformed> {
    let code = reader.signed()?;
    let _domain = reader.signed()?;
    let message = reader.optional(Reader::text)?;
    Ok(Refusal {
        code,
        message: message.unwrap_or("it did not say why").into(),
    })
}

fn notice(
    program: u32,
    procedure: u32,
    mut reader: Reader<'_>,
) -> Result<Option<Notice>, Malformed> {
    if program == Program::Remote as u32 && procedure == LIFECYCLE {
        let _callback = reader.signed()?;
        skip_domain(&mut reader)?;
        let event = reader.number()?;
        return Ok((event == STOPPED).then_some(Notice::Stopped));
    }
    if program == Program::Qemu as u32 && procedure == MONITOR_EVENT {
        let _callback = reader.signed()?;
        skip_domain(&mut reader)?;
        let name = reader.text()?.to_owned();
        let (seconds, microseconds) = (reader.long()?, reader.number()?);
        let details = reader.optional(Reader::text)?;
        let data = details.and_then(|details| serde_json::from_str(details).ok());
        return Ok(Some(Notice::Event(Event {
            name,
            data: data.unwrap_or(Value::Null),
            timestamp: json!({ "seconds": seconds, "microseconds": microseconds }),
        })));
    }
    Ok(None)
}

/// `remote_nonnull_domain`: name, UUID, id.
fn skip_domain(reader: &mut Reader<'_>) -> Result<(), Malformed> {
    reader.text()?;
    reader.bytes(UUID)?;
    reader.signed()?;
    Ok(())
}

/// Bytes of a domain's UUID.
pub(super) const UUID: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(program: Program, procedure: u32, kind: u32, serial: u32, status: u32) -> Writer {
        Writer::default()
            .number(program as u32)
            .number(VERSION)
            .number(procedure)
            .number(kind)
            .number(serial)
            .number(status)
    }

    fn domain(writer: Writer) -> Writer {
        writer.text("web").bytes(&[7; UUID]).signed(1)
    }

    #[test]
    fn a_call_is_as_long_as_it_says_and_says_how_many_descriptors_follow() {
        let plain = call(Program::Qemu, 1, 9, b"argument", 0);
        assert_eq!(plain.len(), 36);
        let first = plain[..4].try_into().unwrap();
        assert_eq!(length(first), Ok(32));
        assert_eq!(&plain[16..20], &[0, 0, 0, 0]);
        let with = call(Program::Qemu, 7, 9, b"argument", 1);
        assert_eq!(with.len(), 40);
        assert_eq!(&with[16..20], &[0, 0, 0, 4]);
        assert_eq!(&with[28..32], &[0, 0, 0, 1]);
    }

    #[test]
    fn an_error_is_its_code_and_its_words() {
        let bytes = head(Program::Remote, 23, REPLY, 5, ERROR)
            .signed(42)
            .signed(10)
            .some_text("Domain not found")
            .done();
        let refusal = Refusal {
            code: 42,
            message: "Domain not found".into(),
        };
        let expected = Incoming::Answer {
            serial: 5,
            result: Err(refusal),
        };
        assert_eq!(Incoming::parse(&bytes), Ok(expected));
    }

    #[test]
    fn an_event_of_the_monitor_and_the_end_of_a_domain_are_heard_and_other_events_are_not() {
        let event = domain(head(Program::Qemu, MONITOR_EVENT, MESSAGE, 0, OK).signed(1))
            .text("STOP")
            .number(0)
            .number(12)
            .number(34)
            .some_text(r#"{"a":1}"#)
            .done();
        let told = Event {
            name: "STOP".into(),
            data: json!({ "a": 1 }),
            timestamp: json!({ "seconds": 12, "microseconds": 34 }),
        };
        let notice = Incoming::Notice(Notice::Event(told));
        assert_eq!(Incoming::parse(&event), Ok(notice));
        let lifecycle = |event| {
            let head = head(Program::Remote, LIFECYCLE, MESSAGE, 0, OK).signed(2);
            domain(head).number(event).number(1).done()
        };
        let stopped = lifecycle(STOPPED);
        let heard = Incoming::Notice(Notice::Stopped);
        assert_eq!(Incoming::parse(&stopped), Ok(heard));
        assert_eq!(Incoming::parse(&lifecycle(3)), Ok(Incoming::Other));
    }

    proptest! {
        #[test]
        fn no_message_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Incoming::parse(&bytes);
        }

        #[test]
        fn no_message_of_a_known_kind_makes_the_parser_panic(
            procedure in prop::sample::select(vec![LIFECYCLE, MONITOR_EVENT, 1]),
            program in prop::sample::select(vec![Program::Remote, Program::Qemu]),
            kind in 0u32..7, status in 0u32..3, rest in prop::collection::vec(any::<u8>(), 0..120),
        ) {
            let bytes = head(program, procedure, kind, 1, status).bytes(&rest).done();
            if let Ok(Incoming::Answer { serial, .. }) = Incoming::parse(&bytes) {
                prop_assert_eq!(serial, 1);
            }
        }

        #[test]
        fn a_length_is_taken_only_within_its_bounds(length: u32) {
            let taken = super::length(length.to_be_bytes());
            prop_assert_eq!(taken.is_ok(), (28..=MESSAGE_CAP as u32).contains(&length));
        }
    }
}
