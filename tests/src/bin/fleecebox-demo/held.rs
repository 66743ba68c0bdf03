//! What QEMU holds, asked of QEMU itself and not of the product.

use std::fmt;

use anyhow::Result;
use fleecebox_tests::Qmp;
use serde_json::{Value, json};

/// The demonstration's own reference copies, which the product knows nothing of.
const OURS: &str = "reference-";

/// The names of what QEMU holds: its nodes, its jobs, its NBD exports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Block nodes.
    pub(crate) nodes: Vec<String>,
    /// Block jobs.
    pub(crate) jobs: Vec<String>,
    /// NBD exports.
    pub(crate) exports: Vec<String>,
}

impl Held {
    /// Asks.
    pub(crate) fn now(qmp: &mut Qmp) -> Result<Self> {
        let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
        let jobs = qmp.execute("query-jobs", json!({}))?;
        let exports = qmp.execute("query-block-exports", json!({}))?;
        Ok(Self {
            nodes: names(&nodes, "node-name"),
            jobs: names(&jobs, "id"),
            exports: names(&exports, "id"),
        })
    }

    /// What is here and not in `before`, as `node NAME`.
    pub(crate) fn beyond(&self, before: &Self) -> Vec<String> {
        let kinds = [
            ("node", &self.nodes, &before.nodes),
            ("job", &self.jobs, &before.jobs),
            ("export", &self.exports, &before.exports),
        ];
        kinds
            .into_iter()
            .flat_map(|(kind, now, before)| {
                now.iter()
                    .filter(|name| !before.contains(name))
                    .map(move |name| format!("{kind} {name}"))
            })
            .collect()
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |things: &[String], one: &str| match things.len() {
            1 => format!("1 {one}"),
            many => format!("{many} {one}s"),
        };
        let nodes = count(&self.nodes, "node");
        let jobs = count(&self.jobs, "job");
        write!(f, "{nodes}, {jobs}, {}", count(&self.exports, "export"))
    }
}

/// Nodes that QEMU names by itself (`#block123`) belong to one with a name.
fn names(list: &Value, field: &str) -> Vec<String> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry[field].as_str())
        .filter(|name| !name.starts_with(OURS) && !name.starts_with('#'))
        .map(String::from)
        .collect()
}
