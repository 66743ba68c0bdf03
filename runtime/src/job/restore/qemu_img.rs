//! QEMU's own tool writes QEMU's own format.

use super::destination::TOO_LARGE;
use super::error::ConvertError;
use crate::contract::with_causes;
use rustix::io::Errno;
use rustix::process::Signal;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use tokio::process::Command;

/// The child's standard input and output. It opens no path: both files may have no name, in a folder where a name could
/// be anybody's.
const INPUT: &str = "/proc/self/fd/0";
const OUTPUT: &str = "/proc/self/fd/1";

/// Writes what `raw` holds to `qcow2`.
pub(super) async fn convert(raw: &File, qcow2: &File) -> Result<(), ConvertError> {
    let handed = |file: &File| file.try_clone().map(Stdio::from);
    let (input, output) = (handed(raw)?, handed(qcow2)?);
    let ended = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", INPUT, OUTPUT])
        .stdin(input)
        .stdout(output)
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(ConvertError::NotRun)?
        .wait_with_output()
        .await?;
    if ended.status.success() {
        return Ok(());
    }
    let said: String = match ended.status.signal() {
        Some(signal) if signal == Signal::XFSZ.as_raw() => {
            format!("it was ended: {TOO_LARGE}")
        }
        Some(signal) => format!("signal {signal} ended it"),
        None => explained_words(String::from_utf8_lossy(&ended.stderr).trim()),
    };
    Err(ConvertError::Failed { said })
}

/// As for a write of this process.
fn explained_words(said: &str) -> String {
    let too_large = std::io::Error::from_raw_os_error(Errno::FBIG.raw_os_error());
    let words = with_causes(&too_large);
    // Without its number, as QEMU says it.
    let bare = words.split(" (").next().unwrap_or_default();
    match said.contains(bare) {
        true => format!("{said}: {TOO_LARGE}"),
        false => said.to_owned(),
    }
}
