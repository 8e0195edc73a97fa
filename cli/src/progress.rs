//! What people see while a run goes on: a bar on a terminal, plain lines elsewhere, JSON lines on request.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use lockstep_common::progress::{EpochReport, Event, RoundReport, RunState, RunStatus, TimedEvent};
use lockstep_coordinator::monitor::{Hub, Replay};

/// Plain lines appear at most so often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Rounds over which the speed is measured.
const SPEED_ROUNDS: usize = 20;

/// In which form progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A live bar.
    Bar,
    /// Lines of text.
    Lines,
    /// Events as JSON lines on the standard output.
    Json,
}

impl Form {
    /// JSON on request, else a bar on a terminal.
    pub(crate) fn choose(json: bool) -> Self {
        match (json, std::io::stderr().is_terminal()) {
            (true, _) => Self::Json,
            (false, true) => Self::Bar,
            (false, false) => Self::Lines,
        }
    }
}

/// Shows a run's events.
pub(crate) struct Display {
    form: Form,
    bar: Option<ProgressBar>,
    epochs: u64,
    rounds_per_epoch: u64,
    total_rounds: u64,
    recent: VecDeque<(u32, f64)>,
    last_line: Option<Instant>,
    workers: u32,
}

impl Display {
    /// A display for the run with this status.
    pub(crate) fn new(form: Form, status: &RunStatus) -> Self {
        let bar = (form == Form::Bar).then(|| {
            let bar = ProgressBar::new(status.total_rounds);
            bar.set_style(style());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar.set_position(status.rounds);
            bar.set_message("waiting for workers");
            bar
        });
        let rounds_per_epoch = u64::from(status.rounds_per_epoch.max(1));
        let display = Self {
            form,
            bar,
            epochs: status.total_rounds.div_ceil(rounds_per_epoch),
            rounds_per_epoch,
            total_rounds: status.total_rounds,
            recent: VecDeque::new(),
            last_line: None,
            workers: status.workers,
        };
        status.problems.iter().for_each(|problem| display.line(&format!("problem: {problem}")));
        display
    }

    /// Shows an event. Whether the run goes on after it.
    pub(crate) fn event(&mut self, event: &TimedEvent) -> bool {
        if self.form == Form::Json {
            // A reader that has gone away ends the display, not the run.
            let line = serde_json::to_string(event).unwrap_or_default();
            let _ = writeln!(std::io::stdout(), "{line}");
        }
        match &event.event {
            Event::Round(round) => self.round(round),
            Event::Epoch(epoch) => self.epoch(epoch),
            Event::Joined { member, name } => {
                self.workers += 1;
                self.line(&format!("{member} joined: {name}"));
            }
            Event::Left { member, reason } => {
                self.workers = self.workers.saturating_sub(1);
                self.line(&format!("{member} left: {reason}"));
            }
            Event::State { state: RunState::Waiting { reason } } => self.line(&format!("waiting: {reason}")),
            Event::State { state: RunState::Finished { .. } } => {
                if let Some(bar) = &self.bar {
                    bar.finish_and_clear();
                }
                return false;
            }
            Event::State { .. } => {}
            Event::Notice { message } => self.line(&format!("notice: {message}")),
        }
        true
    }

    fn round(&mut self, round: &RoundReport) {
        self.recent.push_back((round.samples, round.duration.as_secs_f64()));
        if self.recent.len() > SPEED_ROUNDS {
            self.recent.pop_front();
        }
        let message = format!(
            "epoch {}/{} loss {:.5} {} samples/s, {} {}",
            round.epoch + 1,
            self.epochs,
            round.loss,
            HumanCount(self.samples_per_second() as u64),
            round.workers,
            if round.workers == 1 { "worker" } else { "workers" },
        );
        if let Some(bar) = &self.bar {
            bar.set_position(round.round + 1);
            bar.set_message(message);
        } else if self.form == Form::Lines && self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
            self.last_line = Some(Instant::now());
            self.line(&format!("round {}/{} {message}", round.round + 1, self.total_rounds));
        }
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        let validation = epoch.validation_loss.map_or(String::new(), |loss| format!("  validation loss {loss:.5}"));
        let part = if epoch.rounds.is_multiple_of(self.rounds_per_epoch) { "" } else { " (part)" };
        self.line(&format!(
            "epoch {}/{}{part}  train loss {:.5}{validation}  {} samples/s",
            epoch.epoch + 1,
            self.epochs,
            epoch.train_loss,
            HumanCount(self.samples_per_second() as u64)
        ));
    }

    fn samples_per_second(&self) -> f64 {
        let samples: u32 = self.recent.iter().map(|(samples, _)| samples).sum();
        let seconds: f64 = self.recent.iter().map(|(_, seconds)| seconds).sum();
        if seconds > 0.0 { f64::from(samples) / seconds } else { 0.0 }
    }

    fn line(&self, text: &str) {
        match (&self.bar, self.form) {
            (Some(bar), _) => bar.println(text),
            (None, Form::Json) => {}
            (None, _) => eprintln!("{text}"),
        }
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} round {pos}/{len} {msg}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows a run of this process until it ends.
pub(crate) async fn follow(hub: Arc<Hub>, form: Form) {
    let mut display = Display::new(form, &hub.status());
    let mut published = hub.subscribe();
    let mut next = 0;
    loop {
        let events = match hub.events_from(next) {
            Replay::Events(events) => events,
            // The display is thousands of rounds behind; it shows the newest.
            Replay::Log { until } => {
                next = until;
                continue;
            }
        };
        for event in events {
            next += 1;
            if !display.event(&event) {
                return;
            }
        }
        if published.changed().await.is_err() {
            return;
        }
    }
}
