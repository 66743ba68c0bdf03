//! Lines for people and scripts. The standard library's own macros panic when nobody reads any more (`| head`, a terminal
//! that is gone), and what was done is done all the same.

/// A line on standard error.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// A line of the result, on standard output.
macro_rules! show {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}
