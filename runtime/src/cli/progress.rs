//! Tells a job's events on standard error: as lines, and as a bar with rate and time left on a terminal.

use super::text;
use crate::event::{Event, Events};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long the last events may take to be told. All there is to do is to print some lines.
const HANGING: Duration = Duration::from_secs(5);

/// Ends with the job: [`Progress::finish`] waits until all that was told is printed.
#[derive(Debug)]
pub(super) struct Progress(JoinHandle<()>);

impl Progress {
    /// Starts telling. Nothing but warnings where `quiet`.
    pub(super) fn start(quiet: bool) -> (Events, Self) {
        let (events, receiver) = Events::channel();
        (events, Self(tokio::spawn(tell(receiver, quiet))))
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
            say!("{line}");
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
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
