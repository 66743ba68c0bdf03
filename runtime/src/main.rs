//! The command, and, by a hidden first argument, the sandbox process.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == fleecebox::sandbox::ARGUMENT)
    {
        return fleecebox::sandbox::serve();
    }
    ExitCode::SUCCESS
}
