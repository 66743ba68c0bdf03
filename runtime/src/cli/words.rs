//! Words on the command line that belong to rooms that know no command line.

use super::Form;
use crate::contract::Wasi;
use crate::job::export::Mechanism;
use crate::job::restore::Format;
use crate::qemu::agent::Freeze;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use serde::de::value::Error;
use serde::de::{DeserializeOwned, IntoDeserializer};

/// A part of WASI.
pub(super) fn wasi() -> impl TypedValueParser<Value = Wasi> {
    let parts = [
        (Wasi::Clocks, "The time of day, and timers"),
        (Wasi::Random, "Random bytes"),
        (
            Wasi::Output,
            "Standard output and error, which go to the job's log; with them an input that has ended, no arguments and no environment",
        ),
    ];
    let words = parts.map(|(part, help)| PossibleValue::new(part.name()).help(help));
    PossibleValuesParser::new(words).try_map(|word| named(&word))
}

/// What a restore writes.
pub(super) fn format() -> impl TypedValueParser<Value = Format> {
    let words = [Format::Raw, Format::Qcow2].map(Format::name);
    PossibleValuesParser::new(words).map(|word| match word == Format::Qcow2.name() {
        true => Format::Qcow2,
        false => Format::Raw,
    })
}

/// The form for people, which is the default.
pub(super) const TEXT: &str = "text";

/// How a command tells what happens.
pub(super) fn progress() -> impl TypedValueParser<Value = Form> {
    let words = [
        (TEXT, "Lines, and a bar where it is a terminal"),
        ("json", "One JSON object a line, and nothing else"),
    ];
    let words = words.map(|(word, help)| PossibleValue::new(word).help(help));
    PossibleValuesParser::new(words).map(|word| match word == TEXT {
        true => Form::Text,
        false => Form::Json,
    })
}

/// How a tool gets the disks.
pub(super) fn mechanism() -> impl TypedValueParser<Value = Mechanism> {
    let words = [
        (
            "nbd",
            "NBD exports on a unix socket, with dirty bitmaps as meta contexts",
        ),
        (
            "file-handle",
            "Each disk as a read-only file through FUSE, its dirty regions as JSON beside it",
        ),
    ];
    let words = words.map(|(word, help)| PossibleValue::new(word).help(help));
    PossibleValuesParser::new(words).try_map(|word| named(&word))
}

/// Whether the guest's file systems are to be frozen.
pub(super) fn freeze() -> impl TypedValueParser<Value = Freeze> {
    let words = [
        (
            "required",
            "There is no backup without; the default, where the VM has an agent",
        ),
        (
            "if-available",
            "An agent that does not answer or refuses is told of and done without",
        ),
        ("never", "The agent is not asked"),
    ];
    let words = words.map(|(word, help)| PossibleValue::new(word).help(help));
    PossibleValuesParser::new(words).try_map(|word| named(&word))
}

/// What the configuration names so too.
fn named<T: DeserializeOwned>(word: &str) -> Result<T, Error> {
    T::deserialize(word.into_deserializer())
}
