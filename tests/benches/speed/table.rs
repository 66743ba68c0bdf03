//! The numbers, as a table for people and as JSON for programs.

use serde_json::{Value, json};

use crate::product::Memory;

const MIB: f64 = 1_048_576.0;

/// One line of the table: the times of one way to copy the disk, and what it is held against.
#[derive(Debug)]
pub(crate) struct Row {
    /// What was measured.
    pub(crate) name: String,
    /// Of each round, in seconds.
    pub(crate) seconds: Vec<f64>,
    /// The peers' rows, by name, and what is to be reached.
    pub(crate) against: Vec<(&'static str, Option<f64>)>,
    /// Of a round that was not timed.
    pub(crate) memory: Option<Memory>,
}

/// Prints `rows`, which each copied `bytes`, and gives them as JSON. A ratio is the median of the rounds' ratios:
/// what slows the machine for a while slows both sides of a round.
pub(crate) fn speeds(rows: &[Row], bytes: u64) -> Vec<Value> {
    println!(
        "{:<38} {:>7} {:>12}  {:>12}  against",
        "MiB/s", "median", "min-max", "job+sandbox"
    );
    rows.iter()
        .map(|row| {
            let rates: Vec<f64> = row
                .seconds
                .iter()
                .map(|seconds| bytes as f64 / MIB / seconds)
                .collect();
            let (least, most) = bounds(&rates);
            let memory = row.memory.map_or(String::new(), |memory| {
                format!("{}+{} MiB", memory.job >> 20, memory.sandbox >> 20)
            });
            let ratios: Vec<(&str, f64, Option<f64>)> = row
                .against
                .iter()
                .filter_map(|&(peer, goal)| {
                    let peer_row = rows.iter().find(|row| row.name == peer)?;
                    let ratios: Vec<f64> = peer_row
                        .seconds
                        .iter()
                        .zip(&row.seconds)
                        .map(|(theirs, ours)| theirs / ours)
                        .collect();
                    Some((peer, median(&ratios), goal))
                })
                .collect();
            let shown: Vec<String> = ratios
                .iter()
                .map(|(peer, ratio, goal)| {
                    let goal = goal.map_or(String::new(), |goal| format!(" (goal {goal:.2})"));
                    format!("{ratio:.2} x {peer}{goal}")
                })
                .collect();
            println!(
                "{:<38} {:>7.0} {:>12}  {:>12}  {}",
                row.name,
                median(&rates),
                format!("{least:.0}-{most:.0}"),
                memory,
                shown.join(", ")
            );
            let ratios: Vec<Value> = ratios
                .iter()
                .map(|(peer, ratio, goal)| json!({"peer": peer, "ratio": ratio, "goal": goal}))
                .collect();
            json!({
                "name": row.name,
                "bytes": bytes,
                "seconds": row.seconds,
                "mib_per_second": {"median": median(&rates), "min": least, "max": most},
                "against": ratios,
                "peak_resident_bytes": row.memory.map(Memory::json),
            })
        })
        .collect()
}

/// Prints a time that has a goal, and gives it as JSON.
pub(crate) fn time(name: &str, seconds: &[f64], goal: f64, memory: Option<Memory>) -> Value {
    let (least, most) = bounds(seconds);
    let unit = |seconds: f64| match seconds < 1.0 {
        true => format!("{:.0} ms", seconds * 1000.0),
        false => format!("{seconds:.2} s"),
    };
    let shown = memory.map_or(String::new(), |memory| {
        format!(
            ", job {} MiB, sandbox {} MiB",
            memory.job >> 20,
            memory.sandbox >> 20
        )
    });
    println!(
        "{name}: {} ({} to {}), goal {}{shown}",
        unit(median(seconds)),
        unit(least),
        unit(most),
        unit(goal)
    );
    json!({
        "name": name,
        "seconds": seconds,
        "median": median(seconds),
        "goal": goal,
        "peak_resident_bytes": memory.map(Memory::json),
    })
}

impl Memory {
    fn json(self) -> Value {
        json!({"job": self.job, "sandbox": self.sandbox})
    }
}

/// Prints the longest of times that have no goal, and gives them as JSON.
pub(crate) fn longest(name: &str, seconds: &[f64]) -> Value {
    let (_, most) = bounds(seconds);
    println!("{name}: {:.1} ms", most * 1000.0);
    json!({"name": name, "seconds": seconds, "longest": most})
}

fn bounds(values: &[f64]) -> (f64, f64) {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    (least, most)
}

/// Of an even number, the upper one of the middle. `NaN` if there are none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints ratios of times, which have a goal, and gives them as JSON.
pub(crate) fn ratio(name: &str, ratios: &[f64], goal: f64) -> Value {
    let (least, most) = bounds(ratios);
    let middle = median(ratios);
    println!("{name}: {middle:.2} x that alone ({least:.2} to {most:.2}), goal {goal:.2}");
    json!({"name": name, "ratios": ratios, "median": middle, "goal": goal})
}
