//! What others have named or said, made harmless for a terminal: the one place where this is done.
//!
//! Every line that the commands print passes through here, whatever it holds: a provider's words, QEMU's, a manifest's.

/// `text` on one line, with all that steers a terminal escaped.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// `text` with its lines and columns, and all else that steers a terminal escaped. JSON stays JSON, as these characters
/// stand nowhere but in its strings.
pub fn lines(text: &str) -> String {
    let mut lines = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) && !matches!(c, '\n' | '\t') {
            lines.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            lines.push(c);
        }
    }
    lines
}

/// Control characters (C0, DEL, C1), and those that let a line read otherwise than it is.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_is_left_and_json_stays_json() {
        let hostile = "a\x1b[2J\u{9b}31m\x7f\r\u{202e}z";
        let shown = one_line(&format!("{hostile}\n"));
        assert_eq!(shown, r"a\u{1b}[2J\u{9b}31m\u{7f}\r\u{202e}z\n");
        let json = serde_json::to_string_pretty(&[hostile]).unwrap();
        let harmless = lines(&json);
        assert!(
            harmless.chars().all(|c| c == '\n' || !steers(c)),
            "{harmless}"
        );
        let read: Vec<String> = serde_json::from_str(&harmless).unwrap();
        assert_eq!(read, [hostile]);
    }
}
