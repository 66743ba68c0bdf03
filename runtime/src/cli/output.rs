//! Lines for people and scripts. The standard library's own macros panic when nobody reads any more (`| head`, a terminal
//! that is gone), and what was done is done all the same.

/// A line on standard error, harmless whatever it holds.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let line = $crate::terminal::one_line(&format!($($text)*));
        let _ = writeln!(std::io::stderr(), "{line}");
    }};
}

/// A line of the result, on standard output, or a document of several; harmless too.
macro_rules! show {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let lines = $crate::terminal::lines(&format!($($text)*));
        let _ = writeln!(std::io::stdout(), "{lines}");
    }};
}
