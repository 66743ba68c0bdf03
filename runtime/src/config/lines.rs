//! On which line of a TOML file each of its keys stands, so that types need not carry it about.

use std::collections::BTreeMap;
use toml::de::{DeTable, DeValue};

/// The lines of a file's keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lines(BTreeMap<Vec<String>, usize>);

impl Lines {
    /// Of the keys of `text`; of none where it is no TOML.
    pub fn of(text: &str) -> Self {
        let mut lines = Self::default();
        if let Ok(table) = DeTable::parse(text) {
            let starts: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
            // The number of line ends before the position.
            let line = |at: usize| starts.partition_point(|&end| end < at) + 1;
            lines.enter_table(&mut Vec::new(), table.get_ref(), &line);
        }
        lines
    }

    /// The line of exactly this key; an element of a list is named by its number from 0. None where it was left out.
    pub fn exact(&self, path: &[&str]) -> Option<usize> {
        let path: Vec<String> = path.iter().map(ToString::to_string).collect();
        self.0.get(&path).copied()
    }

    /// The line of this key, or of the nearest table around it.
    pub fn near(&self, path: &[&str]) -> Option<usize> {
        (1..=path.len())
            .rev()
            .find_map(|length| self.exact(&path[..length]))
    }

    fn enter_table(
        &mut self,
        path: &mut Vec<String>,
        table: &DeTable<'_>,
        line: &impl Fn(usize) -> usize,
    ) {
        for (key, value) in table {
            path.push(key.get_ref().to_string());
            self.0.insert(path.clone(), line(key.span().start));
            self.enter(path, value.get_ref(), line);
            path.pop();
        }
    }

    fn enter(
        &mut self,
        path: &mut Vec<String>,
        value: &DeValue<'_>,
        line: &impl Fn(usize) -> usize,
    ) {
        match value {
            DeValue::Table(table) => self.enter_table(path, table, line),
            DeValue::Array(array) => {
                for (index, element) in array.iter().enumerate() {
                    path.push(index.to_string());
                    self.0.insert(path.clone(), line(element.span().start));
                    self.enter(path, element.get_ref(), line);
                    path.pop();
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tables_and_elements_of_lists_have_lines() {
        let text = "a = 1\n\n[t.acme]\nvms = [\n  'web',\n  'db',\n]\n[[t.acme.grant]]\nread = true\n\
                    [[t.acme.grant]]\n[t.acme.grant.limits]\nmemory = 5\n";
        let lines = Lines::of(text);
        assert_eq!(lines.exact(&["a"]), Some(1));
        assert_eq!(lines.exact(&["t", "acme"]), Some(3));
        assert_eq!(lines.exact(&["t", "acme", "vms", "1"]), Some(6));
        assert_eq!(lines.exact(&["t", "acme", "grant", "0"]), Some(8));
        assert_eq!(lines.exact(&["t", "acme", "grant", "0", "read"]), Some(9));
        assert_eq!(lines.exact(&["t", "acme", "grant", "1"]), Some(10));
        assert_eq!(
            lines.exact(&["t", "acme", "grant", "1", "limits", "memory"]),
            Some(12)
        );
        assert_eq!(lines.exact(&["t", "acme", "grant", "1", "read"]), None);
        assert_eq!(lines.near(&["t", "acme", "grant", "1", "read"]), Some(10));
        assert_eq!(Lines::of("= no TOML"), Lines::default());
    }
}
