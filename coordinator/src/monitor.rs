//! What the outside world sees of a run: its state, its members, and every event again from any round on.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lockstep_common::checkpoint::{Shown, Standing};
use lockstep_common::config::RunSpec;
use lockstep_common::progress::{Event, RunState, RunStatus, TimedEvent, WorkerStatus};
use tokio::sync::watch;

use crate::metrics::totals::Totals;

/// Events kept in memory, about 200 bytes each; older ones are read from the event log.
const KEPT_EVENTS: usize = 1 << 14;

/// Rounds over which the speed is measured.
const SPEED_ROUNDS: usize = 20;

/// The run's public state. The driver writes it, any number of watchers read it.
pub struct Hub {
    state: Mutex<State>,
    /// Number of events so far: wakes watchers.
    published: watch::Sender<u64>,
    event_log: PathBuf,
}

struct State {
    status: RunStatus,
    workers: Vec<WorkerStatus>,
    /// Number of the first event in `events`.
    first: u64,
    events: VecDeque<Arc<TimedEvent>>,
    /// Samples and seconds of the last rounds.
    recent: VecDeque<(u32, f64)>,
    /// What is wrong at present: about what, and the message.
    troubles: Vec<(String, String)>,
    totals: Totals,
    /// When the driver last gave a sign of life.
    driver_seen: Instant,
}

impl Hub {
    /// The state of a run that has not started. `event_log` is where the journal writes events.
    pub fn new(spec: &RunSpec, event_log: PathBuf) -> Self {
        let status = RunStatus {
            run: spec.name.clone(),
            model: spec.model.spec.name.clone(),
            parameters: spec.model.layout.parameters() as u64,
            state: RunState::Waiting { reason: "no worker has joined yet".to_owned() },
            rounds: 0,
            total_rounds: spec.total_rounds(),
            rounds_per_epoch: spec.schedule.rounds_per_epoch(),
            batch_size: spec.schedule.batch_size.get(),
            shards: spec.schedule.tree.shards(),
            workers: 0,
            min_workers: spec.min_workers,
            samples_seen: 0,
            samples_per_second: 0.0,
            loss: None,
            train_loss: None,
            validation_loss: None,
            problems: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let state = State {
            status,
            workers: Vec::new(),
            first: 0,
            events: VecDeque::new(),
            recent: VecDeque::new(),
            troubles: Vec::new(),
            totals: Totals::default(),
            driver_seen: Instant::now(),
        };
        Self { state: Mutex::new(state), published: watch::Sender::new(0), event_log }
    }

    /// The run at a glance.
    pub fn status(&self) -> RunStatus {
        self.lock().status.clone()
    }

    /// The members at a glance.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        self.lock().workers.clone()
    }

    /// What has added up since the coordinator was started.
    pub fn totals(&self) -> Totals {
        self.lock().totals.clone()
    }

    /// Time since the driver last gave a sign of life. When the run has ended it gives none any more.
    pub fn driver_silent_for(&self) -> Duration {
        self.lock().driver_seen.elapsed()
    }

    /// Wakes whenever the number of events changes.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    /// The events from number `from` on, as far as they are in memory; or, when they are older, where to read them:
    /// [`Replay::Log`].
    pub fn events_from(&self, from: u64) -> Replay {
        let state = self.lock();
        match from.checked_sub(state.first) {
            Some(skip) => Replay::Events(state.events.iter().skip(skip as usize).cloned().collect()),
            None => Replay::Log { until: state.first },
        }
    }

    /// Reads events number `from` to `until` (excluded) from the event log.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn read_log(&self, from: u64, until: u64) -> std::io::Result<Vec<Arc<TimedEvent>>> {
        let lines = BufReader::new(File::open(&self.event_log)?).lines();
        let wanted = lines.skip(from as usize).take((until - from) as usize);
        wanted.map(|line| Ok(Arc::new(serde_json::from_str(&line?)?))).collect()
    }

    /// Takes a new event into account and wakes watchers.
    pub fn publish(&self, event: TimedEvent) {
        let mut state = self.lock();
        state.note(&event.event);
        state.events.push_back(Arc::new(event));
        if state.events.len() > KEPT_EVENTS {
            state.events.pop_front();
            state.first += 1;
        }
        let count = state.first + state.events.len() as u64;
        drop(state);
        self.published.send_replace(count);
    }

    /// Shows the state of a run that goes on: `standing` rounds are done, and the event log holds `events` events.
    pub fn resume(&self, standing: &Standing, shown: &Shown, events: u64) {
        let mut state = self.lock();
        state.first = events;
        state.status.rounds = standing.rounds;
        state.status.samples_seen = standing.samples_seen;
        state.status.loss = shown.loss;
        state.status.train_loss = shown.train_loss;
        state.status.validation_loss = shown.validation_loss;
        drop(state);
        self.published.send_replace(events);
    }

    /// Shows what is wrong with something at present, or that nothing is any more.
    pub fn trouble(&self, about: &str, message: Option<&str>) {
        let mut state = self.lock();
        state.troubles.retain(|(known, _)| known != about);
        state.troubles.extend(message.map(|message| (about.to_owned(), message.to_owned())));
        state.status.problems = state.troubles.iter().map(|(_, message)| message.clone()).collect();
    }

    /// Replaces the list of members. The driver does so every few milliseconds: it is its sign of life, too.
    pub fn show_workers(&self, workers: Vec<WorkerStatus>) {
        let mut state = self.lock();
        state.driver_seen = Instant::now();
        state.status.workers = workers.len() as u32;
        state.workers = workers;
    }

    /// Shows how many workers were ever admitted, and how many were lost without having drained.
    pub fn count_workers(&self, (joined, lost): (u32, u32)) {
        let mut state = self.lock();
        (state.totals.workers_joined, state.totals.workers_lost) = (joined, lost);
    }

    /// Shows that another checkpoint is on the disk.
    pub fn checkpoint_written(&self) {
        self.lock().totals.checkpoint_written(SystemTime::now());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is a plain assignment, so that the state is valid even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Hub::events_from`].
pub enum Replay {
    /// All events from the number asked for.
    Events(Vec<Arc<TimedEvent>>),
    /// Events before number `until` are in the event log only.
    Log {
        /// First event that is in memory.
        until: u64,
    },
}

impl State {
    fn note(&mut self, event: &Event) {
        self.totals.note(event);
        let status = &mut self.status;
        match event {
            Event::Round(round) => {
                status.state = RunState::Training;
                status.rounds = round.round + 1;
                status.samples_seen += u64::from(round.samples);
                status.loss = Some(round.loss);
                self.recent.push_back((round.samples, round.duration.as_secs_f64()));
                if self.recent.len() > SPEED_ROUNDS {
                    self.recent.pop_front();
                }
                let samples: u32 = self.recent.iter().map(|(samples, _)| samples).sum();
                let seconds: f64 = self.recent.iter().map(|(_, seconds)| seconds).sum();
                status.samples_per_second = if seconds > 0.0 { f64::from(samples) / seconds } else { 0.0 };
            }
            Event::Epoch(epoch) => {
                status.train_loss = Some(epoch.train_loss);
                status.validation_loss = epoch.validation_loss;
            }
            Event::State { state } => status.state = state.clone(),
            Event::Joined { .. } => status.workers += 1,
            Event::Left { .. } => status.workers = status.workers.saturating_sub(1),
            Event::Notice { .. } => {}
        }
    }
}
