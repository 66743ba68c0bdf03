//! Tells a job's events on standard error: as text, with a bar of rate and time left on a terminal, or as JSON.

use super::lines::{self, Line, Lines};
use super::{output, text};
use crate::event::{Event, Events};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// How long the last events may take to be told. All there is to do is to print some lines.
const HANGING: Duration = Duration::from_secs(5);

/// Between two looks at how far it is.
const PACE: Duration = Duration::from_millis(200);

/// Ends with the job: [`Progress::finish`] waits until all that was told is printed.
#[derive(Debug)]
pub(super) struct Progress(JoinHandle<()>);

impl Progress {
    /// Starts telling. Nothing but warnings where `quiet`.
    pub(super) fn start(quiet: bool) -> (Events, Self) {
        let (events, receiver) = Events::channel();
        let telling = match lines::asked_for() {
            Some(lines) => tokio::spawn(tell_as_lines(receiver, lines, quiet)),
            None => tokio::spawn(tell(receiver, quiet)),
        };
        (events, Self(telling))
    }

    /// Waits for the end of the events; every [`Events`] must have been dropped. A task that hangs in an archive never
    /// drops its own, and is not waited for.
    pub(super) async fn finish(self) {
        let _ = timeout(HANGING, self.0).await;
    }
}

async fn tell(mut events: UnboundedReceiver<Event>, quiet: bool) {
    let bar = bar(quiet);
    let say = |line: String| {
        if bar.is_hidden() {
            output::say(line);
        } else {
            bar.println(text::one_line(&line));
        }
    };
    while let Some(event) = events.recv().await {
        match event {
            Event::Warning { text } => say(format!("warning: {text}")),
            Event::Total { bytes, .. } => bar.inc_length(bytes),
            Event::Advance { bytes, .. } => bar.inc(bytes),
            _ if quiet => {}
            Event::Step { step } => bar.set_message(step),
            Event::Note { text } => say(text),
            Event::Provider {
                volume,
                level,
                text,
            } => say(format!("provider ({volume}, {level}): {text}")),
        }
    }
    bar.finish_and_clear();
}

fn bar(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
    }
    let style = "{msg:>10} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    let bar = ProgressBar::new(0);
    // The template is a constant; where it were wrong, the default style would do.
    bar.set_style(
        ProgressStyle::with_template(style)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> "),
    );
    bar.enable_steady_tick(PACE);
    bar
}

async fn tell_as_lines(mut events: UnboundedReceiver<Event>, lines: &'static Lines, quiet: bool) {
    let mut volumes = Volumes::default();
    let mut looks = interval(PACE);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = looks.tick() => if !lines.drops(volumes.untold().count()) {
                volumes.tell(lines);
            },
            event = events.recv() => match event {
                Some(event) => tell_event(event, &mut volumes, lines, quiet),
                None => break,
            },
        }
    }
    volumes.tell(lines);
}

fn tell_event(event: Event, volumes: &mut Volumes, lines: &Lines, quiet: bool) {
    let line = match event {
        Event::Warning { text } => Line::Warning { text },
        _ if quiet => return,
        Event::Total { volume, bytes } => return volumes.add(volume, 0, bytes),
        Event::Advance { volume, bytes } => return volumes.add(volume, bytes, 0),
        Event::Step { step } => Line::Step { step },
        Event::Note { text } => Line::Note { text },
        Event::Provider {
            volume,
            level,
            text,
        } => Line::Provider {
            volume,
            level,
            text,
        },
    };
    lines.tell(line);
}

/// How far each volume is.
#[derive(Debug, Default)]
struct Volumes(BTreeMap<String, HowFar>);

#[derive(Debug, Default)]
struct HowFar {
    done: u64,
    total: u64,
    is_told: bool,
}

impl Volumes {
    fn add(&mut self, volume: String, done: u64, total: u64) {
        let how_far = self.0.entry(volume).or_default();
        how_far.done = how_far.done.saturating_add(done);
        how_far.total = how_far.total.saturating_add(total);
        how_far.is_told = false;
    }

    fn untold(&mut self) -> impl Iterator<Item = (&String, &mut HowFar)> {
        self.0.iter_mut().filter(|(_, how_far)| !how_far.is_told)
    }

    fn tell(&mut self, lines: &Lines) {
        for (volume, how_far) in self.untold() {
            how_far.is_told = true;
            lines.tell(Line::Progress {
                volume: volume.clone(),
                done_bytes: how_far.done,
                total_bytes: how_far.total,
            });
        }
    }
}
