//! When a checkpoint is due, how the last one is awaited, and what the machine must know to go on from one.

use std::time::Duration;

use lockstep_common::checkpoint::Standing;
use lockstep_common::progress::{Event as Progressed, RunState};

use super::event::{CheckpointId, Effect, Occasion, Outcome, Rejected};
use super::machine::{EpochLoss, Machine, MachineConfig, State};
use super::membership::Membership;

/// How long members are kept for a last checkpoint that does not get to the disk. A slow disk takes 2 GB in that time.
const ENDING_PATIENCE: Duration = Duration::from_secs(60);

/// After so long, people are told what the end waits for.
const ENDING_UNNOTICED: Duration = Duration::from_secs(1);

/// A run that ends as soon as its last checkpoint is on the disk: whoever would be needed if the coordinator were killed
/// before that is not dismissed yet.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    pub(super) outcome: Outcome,
    since: Duration,
    told: bool,
}

/// What the last checkpoint had, or the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LastCheckpoint {
    at: Duration,
    rounds: u64,
    evaluated: u64,
    id: CheckpointId,
    /// Whether it is not on the disk, or not known to be.
    missing: bool,
    /// Whether it lacks somebody who was barred since.
    lacks_a_bar: bool,
}

impl Machine {
    /// A machine that goes on from where another one stood. `restarts` is higher than in any part of the run before, so
    /// that no member gets a number that another one may still have.
    pub fn resume(config: MachineConfig, standing: &Standing, restarts: u32) -> Self {
        let Standing { rounds, evaluated, .. } = *standing;
        let mut machine = Self::new(config);
        machine.members = Membership::resume(&standing.workers, restarts);
        machine.rounds = rounds;
        machine.evaluated = evaluated;
        machine.epoch_loss = EpochLoss { sum: standing.epoch_loss, samples: standing.epoch_samples };
        machine.samples_seen = standing.samples_seen;
        machine.workers_lost = standing.workers_lost;
        machine.skipped = standing.skipped;
        machine.last_checkpoint = LastCheckpoint { rounds, evaluated, ..LastCheckpoint::default() };
        machine
    }

    /// The machine of a coordinator that will be started again when it is stopped: stopped members are not told that
    /// the run has ended, so that they look for the coordinator.
    pub fn coming_back(mut self) -> Self {
        self.comes_back = true;
        self
    }

    /// Where the machine stands: after the last completed round, whatever is under way.
    pub fn standing(&self) -> Standing {
        Standing {
            rounds: self.rounds,
            evaluated: self.evaluated,
            epoch_loss: self.epoch_loss.sum,
            epoch_samples: self.epoch_loss.samples,
            samples_seen: self.samples_seen,
            workers_lost: self.workers_lost,
            skipped: self.skipped,
            workers: self.members.known(),
        }
    }

    /// At an edge: has a checkpoint written, if it is time for one.
    pub(super) fn checkpoint_if_due(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let when = self.config.spec.checkpoint;
        let last = self.last_checkpoint;
        let every = |n: u32, since: u64| n > 0 && since >= u64::from(n);
        let rounds_per_epoch = u64::from(self.config.spec.schedule.rounds_per_epoch());
        // An epoch ends with its evaluation.
        let epochs = |rounds: u64, evaluated: u64| rounds.min(evaluated) / rounds_per_epoch;
        let epochs = epochs(self.rounds, self.evaluated) - epochs(last.rounds, last.evaluated);
        let seconds = now.saturating_sub(last.at).as_secs();
        if last.lacks_a_bar
            || every(when.every_rounds, self.rounds - last.rounds)
            || every(when.every_epochs, epochs)
            || every(when.every_seconds, seconds)
        {
            self.checkpoint(now, Occasion::Due, effects);
        }
    }

    /// Somebody was barred: the next edge has a checkpoint, so that a restart does not let it in again.
    pub(super) fn keep_bar(&mut self) {
        self.last_checkpoint.lacks_a_bar = true;
    }

    /// Has a checkpoint written, unless the last one has everything. Returns whether it has to be waited for.
    pub(super) fn checkpoint(&mut self, now: Duration, occasion: Occasion, effects: &mut Vec<Effect>) -> bool {
        let (last, rounds, evaluated) = (self.last_checkpoint, self.rounds, self.evaluated);
        let has_everything = (rounds, evaluated) == (last.rounds, last.evaluated);
        let wanted = !has_everything || (occasion == Occasion::End && last.missing);
        if wanted {
            let id = CheckpointId(last.id.0 + 1);
            self.last_checkpoint = LastCheckpoint { at: now, rounds, evaluated, id, missing: true, lacks_a_bar: false };
            effects.push(Effect::Checkpoint(id, Box::new(self.standing()), occasion));
        }
        wanted
    }

    /// A checkpoint is on the disk, or will never be.
    pub(super) fn settled(&mut self, id: CheckpointId, saved: bool, effects: &mut Vec<Effect>) -> Result<(), Rejected> {
        if id != self.last_checkpoint.id {
            return Err(Rejected::OldCheckpoint(id));
        }
        self.last_checkpoint.missing = !saved;
        if let State::Ending(Ending { outcome, .. }) = &self.state {
            self.end(outcome.clone(), effects);
        }
        Ok(())
    }

    /// Begins to end a run whose last checkpoint is being written.
    pub(super) fn await_checkpoint(&mut self, now: Duration, outcome: Outcome) {
        self.state = State::Ending(Ending { outcome, since: now, told: false });
    }

    /// Says what the end waits for, and does not wait for ever.
    pub(super) fn hurry(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let (rounds, State::Ending(ending)) = (self.rounds, &mut self.state) else { return };
        let waited = now.saturating_sub(ending.since);
        if waited >= ENDING_PATIENCE {
            let message = format!(
                "the last checkpoint, after round {rounds}, is not on the disk after {} s; the workers are dismissed without it",
                waited.as_secs()
            );
            let outcome = ending.outcome.clone();
            effects.push(Effect::Publish(Progressed::Notice { message }));
            self.end(outcome, effects);
        } else if waited >= ENDING_UNNOTICED && !std::mem::replace(&mut ending.told, true) {
            let reason = format!("the run ends when its last checkpoint, after round {rounds}, is on the disk");
            effects.push(Effect::Publish(Progressed::State { state: RunState::Waiting { reason } }));
        }
    }
}
