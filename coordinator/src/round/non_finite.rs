//! Rounds whose loss or gradient is not finite: workers look at them once more, then the run stops or goes on without.
//!
//! Everything that is decided here depends on the round's sums and on what the run has skipped before, and so is the same
//! for any number of workers.

use std::time::Duration;

use lockstep_common::checkpoint::Skipped;
use lockstep_common::config::{NonFiniteAction, NonFiniteConfig};
use lockstep_common::progress::Event as Progressed;
use lockstep_common::protocol::{Finding, Work};

use super::commit::Complete;
use super::event::{Effect, Outcome, Step};
use super::machine::{Machine, State};

impl Machine {
    /// The optimizer's step of the round that comes next: rounds without a step do not count, and the rate may have been
    /// lowered.
    pub(super) fn next_step(&self) -> Step {
        let Skipped { rounds, rate_cuts, .. } = self.skipped;
        let learning_rate = self.config.spec.optimizer.learning_rate;
        Step {
            number: self.rounds - rounds + 1,
            learning_rate: self.config.spec.non_finite.rate_after(learning_rate, rate_cuts),
        }
    }

    /// Has the workers find out which leaf, which samples and which layers it is about.
    pub(super) fn inspect(&mut self, now: Duration, suspect: Complete, effects: &mut Vec<Effect>) {
        self.suspect = Some(suspect);
        self.begin_next(now, effects);
    }

    /// The inspection is done: the run stops, or goes on without the round's step.
    pub(super) fn inspected(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let State::Working(inspection) = &self.state else { return };
        let finding = inspection.finding().cloned();
        let Some(suspect) = self.suspect.take() else { return };
        let what = self.describe(&suspect, finding.as_ref());
        let NonFiniteConfig { action, rate_factor, max_in_a_row } = self.config.spec.non_finite;
        if action == NonFiniteAction::Stop {
            let reason = format!(
                "{what}; the parameters are those before the round. Lower optimizer.learning_rate, or go on with --resume and non_finite.action skip or lower_rate"
            );
            return self.finish(now, Outcome::Failed(reason), effects);
        }
        if self.skipped.in_a_row >= max_in_a_row {
            let reason = format!(
                "{what}, after {} skipped rounds in a row (non_finite.max_in_a_row); the parameters are those before them",
                self.skipped.in_a_row
            );
            return self.finish(now, Outcome::Failed(reason), effects);
        }
        self.skipped.rounds += 1;
        self.skipped.in_a_row += 1;
        let mut message = format!("{what}; its batch is skipped");
        if action == NonFiniteAction::LowerRate {
            self.skipped.rate_cuts += 1;
            let lowered = self.next_rate();
            message.push_str(&format!(" and the learning rate is multiplied by {rate_factor}: {lowered:e}"));
        }
        effects.push(Effect::Publish(Progressed::Notice { message }));
        effects.push(Effect::Skip { round: self.rounds });
        self.commit(now, suspect, effects);
    }

    fn next_rate(&self) -> f64 {
        let spec = &self.config.spec;
        spec.non_finite.rate_after(spec.optimizer.learning_rate, self.skipped.rate_cuts)
    }

    /// What is wrong with a round, with everything that is known about it.
    fn describe(&self, suspect: &Complete, finding: Option<&Finding>) -> String {
        let Complete { progress, totals, reduced } = suspect;
        let loss = totals.loss / f64::from(totals.samples);
        let round = progress.work;
        let sums = format!("{round} is not finite: its loss is {loss}, its gradient's norm {}", reduced.gradient_norm);
        let Some(Finding { leaf, samples, loss, tensors }) = finding else {
            return format!(
                "{sums}; every leaf is finite when it is computed again: only their sum is not, or a worker computes wrong"
            );
        };
        let by = progress.deliverer(*leaf).map_or_else(String::new, |member| format!(" (computed by {member})"));
        let samples = match &samples[..] {
            [] => "no sample of it by itself, but their sum".to_owned(),
            [one] => format!("sample {one}"),
            many => format!("samples {}", many.iter().map(u32::to_string).collect::<Vec<String>>().join(", ")),
        };
        let layers = match tensors {
            None => "the gradient is finite, the loss alone overflows".to_owned(),
            Some((first, last)) if first == last => format!("the gradient is not finite in {}", self.tensor(*first)),
            Some((first, last)) => {
                format!("the gradient is not finite from {} to {}", self.tensor(*first), self.tensor(*last))
            }
        };
        format!("{sums}; it begins in leaf {leaf}{by}, {samples}: the loss is {loss}, {layers}")
    }

    fn tensor(&self, index: u32) -> String {
        let entry = self.config.spec.model.layout.entries().get(index as usize);
        entry.map_or_else(|| format!("tensor {index}, which the layout has not"), |entry| entry.name.clone())
    }

    /// The work that has to be done before anything else, if there is a round that is not finite.
    pub(super) fn pending_inspection(&self) -> Option<Work> {
        self.suspect.as_ref().map(|_| Work::Inspection { round: self.rounds })
    }
}
