//! When a checkpoint is due, and what the machine must know to go on from one.

use std::time::Duration;

use lockstep_common::checkpoint::Standing;

use super::event::{Effect, Occasion};
use super::machine::{EpochLoss, Machine, MachineConfig};
use super::membership::Membership;

/// What the last checkpoint had, or the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LastCheckpoint {
    at: Duration,
    rounds: u64,
    evaluated: u64,
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
        machine.last_checkpoint = LastCheckpoint { rounds, evaluated, ..LastCheckpoint::default() };
        machine
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

    /// Has a checkpoint written, unless the last one has everything.
    pub(super) fn checkpoint(&mut self, now: Duration, occasion: Occasion, effects: &mut Vec<Effect>) {
        let last = self.last_checkpoint;
        if (self.rounds, self.evaluated) != (last.rounds, last.evaluated) {
            self.last_checkpoint =
                LastCheckpoint { at: now, rounds: self.rounds, evaluated: self.evaluated, lacks_a_bar: false };
            effects.push(Effect::Checkpoint(Box::new(self.standing()), occasion));
        }
    }
}
