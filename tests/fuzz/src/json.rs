//! JSON that looks like what the product expects here and there: with keys and texts that it knows.

use arbitrary::{Arbitrary, Result, Unstructured};
use serde_json::{Map, Number, Value};

/// Deeper values only make an execution slower.
const DEPTH: u32 = 6;

/// A value. `words` are used as keys and as texts, beside texts of the fuzzer's own.
pub fn value(u: &mut Unstructured<'_>, words: &[&str]) -> Result<Value> {
    nested(u, words, DEPTH)
}

fn nested(u: &mut Unstructured<'_>, words: &[&str], depth: u32) -> Result<Value> {
    let kinds = if depth == 0 { 5 } else { 7 };
    Ok(match u.int_in_range(0..=kinds)? {
        0 => Value::Null,
        1 => Value::Bool(u.arbitrary()?),
        2 => Value::Number(u64::arbitrary(u)?.into()),
        3 => number(u)?,
        4 => Value::String(u.choose(words)?.to_string()),
        5 => Value::String(u.arbitrary()?),
        6 => Value::Array(
            (0..u.int_in_range(0..=5)?)
                .map(|_| nested(u, words, depth - 1))
                .collect::<Result<_>>()?,
        ),
        _ => Value::Object(
            (0..u.int_in_range(0..=12)?)
                .map(|_| Ok((u.choose(words)?.to_string(), nested(u, words, depth - 1)?)))
                .collect::<Result<Map<_, _>>>()?,
        ),
    })
}

fn number(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match u.int_in_range(0..=2)? {
        0 => Value::Number(i64::arbitrary(u)?.into()),
        1 => Value::Number(u8::arbitrary(u)?.into()),
        _ => Number::from_f64(u.arbitrary()?).map_or(Value::Null, Value::Number),
    })
}
