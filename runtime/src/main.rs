//! Arguments, ambient authority, exit status.

use std::io::Write;
use std::panic::PanicHookInfo;
use std::process::ExitCode;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(say));
    // The hidden commands run before anything else of this process exists: no runtime, no threads, no configuration.
    match std::env::args().nth(1).as_deref() {
        Some(fleecebox::channel::ARGUMENT) => fleecebox_worker::serve(),
        Some(fleecebox::qemu::watchdog::HIDDEN_ARGUMENT) => fleecebox::job::ending::serve(),
        _ => fleecebox::cli::main(),
    }
}

/// Without a backtrace, which `RUST_BACKTRACE` would ask for: the standard library holds a lock while it prints one, and
/// takes the same lock where memory ends. A job whose memory ended in there would hold its snapshot for ever.
fn say(panic: &PanicHookInfo<'_>) {
    // Nobody may be reading.
    let _ = writeln!(std::io::stderr(), "{panic}");
}
