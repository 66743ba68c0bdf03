//! What an export says of its blocks, as libnbd's `nbdinfo` reads it.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::{run, tool};

/// The dirty bitmaps that an export offers, as contexts: `qemu:dirty-bitmap:` and the bitmap's name.
///
/// # Errors
/// When `nbdinfo` is missing or cannot connect.
pub fn dirty_contexts(socket: &Path, export: &str) -> Result<Vec<String>> {
    // What `file` makes of the content may be no JSON, and the program may be missing.
    let document = nbdinfo(socket, export, &["--json", "--no-content"])?;
    let contexts = document["exports"][0]["contexts"].as_array();
    Ok(contexts
        .context("nbdinfo names no contexts")?
        .iter()
        .filter_map(Value::as_str)
        .filter(|context| context.starts_with("qemu:dirty-bitmap:"))
        .map(String::from)
        .collect())
}

/// The ranges, in bytes, that the bitmap calls dirty, in ascending order.
///
/// # Errors
/// As [`dirty_contexts`], or when the export does not offer the context.
pub fn dirty_ranges(socket: &Path, export: &str, context: &str) -> Result<Vec<Range<u64>>> {
    let document = nbdinfo(socket, export, &["--json", &format!("--map={context}")])?;
    let extents = document.as_array().context("nbdinfo prints no list")?;
    let dirty = extents.iter().filter(|extent| extent["type"] == 1);
    dirty
        .map(|extent| {
            let number = |field| extent[field].as_u64().context("no number");
            let start = number("offset")?;
            Ok(start..start + number("length")?)
        })
        .collect()
}

fn nbdinfo(socket: &Path, export: &str, arguments: &[&str]) -> Result<Value> {
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    let mut command = tool("nbdinfo");
    let output = run("libnbd-bin", command.args(arguments).arg(uri))?;
    Ok(serde_json::from_slice(&output.stdout)?)
}
