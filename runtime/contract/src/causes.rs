//! How errors are told: the one place where the text of an error and those of its causes come together.
//!
//! An error's text says what happened on its own level, and never its cause; the cause is what `source()` returns. So each
//! is said once, however long the way was that an error took, and whoever shows one to people, or writes it into a log,
//! an event, a record or an answer, says all of it by [`with_causes`]. A variant that is `transparent` adds no level. A
//! test of the product reads the sources for both halves (`tests/errors.rs`).

use std::error::Error;

/// What an error and its causes say, from the outermost to the first, joined by `: `.
pub fn with_causes(error: &dyn Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said.push_str(": ");
        said.push_str(&error.to_string());
        cause = error.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("{0} cannot be read")]
    struct Unreadable(&'static str, #[source] io::Error);

    #[derive(Debug, thiserror::Error)]
    enum Failed {
        #[error("volume a")]
        Volume(#[source] Unreadable),
        #[error(transparent)]
        Plain(Unreadable),
    }

    fn unreadable() -> Unreadable {
        Unreadable("x", io::ErrorKind::NotFound.into())
    }

    #[test]
    fn each_cause_is_said_once_from_the_outermost_to_the_first() {
        let said = with_causes(&Failed::Volume(unreadable()));
        assert_eq!(said, "volume a: x cannot be read: entity not found");
    }

    #[test]
    fn what_is_transparent_adds_no_level() {
        let said = with_causes(&Failed::Plain(unreadable()));
        assert_eq!(said, "x cannot be read: entity not found");
        let said = with_causes(&io::Error::other(unreadable()));
        assert_eq!(said, "x cannot be read: entity not found");
    }
}
