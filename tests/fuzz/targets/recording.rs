//! A recording of a job that somebody sent.
//!
//! What must hold: no panic, and nothing is allocated for a length that a line only names.

#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use fleecebox::recording::Recording;
use fleecebox_fuzz::json;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

/// Keys, and texts that decide something.
const WORDS: &[&str] = &[
    "process",
    "order",
    "call",
    "answer",
    "ask",
    "payload",
    "cut",
    "run",
    "open-image",
    "compile",
    "world",
    "limits",
    "memory",
    "cpu-ms",
    "context",
    "id",
    "settings",
    "volume",
    "name",
    "size",
    "block-size",
    "mode",
    "reader",
    "discarder",
    "base",
    "receipt",
    "max-read",
    "max-write",
    "offset",
    "length",
    "limit",
    "stream",
    "range",
    "encoding",
    "next-regions",
    "discard",
    "read",
    "put",
    "create",
    "write",
    "splice",
    "claim",
    "finish",
    "drop-stream",
    "attachment",
    "log",
    "level",
    "message",
    "object-size",
    "object-read",
    "done",
    "opened",
    "bytes",
    "guest-error",
    "failed",
    "unit",
    "regions",
    "nothing",
    "error",
    "other",
    "zero",
    "withheld",
    "hex",
    "00ff",
    "zstd",
    "identity",
    "provider",
    "blind-provider",
    "new",
    "reuse",
    "none",
    "info",
    "quota-exceeded",
    "output-bytes",
    "io",
];

const HEADER: &str = r#"{"fleecebox-recording":1,"program":"0.1.0","provider":"p","component":"00","bytes":true,"tells":""}"#;
const ORDERS: &str = r#"{"process":0,"order":{"run":{"world":"provider","limits":{"memory":1,"cpu-ms":1},"context":{"id":"i","settings":""},"volume":{"name":"a","size":65536,"block-size":65536,"mode":"reuse"},"reader":true,"discarder":true,"base":null,"max-read":4194304,"max-write":4194304}}}
{"process":1,"order":{"open-image":{"limits":{"memory":1,"cpu-ms":1},"context":{"id":"i","settings":""},"receipt":"","max-read":4194304}}}"#;

#[derive(Debug)]
enum Case {
    /// As the file is.
    Bytes(Vec<u8>),
    /// Lines after a header and the orders of two processes.
    Lines(Vec<Value>),
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        if u.ratio(1, 8)? {
            return Ok(Self::Bytes(u.arbitrary()?));
        }
        let lines = (0..u.int_in_range(1..=6)?)
            .map(|_| {
                let mut line = json::value(u, WORDS)?;
                // Most lines have a process.
                if let Value::Object(fields) = &mut line {
                    fields.insert("process".into(), u.int_in_range(0..=2)?.into());
                }
                Ok(line)
            })
            .collect::<Result<_>>()?;
        Ok(Self::Lines(lines))
    }
}

fuzz_target!(|case: Case| {
    let bytes = match case {
        Case::Bytes(bytes) => bytes,
        Case::Lines(lines) => {
            let lines = lines.iter().map(Value::to_string);
            let all: Vec<_> = [HEADER.to_owned(), ORDERS.to_owned()]
                .into_iter()
                .chain(lines)
                .collect();
            all.join("\n").into_bytes()
        }
    };
    let _ = Recording::read(&mut &bytes[..]);
});
