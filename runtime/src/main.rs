//! Arguments, ambient authority, exit status.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The hidden commands run before anything else of this process exists: no runtime, no threads, no configuration.
    match std::env::args().nth(1).as_deref() {
        Some(fleecebox::channel::ARGUMENT) => fleecebox_worker::serve(),
        Some(fleecebox::qemu::watchdog::HIDDEN_ARGUMENT) => fleecebox::job::ending::serve(),
        _ => fleecebox::cli::main(),
    }
}
